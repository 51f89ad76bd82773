"""cache_append: a new token into a cache, in place."""

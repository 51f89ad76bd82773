"""Key/value caches as pytrees, one file each."""

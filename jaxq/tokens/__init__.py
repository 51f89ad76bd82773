"""Token reduction: fewer tokens for the rest of a model to read."""

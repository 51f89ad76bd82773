"""The flax.linen layers every model is built from."""

"""A norm and the quantization of what it gives, in one pass over memory."""

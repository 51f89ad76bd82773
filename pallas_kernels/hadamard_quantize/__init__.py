"""A blockwise Hadamard transform and the quantization of what it gives."""

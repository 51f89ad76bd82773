"""Number formats, quantized arrays, packing, range search and Hadamards."""

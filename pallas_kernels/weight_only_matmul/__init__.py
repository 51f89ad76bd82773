"""x @ dequantize(w), w packed to 8, 4, 2 or 1 bits."""

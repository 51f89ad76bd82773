"""Both sides quantized: integer or fp8 products, scales after the sum."""

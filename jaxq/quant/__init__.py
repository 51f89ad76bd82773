"""Post-training quantization methods, one file each; each is a Transform."""

"""Readers of model files: GGUF, Hugging Face, and the tokenizers in them."""

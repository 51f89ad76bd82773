"""Measures of language models: perplexity, divergence, their uncertainty."""

"""jaxq: compression of real models for TPUs and GPUs in JAX."""

__version__ = '0.1.0'

"""jaxq: compression of real models for TPUs and GPUs in JAX."""

__version__ = '0.1.0'


def recommend(chip: str, goal: str = 'latency') -> str:
  """The scheme to begin with on a chip: see jaxq.quant.recommend."""
  from jaxq.quant import recommend as recommend_lib  # Imports JAX.

  return recommend_lib.recommend(chip, goal)

"""Widths of real models, and rows of a decoded batch and of a prefill."""

SPECS = {
  f'{name}_m{M}': (M, K)
  for name, K in (('llama3_8b', 4096), ('llama3_70b', 8192), ('smollm2', 576))
  for M in (16, 2048)
}

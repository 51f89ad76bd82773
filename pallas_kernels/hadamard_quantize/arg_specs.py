"""Widths of real models, blocks, and rows of a decode and of a prefill."""

SPECS = {
  f'{name}_h{h}_m{M}': (M, K, h)
  for name, K in (('llama3_8b_down', 14336), ('llama3_8b_o', 4096))
  for h in (64, 128, 256)
  for M in (16, 2048)
}
SPECS |= {
  f'{name}_whole_m{M}': (M, K, K)
  for name, K in (('llama3_8b_o', 4096), ('llama3_70b_o', 8192))
  for M in (16, 2048)
}

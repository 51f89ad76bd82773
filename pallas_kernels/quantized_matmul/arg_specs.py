"""Shapes of real models for both sides quantized."""

import dataclasses

from pallas_kernels.weight_only_matmul import arg_specs

LAYERS = arg_specs.LAYERS
TOKENS = (16, 256, 2048)
# Name: format of x, bits and group_size of w.
FORMATS = {
  'w8a8': ('int8', 8, -1),
  'w4a8': ('int8', 4, -1),
  'w4a4': ('int4', 4, -1),
  'w4a8g128': ('int8', 4, 128),
  'fp8': ('float8_e4m3fn', 8, -1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """One call: x (M, K) bf16 quantized by row, w (K, N)."""

  name: str
  M: int
  K: int
  N: int
  x_format: str
  bits: int
  group_size: int


SPECS = {
  f'{layer}_{name}_m{M}': ArgSpec(
    name=f'{layer}_{name}_m{M}',
    M=M,
    K=K,
    N=N,
    x_format=x_format,
    bits=bits,
    group_size=group_size,
  )
  for layer, (K, N) in LAYERS.items()
  for name, (x_format, bits, group_size) in FORMATS.items()
  for M in TOKENS
}

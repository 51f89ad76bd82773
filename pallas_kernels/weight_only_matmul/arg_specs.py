"""Shapes of real models, shared by the tests, the search and the benchmark.

(K, N) of the linear layers of Llama-3 8B and 70B, and of a wide projection of
which figures are known; M tokens at a time: a decoded one, a small batch, a
large one, a prefill.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """One call: x (M, K) bf16, w (K, N) of `bits`, groups of group_size."""

  name: str
  M: int
  K: int
  N: int
  bits: int
  group_size: int = -1
  symmetric: bool = True


LAYERS = {
  'llama3_8b_qkv': (4096, 6144),
  'llama3_8b_o': (4096, 4096),
  'llama3_8b_up': (4096, 28672),
  'llama3_8b_down': (14336, 4096),
  'llama3_70b_up': (8192, 28672),
  'llama3_8b_kv': (4096, 1024),
}
TOKENS = (1, 16, 64, 256, 2048)
FORMATS = (  # bits, group_size, symmetric
  (8, -1, True),
  (4, 128, True),
  (4, 128, False),
  (4, 64, True),
  (4, 32, True),
  (4, -1, True),
  (2, 128, True),
  (1, 128, True),
)


def name_of(layer: str, M: int, bits: int, group: int, symmetric: bool) -> str:
  """Such as 'llama3_8b_up_w4g128_m16'; 'a' stands for asymmetric."""
  suffix = f'g{group}' if group > 0 else 'c'
  return f'{layer}_w{bits}{suffix}{"" if symmetric else "a"}_m{M}'


SPECS = {
  name_of(layer, M, *form): ArgSpec(
    name=name_of(layer, M, *form),
    M=M,
    K=K,
    N=N,
    bits=form[0],
    group_size=form[1],
    symmetric=form[2],
  )
  for layer, (K, N) in LAYERS.items()
  for form in FORMATS
  for M in TOKENS
}

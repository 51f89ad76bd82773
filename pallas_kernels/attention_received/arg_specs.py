"""Shapes of real calls: queries, keys, heads and width of a layer."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """One call: q (B, T, H, D), k (B, S, Hkv, D)."""

  name: str
  B: int
  T: int
  S: int
  H: int
  Hkv: int
  D: int
  reduce: str = 'sum'
  causal: bool = False
  dtype: str = 'bfloat16'


SPECS = {
  spec.name: spec
  for spec in (
    # VisionZip on an encoder without a class token: all patches to all.
    ArgSpec(name='siglip_729', B=8, T=729, S=729, H=16, Hkv=16, D=72),
    # FastV: the last token of a prompt of the 8B decoder.
    ArgSpec(name='fastv_8b', B=1, T=1, S=8192, H=32, Hkv=8, D=128),
    # SparseVLM: text rows of a prompt to all of it.
    ArgSpec(
      name='sparsevlm_8b', B=1, T=128, S=8192, H=32, Hkv=8, D=128, causal=True
    ),
    # QTSplus: the query to 30k tokens of a long video.
    ArgSpec(
      name='qtsplus_30k', B=1, T=64, S=30000, H=28, Hkv=4, D=128, reduce='max'
    ),
    # A whole prefill to itself.
    ArgSpec(
      name='prefill_8b', B=1, T=4096, S=4096, H=32, Hkv=8, D=128, causal=True
    ),
  )
}

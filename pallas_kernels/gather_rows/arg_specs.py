"""Shapes of real selections: rows, kept rows, width."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """One call: R of the rows of x (N, D)."""

  name: str
  N: int
  R: int
  D: int
  dtype: str = 'bfloat16'


SPECS = {
  spec.name: spec
  for spec in (
    # Visual tokens of a prompt of the 8B decoder, a quarter and a tenth kept.
    ArgSpec(name='select_8b_25', N=8192, R=2048, D=4096),
    ArgSpec(name='select_8b_10', N=32768, R=3277, D=4096),
    # A decoder of 0.5B and one image.
    ArgSpec(name='select_576', N=576, R=64, D=896),
    # Compaction of a layer's keys, heads side by side.
    ArgSpec(name='compact_kv_8b', N=8192, R=2048, D=1024),
  )
}

"""Shapes of real token reducers: rows, centers, width, ranks, dtype."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """One call: x (N, D), c (K, D), the best `top` centers of a row."""

  name: str
  N: int
  K: int
  D: int
  top: int = 1
  dtype: str = 'bfloat16'


SPECS = {
  spec.name: spec
  for spec in (
    # ToMe: half the tokens of an image against the other half, by keys.
    ArgSpec(name='tome_vit_l16', N=98, K=98, D=64, dtype='float32'),
    ArgSpec(name='tome_vit_l_1024px', N=2048, K=2048, D=64, dtype='float32'),
    # VisionZip: 522 patches to ten contextual tokens.
    ArgSpec(name='visionzip_576', N=522, K=10, D=64, dtype='float32'),
    # VQToken: the tokens of a video to a codebook.
    ArgSpec(name='vqtoken_video', N=6272, K=1024, D=896),
    # EmbedLens: visual tokens to a vocabulary.
    ArgSpec(name='embedlens_vocab', N=2304, K=32000, D=4096, top=3),
  )
}

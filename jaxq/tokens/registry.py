"""The reducers by name, and `--token_reducer=tome:r=13`.

A new reducer is one line of REDUCERS: its name and its config with the
defaults. It is then tested by tests/tokens/test_contract.py.
"""

from typing import Any

from jaxq import config_text
from jaxq.tokens import (
  cacovid,
  controls,
  dycoke,
  echoingpixels,
  embedlens,
  fastv,
  follow_the_flow,
  interface,
  langdc,
  pixel_shuffle,
  pooling,
  prumerge,
  pvc,
  qtsplus,
  quota,
  sparsevlm,
  tokenflex,
  tome,
  visionzip,
  vqtoken,
)

REDUCERS: dict[str, interface.Config] = {
  'adaptive_pool': pooling.PoolingConfig(method='adaptive'),
  'average_pool': pooling.PoolingConfig(),
  'bilinear_pool': pooling.PoolingConfig(method='bilinear'),
  'cacovid': cacovid.CaCoVIDConfig(),
  'dycoke': dycoke.DycokeConfig(),
  'echoing_pixels': echoingpixels.EchoingPixelsConfig(),
  'embedlens': embedlens.EmbedLensConfig(),
  'fastv': fastv.FastvConfig(),
  'follow_the_flow': follow_the_flow.FollowTheFlowConfig(),
  'frames': controls.FramesConfig(),
  'langdc': langdc.LangDCConfig(),
  'pixel_shuffle': pixel_shuffle.PixelShuffleConfig(),
  'prumerge': prumerge.PruMergeConfig(),
  'prumerge_plus': prumerge.PruMergeConfig(plus=True),
  'pvc': pvc.PvcConfig(),
  'qtsplus': qtsplus.QTSplusConfig(),
  'quota': quota.QuotaConfig(),
  'random': controls.RandomConfig(),
  'sparsevlm': sparsevlm.SparseVlmConfig(),
  'tokenflex': tokenflex.TokenFlexConfig(),
  'tome': tome.TomeConfig(),
  'uniform': controls.UniformConfig(),
  'visionzip': visionzip.VisionZipConfig(),
  'vqtoken': vqtoken.VQTokenConfig(),
  'vqtoken_codes': vqtoken.VQTokenConfig(wiring='none'),
}


def parse(text: str) -> interface.Config:
  """'name' or 'name:field=value,field=value' -> a config.

  Raises:
    ValueError: unknown name, field or value; the message lists the known.
  """
  return config_text.parse(
    text,
    REDUCERS,
    flag='token_reducer',
    noun='token reducer',
    example='tome:r=13',
  )


def text_of(config: interface.Config) -> str:
  """The shortest text that `parse` makes this config of."""
  return config_text.text_of(config, REDUCERS)


def describe(config: interface.Config) -> dict[str, Any]:
  """A config as JSON data, with the name of its type."""
  return config_text.describe(config)

"""The trainings by the reducer's name; a new one is a line of TRAININGS.

Missing, with what each needs that MosaicQA's models have not: `echoing_pixels`
sieves text with audio and video, and goes on with refined states under
positions of its own (sync_rope), so the decoder is to be one that was built
with them; `pvc` is another encoder (pvc_encoder), in place of the ViT;
`langdc` needs a captioner trained on the caption variant; `follow_the_flow`
a text-to-image model.
"""

from collections.abc import Mapping

from experiments.reducer_training import (
  cacovid,
  embedlens,
  program,
  qtsplus,
  through_decoder,
)
from jaxq.tokens import embedlens_groups, interface
from jaxq.tokens import registry as reducers

TRAININGS: Mapping[str, program.Training] = {
  'adaptive_pool': through_decoder.CONTROL,
  'cacovid': program.Training(
    config=cacovid.CacovidTrainConfig(), build=cacovid.build, fit=cacovid.fit
  ),
  'embedlens': program.Training(
    config=embedlens_groups.Thresholds(), build=embedlens.build
  ),
  'qtsplus': program.Training(
    config=qtsplus.QtsplusTrainConfig(), build=qtsplus.build, fit=qtsplus.fit
  ),
  'random': through_decoder.CONTROL,
  'tokenflex': through_decoder.TOKENFLEX,
  'tome': through_decoder.CONTROL,
  'uniform': through_decoder.CONTROL,
  'visionzip': through_decoder.CONTROL,
  'vqtoken': through_decoder.VQTOKEN,
  'vqtoken_codes': through_decoder.CONTROL,
}


def parse(text: str) -> tuple[str, interface.Config]:
  """`--token_reducer` as name and config of one that can be trained.

  Raises:
    ValueError: no token reducer, or one without a training.
  """
  config, name = reducers.parse(text), text.partition(':')[0]
  if name not in TRAININGS:
    raise ValueError(
      f'--token_reducer={text}: {name!r} has no training on MosaicQA; allowed '
      f'{sorted(TRAININGS)}. Use one of them, or add a line to '
      'experiments.reducer_training.registry.'
    )
  return name, config

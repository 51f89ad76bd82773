"""`--token_reducer` on an encoder: the same model, with fewer tokens inside.

tome:r=13        13 tokens fewer behind each layer (vit-s14, whisper-base)
random:r=13      the control: as many, drawn
fastv:layer=4    half of the tokens behind layer 4, those attended to most
"""

import dataclasses

from jaxq.tokens import registry
from models import encoder_reduction, loading

FAMILIES = ('vit', 'whisper')


def apply(model: loading.Model, *texts: str) -> loading.Model:
  """A model that reduces its tokens as `--token_reducer` says; none: as it is.

  Raises:
    ValueError: the text, or more than one.
    NotImplementedError: a model of another family, or a reducer that does not
      work inside an encoder.
  """
  if not texts:
    return model
  if len(texts) > 1:
    raise ValueError(
      f'--token_reducer={", ".join(texts)} with {model.name}; one at a time is '
      'allowed inside an encoder. Run once for each.'
    )
  (text,) = texts
  config = registry.parse(text)
  if model.family not in FAMILIES:
    raise NotImplementedError(
      f'--token_reducer={text} with {model.name}, a {model.family} model; '
      f'allowed are models of {list(FAMILIES)}. Leave the flag out.'
    )
  encoder_reduction.check(config)
  return dataclasses.replace(
    model,
    module=model.module.clone(token_reducer=config),
    name=f'{model.name} {text}',
  )

"""What the models of each family are calibrated and measured on.

`experiments.calibrate` and `experiments.evaluate` know no families: they take
the `Family` of the model here. A new family is one line in FAMILIES.

  decoder  packed windows of text; perplexity, KL, agreement
  encoder  passages, padded; cosine to float, retrieval of a paragraph's rest
  vit      crops of photographs; cosine to float, nearest neighbours
  whisper  spoken clips; WER, NLL of what is said, KL, agreement
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import evaluation, results, speech
from jaxq.data import images, passages, pipeline
from jaxq.eval import bootstrap as bootstrap_lib
from jaxq.eval import embedding, features
from models import decoder, whisper

COSINE = 'cosine to float'
RETRIEVAL = 'retrieval top-1'
SAME_BEST = 'same best match'
ORDER = 'rank correlation'
PHOTO = '1-NN same photo'
SAME_NEIGHBOUR = '1-NN agreement'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """What the flags choose of data; a family looks at what concerns it.

  source, length: '' and 0 are the family's own. samples: sequences, passages or
  images. length: tokens of a sequence, window or passage. image_size: pixels of
  a side. tokens: scored by a decoder, in windows. bos: as in
  pipeline.DataConfig.
  """

  source: str = ''
  samples: int = 64
  length: int = 0
  image_size: int = 224
  tokens: int = 16384
  bos: str = 'none'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """The functions of a family.

  calibration_source, evaluation_source: for a Choice without a source.
  calibration_length, evaluation_length: for one without a length.
  calibration: (model, choice) -> what the driver takes, all samples.
  evaluation: (model, choice) -> what `compare` takes.
  compare: (reference or None, model, that, mesh=, config=, progress=) -> rows,
    the reference's first.
  logits: (config, params outside the blocks, stream (B, T, C)) -> (B, T, V);
    None for families that predict no tokens.
  """

  calibration_source: str
  evaluation_source: str
  calibration_length: int
  evaluation_length: int
  calibration: Callable[[Any, Choice], Any]
  evaluation: Callable[[Any, Choice], Any]
  compare: Callable[..., tuple[results.Row, ...]]
  logits: Callable[[Any, Any, jax.Array], jax.Array] | None = None


def of(model: Any) -> Family:
  """The family of a Model or an OpenModel.

  Raises:
    NotImplementedError: there is no measure for it.
  """
  if model.family not in FAMILIES:
    raise NotImplementedError(
      f'{model.name}: models of the family {model.family} cannot be calibrated '
      f'or measured from here yet; allowed are {sorted(FAMILIES)}.'
    )
  return FAMILIES[model.family]


def calibration_data(model: Any, choice: Choice) -> tuple[Any, str]:
  """The calibration samples, and their description in words."""
  family = of(model)
  choice = dataclasses.replace(
    choice,
    source=choice.source or family.calibration_source,
    length=choice.length or family.calibration_length,
  )
  data = family.calibration(model, choice)
  shape = ' x '.join(map(str, jax.tree.leaves(data)[0].shape))
  what = {'vit': 'pixels', 'whisper': 'features'}.get(model.family, 'tokens')
  return data, f'{shape} {what} of {choice.source}'


def evaluation_data(model: Any, choice: Choice) -> Any:
  """What the family's `compare` takes."""
  family = of(model)
  choice = dataclasses.replace(
    choice,
    source=choice.source or family.evaluation_source,
    length=choice.length or family.evaluation_length,
  )
  return family.evaluation(model, choice)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
  """Encoded samples; `other` are keys of queries, or labels of images."""

  data: Any
  other: Any
  description: str


def _logits(module: Any) -> Callable[[Any, Any, jax.Array], jax.Array]:
  """Family.logits of a module class with a `logits` method."""

  def logits(config: Any, outside: Any, x: jax.Array) -> jax.Array:
    return module(config).apply({'params': outside}, x, method='logits')

  return logits


def _windows(model: Any, choice: Choice) -> np.ndarray:
  _check_length(model, choice.length)
  config = pipeline.DataConfig(
    source=choice.source,
    num_sequences=choice.samples,
    sequence_length=choice.length,
  )
  return pipeline.calibration_tokens(config, _tokenizer(model))


def _evaluation_windows(
  model: Any, choice: Choice
) -> pipeline.EvaluationWindows:
  return evaluation.load_windows(
    model,
    source=choice.source,
    window=choice.length,
    tokens=choice.tokens,
    bos=choice.bos,
  )


def _compare_decoders(reference, model, windows, **how):
  return evaluation.compare(reference, model, windows, **how).rows()


def _passages(model: Any, choice: Choice) -> Any:
  config = _passage_config(model, choice)
  return passages.calibration_batch(config, _tokenizer(model))


def _pairs(model: Any, choice: Choice) -> Samples:
  config = _passage_config(model, choice)
  firsts, rests = passages.pairs(config)
  tokenizer = _tokenizer(model)
  return Samples(
    data=passages.encode(firsts, tokenizer, config),
    other=passages.encode(rests, tokenizer, config),
    description=f'{len(firsts)} pairs of {config.description}',
  )


def _passage_config(model: Any, choice: Choice) -> passages.PassageConfig:
  _check_length(model, choice.length)
  return passages.PassageConfig(
    source=choice.source,
    num_passages=choice.samples,
    length=choice.length,
    pad_token_id=model.config.pad_token_id,
  )


def _compare_encoders(
  reference, model, samples, *, mesh=None, config=None, progress=None
):
  """Cosine over queries and keys; retrieval among all keys."""
  del progress  # It takes seconds.

  def encode(m):
    run = lambda data: embedding.encode(m.module, m.variables, data, mesh=mesh)
    return run(samples.data), run(samples.other)

  metric = _metrics(samples, model, config)
  queries, keys = encode(model)
  found = embedding.retrieve(queries, keys)
  own = (metric(RETRIEVAL, found.correct),)
  if reference is None:
    return (results.Row(name=model.name, metrics=own),)
  float_queries, float_keys = encode(reference)
  float_found = embedding.retrieve(float_queries, float_keys)
  cosines = embedding.cosine(
    np.concatenate([queries, keys]),
    np.concatenate([float_queries, float_keys]),
  )
  same = (found.found == float_found.found).astype(np.float32)
  order = embedding.rank_correlation(queries, keys, float_queries, float_keys)
  compared = (
    metric(COSINE, cosines),
    metric(SAME_BEST, same),
    metric(ORDER, order),
  )
  return (
    results.Row(
      name=reference.name, metrics=(metric(RETRIEVAL, float_found.correct),)
    ),
    results.Row(name=model.name, metrics=own + compared),
  )


def _crops(model: Any, choice: Choice) -> np.ndarray:
  return images.load(_image_config(model, choice)).images


def _labelled_crops(model: Any, choice: Choice) -> Samples:
  config = _image_config(model, choice)
  crops = images.load(config)
  return Samples(
    data=crops.images,
    other=crops.photo,
    description=f'{len(crops.photo)} of {config.description}',
  )


def _image_config(model: Any, choice: Choice) -> images.ImageConfig:
  patch = model.config.patch_size
  if choice.image_size % patch:
    near = max(1, round(choice.image_size / patch)) * patch
    raise ValueError(
      f'--image_size={choice.image_size}; {model.name} takes sides that are '
      f'multiples of {patch}. Give --image_size={near}.'
    )
  return images.ImageConfig(
    source=choice.source, num_images=choice.samples, size=choice.image_size
  )


def _compare_vits(
  reference, model, samples, *, mesh=None, config=None, progress=None
):
  """Cosine of the class token's features, and nearest neighbours by it."""
  del progress  # It takes seconds.

  def encode(m):
    return embedding.encode(m.module, m.variables, samples.data, mesh=mesh)

  metric = _metrics(samples, model, config)
  found = encode(model)
  own = (metric(PHOTO, features.accuracy(found, samples.other)),)
  if reference is None:
    return (results.Row(name=model.name, metrics=own),)
  expected = encode(reference)
  compared = (
    metric(COSINE, embedding.cosine(found, expected)),
    metric(SAME_NEIGHBOUR, features.agreement(found, expected)),
  )
  first = metric(PHOTO, features.accuracy(expected, samples.other))
  return (
    results.Row(name=reference.name, metrics=(first,)),
    results.Row(name=model.name, metrics=own + compared),
  )


def _metrics(samples: Samples, model: Any, config: Any) -> Callable:
  """(name, one value per sample) -> a Metric with its interval."""
  conventions = {
    'data': samples.description,
    'dtype': jnp.dtype(model.module.dtype).name,
  }
  config = config or bootstrap_lib.BootstrapConfig()
  config = dataclasses.replace(config, block=1)  # Samples stand alone.

  def metric(name: str, values: np.ndarray) -> results.Metric:
    interval = bootstrap_lib.interval(
      lambda mean: mean, values[:, None], config=config
    )
    return results.Metric.of(name, interval, conventions)

  return metric


def _tokenizer(model: Any) -> Any:
  """Of a Model, or of an OpenModel."""
  return model.tokenizer() if callable(model.tokenizer) else model.tokenizer


def _check_length(model: Any, length: int) -> None:
  longest = model.config.max_position
  if length > longest:
    raise ValueError(
      f'--sequence_length={length}; {model.name} takes sequences of at most '
      f'{longest} tokens. Give --sequence_length={longest} or less.'
    )


_TEXT = ('wiki-sample:calibration', 'wiki-sample:evaluation')
FAMILIES: dict[str, Family] = {
  'decoder': Family(
    calibration_source=_TEXT[0],
    evaluation_source=_TEXT[1],
    calibration_length=512,
    evaluation_length=2048,
    calibration=_windows,
    evaluation=_evaluation_windows,
    compare=_compare_decoders,
    logits=_logits(decoder.Decoder),
  ),
  'encoder': Family(
    calibration_source=_TEXT[0],
    evaluation_source=_TEXT[1],
    calibration_length=128,
    evaluation_length=128,
    calibration=_passages,
    evaluation=_pairs,
    compare=_compare_encoders,
  ),
  'vit': Family(
    calibration_source='photos:calibration',
    evaluation_source='photos:evaluation',
    calibration_length=0,  # Images have none.
    evaluation_length=0,
    calibration=_crops,
    evaluation=_labelled_crops,
    compare=_compare_vits,
  ),
  'whisper': Family(
    calibration_source='speech:calibration',
    evaluation_source='speech:evaluation',
    calibration_length=0,  # That of what is said.
    evaluation_length=0,
    calibration=speech.calibration,
    evaluation=speech.evaluation,
    compare=speech.compare,
    logits=_logits(whisper.Whisper),
  ),
}

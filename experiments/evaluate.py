"""Measures a model on held-out text, or images.

  python -m experiments.evaluate --model=DIR --reference=smollm2-135m

Prints token perplexity over non-overlapping windows, the word- and
byte-normalised figures beside it and, given a reference, the paired ratio, the
KL divergence and the top-1 agreement, each with a 95 % bootstrap interval. Of
encoders it prints how far their embeddings moved and what they still find. Of
inputs in static steps (OutlierTune, MergeQuant) it counts the codes at the ends
of their ranges, and warns where these are many.

With --kv_cache=oscar:bits=2 the model reads a window in chunks of --kv_chunk
tokens: a token sees its own chunk as it is and earlier ones as the cache holds
them, which for caches that compress blocks of so many tokens is what they do
when a text is generated. The reference reads without a cache.

Of a folder that experiments.train made it prints what MosaicQA questions are
answered, with all visual tokens and with each --token_reducer.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import models
from experiments import (
  cli,
  encoder_reduction,
  evaluation,
  families,
  passkey,
  plan_job,
  planning,
  results,
  saturation,
  token_pictures,
  token_reduction,
  training,
  training_files,
)
from jaxq.calibrate import plan
from jaxq.eval import bootstrap
from jaxq.kvcache import interface, registry
from jaxq.parallel import mesh as mesh_lib

_MODEL = flags.DEFINE_string(
  'model',
  None,
  'What to measure: packaged name, .gguf, Hugging Face or jaxq directory.',
  required=True,
)
_REFERENCE = flags.DEFINE_string(
  'reference', None, 'The float model to compare with; none: measure alone.'
)
_DATA = flags.DEFINE_string(
  'data',
  None,
  'Text or images that calibration did not see. Default: '
  'wiki-sample:evaluation, photos:evaluation for images.',
)
_WINDOW = flags.DEFINE_integer(
  'window',
  None,
  'Tokens per window. Default: 2048; 128 for an encoder.',
  lower_bound=2,
)
_SAMPLES = flags.DEFINE_integer(
  'samples', 256, 'Pairs of passages, or images, to measure an encoder on.'
)
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', 224, 'Pixels of an image, both sides.', lower_bound=1
)
_TOKENS = flags.DEFINE_integer(
  'tokens', 16384, 'Tokens in all, in whole windows.', lower_bound=2
)
_BOS = flags.DEFINE_enum(
  'bos',
  'none',
  ['none', 'document', 'window'],
  'Before what the BOS token is put.',
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Of float weights, activations.'
)
_BLOCK = flags.DEFINE_integer(
  'bootstrap_block', 128, 'Consecutive tokens that are drawn together.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the bootstrap.')
_MESH = flags.DEFINE_string(
  'mesh',
  '',
  'Device mesh, as in data:2,model:4. Default: one device; of several '
  'processes all.',
)
_PASSKEY = flags.DEFINE_list(
  'passkey', [], 'Prompt lengths, in tokens, to hide a number in; as 512,1024.'
)
_KV_CACHE = flags.DEFINE_string(
  'kv_cache',
  None,
  'What the model keeps keys and values in, as in oscar:bits=2; default: a '
  'window is read in one pass.',
)
_KV_CHUNK = flags.DEFINE_integer(
  'kv_chunk',
  evaluation.KV_CHUNK,
  'Tokens of a window that are read at a time with --kv_cache.',
  lower_bound=1,
)
_TOKEN_REDUCER = flags.DEFINE_multi_string(
  'token_reducer',
  [],
  'What keeps or merges tokens: of a MosaicQA model the visual ones, as in '
  'tome:budget=0.25 or a folder of experiments.train_reducer (pictures of it '
  'go beside --output), of vit-s14 and whisper-base those inside the encoder, '
  'as in tome:r=13.',
)
_VIDEOS = flags.DEFINE_integer(
  'videos', 128, 'Test videos to measure a MosaicQA model on.', lower_bound=1
)
_COUNTED = 4  # Windows that saturated inputs are counted in.
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the results.')


def main(argv: Sequence[str]) -> int | None:
  """Loads, measures, prints and writes; or plans that."""
  del argv
  if planning.asked():
    return planning.run(_planned(), 'experiments.evaluate')
  config = bootstrap.BootstrapConfig(block=_BLOCK.value, seed=_SEED.value)
  kv_cache = registry.parse(_KV_CACHE.value) if _KV_CACHE.value else None
  if training_files.is_complete(_MODEL.value):
    _evaluate_mosaic(kv_cache)
    return None
  mesh = mesh_lib.choose(_MESH.value)
  model = models.load(_MODEL.value, _DTYPE.value, mesh)
  model = encoder_reduction.apply(model, *_TOKEN_REDUCER.value)
  reference = None
  if _REFERENCE.value is not None:
    reference = models.load(_REFERENCE.value, _DTYPE.value, mesh)
  choice = families.Choice(
    source=_DATA.value or '',
    samples=_SAMPLES.value,
    length=_WINDOW.value or 0,
    image_size=_IMAGE_SIZE.value,
    tokens=_TOKENS.value,
    bos=_BOS.value,
  )
  data = families.evaluation_data(model, choice)
  rows = families.of(model).compare(
    reference,
    model,
    data,
    config=config,
    mesh=mesh,
    progress=Progress(),
    **_cached(model, kv_cache),
  )
  if kv_cache is not None:
    rows = (*rows[:-1], _with_bits(rows[-1], model, kv_cache))
  if model.family == 'decoder' and saturation.has_steps(model.variables):
    opened, tokens = models.open_model(_MODEL.value), data.tokens[:_COUNTED]
    more = saturation.metrics(opened, tokens)
    rows = (*rows[:-1], _with(rows[-1], more))
  if _PASSKEY.value:
    measured = [m for m in (reference, model) if m]
    rows = _with_passkeys(rows, measured, kv_cache)
  results.print_table(rows)
  if _OUTPUT.value is not None and jax.process_index() == 0:
    run = results.run_info(cli.resolved_flags())
    results.save(_OUTPUT.value, results.Result(run=run, rows=rows))
    print(f'results: {_OUTPUT.value}')
  return None


def _evaluate_mosaic(kv_cache: Any) -> None:
  """The rows of a MosaicQA model, with all tokens and with each reducer."""
  trained = training.load(_MODEL.value)
  rows = token_reduction.compare(
    trained, _TOKEN_REDUCER.value, _VIDEOS.value, kv_cache
  )
  results.print_table(rows)
  if _OUTPUT.value is None or jax.process_index() != 0:
    return
  run = results.run_info(cli.resolved_flags())
  results.save(_OUTPUT.value, results.Result(run=run, rows=rows))
  for text in _TOKEN_REDUCER.value:
    method = token_reduction.parse(text, trained)
    token_pictures.save(
      pathlib.Path(_OUTPUT.value).parent,
      text,
      token_reduction.picture(trained, method),
    )
  print(f'results: {_OUTPUT.value}')


def _planned() -> plan_job.Job:
  """What --plan plans: windows scored without a cache."""
  window = _WINDOW.value or 2048
  return plan_job.Job(
    model=_MODEL.value,
    label='as it is stored',
    transform=None,
    settings=plan.Settings(samples=1, length=window),
    calibrates=False,
    evaluates='alone' if _REFERENCE.value is None else 'compared',
    decodes=False,
    window=window,
    tokens=_TOKENS.value,
    dtype=_DTYPE.value,
    mesh=_MESH.value,
  )


def _cached(model, kv_cache) -> dict[str, Any]:
  """What `compare` is told of the cache; nothing where there is none."""
  if kv_cache is None:
    return {}
  if model.family != 'decoder':
    raise NotImplementedError(
      f'--kv_cache={_KV_CACHE.value} with {model.name}, a {model.family} '
      'model; caches are of decoders. Leave the flag out.'
    )
  return {'kv_cache': kv_cache, 'kv_chunk': _KV_CHUNK.value}


def _with_bits(row, model, kv_cache) -> results.Row:
  """The row with the bits of a cache of one window, all of it counted."""
  config, window = model.config, _WINDOW.value or 2048
  cache = jax.eval_shape(
    lambda: kv_cache.init(
      interface.CacheShape(
        batch=1,
        capacity=window,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=jnp.dtype(model.module.dtype),
        window=config.window if all(config.sliding or [False]) else None,
        heads=config.num_heads,
        rope=config.rope(config.kind(0)),
      )
    )
  )
  metric = results.Metric(
    name='bits per key or value',
    value=interface.bits_per_element(cache),
    conventions={'tokens': window, 'counted': 'scales, window, everything'},
  )
  return _with(row, (metric,))


def _with_passkeys(rows, measured, kv_cache) -> tuple[results.Row, ...]:
  """The rows with the retrieval of their models behind."""
  try:
    lengths = [int(text) for text in _PASSKEY.value]
  except ValueError as e:
    raise ValueError(
      f'--passkey={",".join(_PASSKEY.value)}; whole numbers of tokens are '
      'needed, as in --passkey=512,1024.'
    ) from e
  caches = [None] * (len(measured) - 1) + [kv_cache]
  return tuple(
    _with(row, passkey.metrics(model, lengths, cache))
    for row, model, cache in zip(rows, measured, caches, strict=True)
  )


def _with(row: results.Row, more: tuple[results.Metric, ...]) -> results.Row:
  return dataclasses.replace(row, metrics=(*row.metrics, *more))


class Progress:
  """Windows done and the time left, on one line of stderr."""

  def __init__(self):
    self._start = time.monotonic()

  def __call__(self, done: int, num: int) -> None:
    if jax.process_index() != 0:
      return
    left = (time.monotonic() - self._start) / done * (num - done)
    live = sys.stderr.isatty()
    text = f'evaluating: window {done}/{num}, {left:.0f} s left'
    end = '' if live and done < num else '\n'
    print(
      f'\r{text:<60}' if live else text, end=end, file=sys.stderr, flush=True
    )


if __name__ == '__main__':
  cli.run(main)

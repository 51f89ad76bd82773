"""Passkey retrieval as metrics of a results table."""

import math
from collections.abc import Sequence

import models
from experiments import adapters, generation, results
from jaxq.eval import passkey
from jaxq.kvcache import interface

_Z = 1.959964  # 95 %.


def metrics(
  model: models.Model,
  lengths: Sequence[int],
  kv_cache: interface.CacheConfig | None = None,
) -> tuple[results.Metric, ...]:
  """One metric per prompt length: the share found, with a Wilson interval.

  Raises:
    ValueError: a length that is too short or too long.
    NotImplementedError: the model is no language model.
  """
  if model.family != 'decoder':
    raise NotImplementedError(
      f'--passkey with {model.name}: it asks for text; a decoder is needed. '
      'Leave the flag out.'
    )
  config = passkey.PasskeyConfig(lengths=tuple(lengths))
  variables = model.variables
  if kv_cache is not None:
    variables = generation.prepared(model, kv_cache)
  out = passkey.retrieval(
    adapters.language_model(model.module, kv_cache),
    variables,
    lambda text: model.tokenizer.encode(text).ids,
    model.tokenizer.decode,
    config,
  )
  made = []
  for length, found in zip(config.lengths, out.found, strict=True):
    low, high = wilson(int(found.sum()), found.size)
    made.append(
      results.Metric(
        name=f'passkey at {length}',
        value=float(found.mean()),
        low=low,
        high=high,
        conventions={
          'depths': len(config.depths),
          'trials': config.trials,
          'found': 'first number of the greedy text',
        },
      )
    )
  return tuple(made)


def wilson(hits: int, num: int) -> tuple[float, float]:
  """The 95 % interval of a share (Wilson, 1927); honest at 0 and at num."""
  p, z2 = hits / num, _Z**2
  middle = (p + z2 / (2 * num)) / (1 + z2 / num)
  half = _Z / (1 + z2 / num) * math.sqrt(p * (1 - p) / num + z2 / (4 * num**2))
  return max(0.0, middle - half), min(1.0, middle + half)

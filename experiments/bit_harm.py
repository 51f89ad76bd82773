"""What storing one token in few bits does to the text behind it.

  D_tb = mean KL(p || p_b) over the m tokens behind token t

where p is the model's with everything in full precision and p_b with the keys
and values of token t, in all layers, rounded to b bits. One prefill of a text
serves many tokens: each is a row of a batch that holds the text up to it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from jaxq.eval import perplexity
from jaxq.kvcache import (
  bit_controller,
  contiguous,
  dont_waste_bits,
  stores,
)
from models import decoder

_RECORDS = dont_waste_bits.DontWasteBitsConfig(controller='random')


def measure(
  model: models.Model,
  tokens: np.ndarray,
  *,
  samples: int,
  horizon: int,
  rows: int = 8,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Features and harm of random tokens of texts.

  Args:
    model: a decoder.
    tokens: (texts, T) int32.
    samples: of each text.
    horizon: m.
    rows: tokens at a time.
    seed: of the draw.

  Returns:
    (N, 4) and (N, 3), at 2, 4 and 8 bits; N = texts * samples.

  Raises:
    ValueError: texts too short for the horizon.
  """
  T = tokens.shape[1]
  if horizon + samples >= T:
    raise ValueError(
      f'bit_harm: horizon={horizon} and samples={samples} in texts of {T} '
      'tokens; there must be more. Use longer texts.'
    )
  rng = np.random.default_rng(seed)
  read = jax.jit(functools.partial(_read, model))
  harm = jax.jit(functools.partial(_harm, model), static_argnums=4)
  features: list[Any] = []
  found: list[Any] = []
  for text in tokens:
    own, k, v = read(model.variables, jnp.asarray(text)[None])
    chosen = rng.choice(np.arange(1, T - horizon), samples, replace=False)
    for start in range(0, samples, rows):
      part = chosen[start : start + rows]
      at = np.resize(part, rows)  # A last batch repeats some.
      made = harm(
        model.variables, jnp.asarray(text), (k, v), jnp.asarray(at), horizon
      )
      found.append(np.asarray(made)[: len(part)])
    features.append(np.asarray(own)[chosen])
  return np.concatenate(features), np.concatenate(found)


def _read(model, variables, tokens):
  """tokens (1, T) -> features (T, 4); keys and values, one array a run."""
  T = tokens.shape[1]
  positions = jnp.arange(T, dtype=jnp.int32)[None]
  caches = decoder.init_caches(
    model.config, model.module.runs, 1, T, model.module.dtype, _RECORDS
  )
  x, caches = model.module.apply(
    variables, tokens, positions, caches, method='hidden'
  )

  def said(x):
    logits = model.module.apply(variables, x, method='logits')
    return bit_controller.of_logits(logits)

  entropy, confidence = perplexity.in_chunks(said, perplexity.CHUNK, x)
  none = jnp.zeros((1,), jnp.int32)
  rare, _ = bit_controller.rarity(jnp.zeros_like(tokens), tokens, none, none)
  variance = caches[-1].aside.variance[-1]
  features = jnp.stack([entropy, rare, variance, confidence], axis=-1)[0]
  k, v = ([getattr(c.aside, name) for c in caches] for name in 'kv')
  return features, k, v


def _harm(model, variables, text, stored, at, horizon):
  """(rows, 3) of the tokens at (rows,)."""
  rows = at.shape[0]
  own = at[:, None] + 1 + jnp.arange(horizon, dtype=jnp.int32)[None]
  tokens = jnp.take(text, own)

  def log_p(bits):
    caches = tuple(
      _cache(k, v, at, bits, text.shape[0] + horizon)
      for k, v in zip(*stored, strict=True)
    )
    x, _ = model.module.apply(variables, tokens, own, caches, method='hidden')
    logits = model.module.apply(variables, x, method='logits')
    return jax.nn.log_softmax(logits)

  reference = log_p(None)
  out = []
  for bits in bit_controller.CLASSES[:-1]:
    kl = jnp.sum(jnp.exp(reference) * (reference - log_p(bits)), axis=-1)
    out.append(jnp.mean(kl, axis=1))
  assert out[0].shape == (rows,)
  return jnp.stack(out, axis=-1)


def _cache(k, v, at, bits, capacity):
  """Layers' k, v (L, 1, T, Hkv, D) for rows that end with token `at`."""
  L, _, T, Hkv, D = k.shape
  rows = at.shape[0]

  def rounded(x):
    x = jnp.broadcast_to(x, (L, rows, T, Hkv, D))
    if bits is None:
      return x
    one = jnp.take_along_axis(x, at[None, :, None, None, None], axis=2)
    one = one.reshape(L * rows, 1, Hkv, D)
    grid = stores.Grid(bits=bits, scale_dtype='bfloat16')
    codes, scale, offset = stores.quantize(one, grid)
    assert offset is not None
    one = codes.astype(jnp.float32) * scale.astype(jnp.float32)
    one = (one + offset.astype(jnp.float32)).reshape(L, rows, 1, Hkv, D)
    here = jnp.arange(T)[None] == at[:, None]
    return jnp.where(here[None, :, :, None, None], one.astype(x.dtype), x)

  def fill(x):
    x = rounded(x)
    return jnp.pad(x, [(0, 0)] * 2 + [(0, capacity - T)] + [(0, 0)] * 2)

  length = jnp.broadcast_to(at + 1, (L, rows)).astype(jnp.int32)
  return contiguous.ContiguousCache(k=fill(k), v=fill(v), length=length)

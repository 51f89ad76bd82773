"""A `models.Model` as the functions that jaxq.eval and jaxq.decode take.

jaxq knows no models: it takes functions. They are cached by module, so that
equal models (the same shape, the same runs of blocks) share one compilation.
"""

import functools

import jax
import jax.numpy as jnp

from jaxq.decode import autoregressive
from jaxq.eval import perplexity
from jaxq.kvcache import bit_controller, dont_waste_bits, interface
from models import decoder


@functools.cache
def scorer(module: decoder.Decoder) -> perplexity.Scorer:
  """For jaxq.eval: (variables, tokens) -> hidden; (variables, x) -> logits."""
  return perplexity.Scorer(
    score_fn=lambda variables, tokens: _hidden(module, variables, tokens)[0],
    head_fn=lambda variables, x: _logits(module, variables, x),
  )


@functools.cache
def cached_scorer(
  module: decoder.Decoder, kv_cache: interface.CacheConfig, chunk: int
) -> perplexity.Scorer:
  """For jaxq.eval: scores windows as a model with this cache reads them.

  A window goes through the model `chunk` tokens at a time, from an empty cache.
  A token sees those of its own chunk as they are, and those of earlier chunks
  as the cache holds them. A cache that compresses in blocks of `chunk` tokens
  then does what it does token by token.
  """
  if chunk < 1:
    raise ValueError(
      f'kv_chunk={chunk}; it must be at least 1. 128 is the default.'
    )

  def score(variables, tokens):
    B, T = tokens.shape
    count = -(-T // chunk)
    positions = jnp.arange(count * chunk, dtype=jnp.int32)
    positions = jnp.where(positions < T, positions, -1)
    tokens = jnp.pad(tokens, ((0, 0), (0, count * chunk - T)))
    caches = decoder.init_caches(
      module.config, module.runs, B, T, module.dtype, kv_cache
    )

    def body(caches, part):
      own, at = part
      x, caches = _hidden(
        module, variables, own, jnp.broadcast_to(at[None], own.shape), caches
      )
      return caches, x

    parts = (
      tokens.reshape(B, count, chunk).swapaxes(0, 1),
      positions.reshape(count, chunk),
    )
    _, x = jax.lax.scan(body, caches, parts)  # (count, B, chunk, C)
    return x.swapaxes(0, 1).reshape(B, count * chunk, -1)[:, :T]

  return perplexity.Scorer(
    score_fn=score, head_fn=functools.partial(_logits, module)
  )


@functools.cache
def language_model(
  module: decoder.Decoder, kv_cache: interface.CacheConfig | None = None
) -> autoregressive.LanguageModel:
  """For jaxq.decode, with caches in the module's dtype; None: contiguous."""
  config = module.config

  def init_caches(batch, capacity):
    return decoder.init_caches(
      config, module.runs, batch, capacity, module.dtype, kv_cache
    )

  return autoregressive.LanguageModel(
    forward=functools.partial(_hidden, module),
    head=functools.partial(_logits, module),
    init_caches=init_caches,
    max_position=config.max_position,
    stop_ids=config.eos_token_ids,
  )


def _hidden(module, variables, tokens, positions=None, caches=None):
  x, caches = module.apply(
    variables, tokens, positions, caches, method='hidden'
  )
  if getattr(caches and caches[-1], 'aside', None) is not None:

    def said(x):
      return bit_controller.of_logits(_logits(module, variables, x))

    caches = dont_waste_bits.decide(
      caches, tokens, *perplexity.in_chunks(said, perplexity.CHUNK, x)
    )
  return x, caches


def _logits(module, variables, x):
  return module.apply(variables, x, method='logits')

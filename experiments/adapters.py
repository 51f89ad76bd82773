"""A `models.Model` as the functions that jaxq.eval and jaxq.decode take.

jaxq knows no models: it takes functions. They are cached by module, so that
equal models (the same shape, the same runs of blocks) share one compilation.
"""

import functools

from jaxq.decode import autoregressive
from jaxq.eval import perplexity
from models import decoder


@functools.cache
def scorer(module: decoder.Decoder) -> perplexity.Scorer:
  """For jaxq.eval: (variables, tokens) -> hidden; (variables, x) -> logits."""
  return perplexity.Scorer(
    score_fn=lambda variables, tokens: _hidden(module, variables, tokens)[0],
    head_fn=lambda variables, x: _logits(module, variables, x),
  )


@functools.cache
def language_model(module: decoder.Decoder) -> autoregressive.LanguageModel:
  """For jaxq.decode, with caches in the module's dtype."""
  config = module.config

  def init_caches(batch, capacity):
    return decoder.init_caches(
      config, module.runs, batch, capacity, module.dtype
    )

  return autoregressive.LanguageModel(
    forward=functools.partial(_hidden, module),
    head=functools.partial(_logits, module),
    init_caches=init_caches,
    max_position=config.max_position,
    stop_ids=config.eos_token_ids,
  )


def _hidden(module, variables, tokens, positions=None, caches=None):
  return module.apply(variables, tokens, positions, caches, method='hidden')


def _logits(module, variables, x):
  return module.apply(variables, x, method='logits')

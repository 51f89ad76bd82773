"""How far a model moved from its reference, token by token.

  kl_t    = sum_v p_t(v) (log p_t(v) - log q_t(v)),   p reference, q model
  agree_t = argmax p_t == argmax q_t

Both say what perplexity cannot: a model may lose nothing on average and still
answer differently. They need no labels and their noise is far smaller. One
pass gives them together with the NLL of both models, so that a comparison
runs each model once and compiles once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.eval import batches, perplexity

Array = np.ndarray | jax.Array


class Divergence(NamedTuple):
  """Per predicted token, each (num, T-1) float32.

  kl: in nats, KL(reference || model).
  agree: 1.0 where both models' most likely token is the same (of equal
    logits the lowest index), else 0.0.
  reference_nll, nll: -log p of the true token under each.
  """

  kl: Array
  agree: Array
  reference_nll: Array
  nll: Array


def per_token(
  reference: perplexity.Scorer,
  reference_variables: Any,
  model: perplexity.Scorer,
  variables: Any,
  tokens: np.ndarray,
  *,
  chunk: int = perplexity.CHUNK,
  mesh: jax.sharding.Mesh | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Divergence:
  """Compares two models with one vocabulary on the same windows.

  Args:
    reference, reference_variables: the model whose predictions count as true.
    model, variables: the one compared with it.
    tokens: (num, T) int32.
    chunk: tokens of a window whose logits exist at a time, twice.
    mesh: None, or windows are shared out over its axis 'data'.
    progress: called with (windows done, num).

  Returns:
    A Divergence.

  Raises:
    ValueError: the vocabularies differ in size.
  """
  reference_variables = batches.replicate(reference_variables, mesh)
  variables = batches.replicate(variables, mesh)

  def function(batch):
    return _compare(
      reference, model, chunk, reference_variables, variables, batch
    )

  return batches.run(function, tokens, mesh=mesh, progress=progress)


def lower(
  reference: perplexity.Scorer,
  reference_variables: Any,
  model: perplexity.Scorer,
  variables: Any,
  tokens: Any,
  *,
  chunk: int = perplexity.CHUNK,
) -> jax.stages.Lowered:
  """Lowers the function that per_token runs on each batch; runs nothing.

  Args:
    reference, model, chunk: as for per_token.
    reference_variables, variables, tokens: arrays, or shapes with shardings;
      tokens (B, T) int32.
  """
  return _compare.lower(
    reference, model, chunk, reference_variables, variables, tokens
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compare(reference, model, chunk, reference_variables, variables, tokens):
  with jax.named_scope('reference_body'):
    x = reference.score_fn(reference_variables, tokens)[:, :-1]  # (B, T-1, C)
  with jax.named_scope('body'):
    y = model.score_fn(variables, tokens)[:, :-1]

  def compare(x, y, targets):
    with jax.named_scope('heads'):
      p = perplexity.log_probs(reference.head_fn(reference_variables, x))
      q = perplexity.log_probs(model.head_fn(variables, y))
    if p.shape != q.shape:
      raise ValueError(
        f'divergence: the models have {p.shape[-1]} and {q.shape[-1]} tokens; '
        'only models with one vocabulary can be compared. Leave the reference '
        'out.'
      )
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    agree = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    return Divergence(
      kl=jnp.maximum(kl, 0.0),  # The float32 sum can end just below zero.
      agree=agree.astype(jnp.float32),
      reference_nll=perplexity.nll_of(p, targets),
      nll=perplexity.nll_of(q, targets),
    )

  return perplexity.in_chunks(compare, chunk, x, y, tokens[:, 1:])

"""How a speech model moved from its reference, token by token of a transcript.

The decoder is fed what was said (teacher forcing), and its predictions of the
words and of the end are compared as in jaxq.eval.divergence: KL, agreement and
NLL per token. The prompt and the padding are not counted.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.eval import divergence, perplexity

LogitsFn = Callable[[Any, jax.Array, jax.Array], jax.Array]


def per_token(
  reference: LogitsFn,
  reference_variables: Any,
  model: LogitsFn,
  variables: Any,
  batch: Mapping[str, np.ndarray],
  *,
  prompt: int,
  batch_size: int = 4,
) -> divergence.Divergence:
  """Compares two models of one vocabulary on the same clips.

  Args:
    reference, model: (variables, features, tokens (B, T)) -> logits (B, T, V);
      hashable, equal ones share compilations.
    reference_variables, variables: their first arguments.
    batch: features (num, F, mels), tokens (num, T) int32, mask (num, T) bool,
      False for padding.
    prompt: tokens of the prompt, which are given and not predicted.
    batch_size: clips at a time.

  Returns:
    A Divergence of flat arrays (N,), a value per predicted token.
  """
  num, found = len(batch['tokens']), []
  rows = np.arange(-(-num // batch_size) * batch_size) % num  # Whole batches.
  for start in range(0, num, batch_size):
    chosen = rows[start : start + batch_size]
    part = {name: np.asarray(a)[chosen] for name, a in batch.items()}
    got = _compare(
      reference, model, reference_variables, variables, part['features'],
      part['tokens'],
    )  # fmt: skip
    counted = part['mask'][:, 1:].copy()
    counted[:, : prompt - 1] = False
    counted[num - start :] = False  # Repeated to fill the batch.
    found.append([np.asarray(a)[counted] for a in got])
  return divergence.Divergence(*map(np.concatenate, zip(*found, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
  reference, model, reference_variables, variables, features, tokens
):
  targets = tokens[:, 1:]
  p = reference(reference_variables, features, tokens)[:, :-1]
  q = model(variables, features, tokens)[:, :-1]
  log_p, log_q = (jax.nn.log_softmax(x, axis=-1) for x in (p, q))
  kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
  agree = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
  return divergence.Divergence(
    kl=jnp.maximum(kl, 0.0),
    agree=agree.astype(jnp.float32),
    reference_nll=perplexity.nll_of(log_p, targets),
    nll=perplexity.nll_of(log_q, targets),
  )

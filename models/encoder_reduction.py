"""Fewer tokens from layer to layer of an encoder.

  x = x + attention(norm(x))          a key's score + log of its size
  x, size = reduce(x, keys, size)     between attention and MLP
  x = x + mlp(norm(x))

The place and the proportional attention are ToMe's (Bolya et al., 2022, arXiv
2210.09461): a merged token counts as often as the tokens in it, so that N
tokens of which pairs are equal give what their N / 2 means give. Any reducer
with a schedule (jaxq.tokens.schedule) works here.

Layers have different numbers of tokens, so that they are not scanned but
unrolled: the parameters stay stacked and a layer's are cut out of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.tokens import interface, primitives, registry, schedule
from pallas_kernels.attention_received import api as attention_received

Params = Mapping[str, Any]


@flax.struct.dataclass
class Encoded:
  """x (B, K, C), size (B, K) float32, and the slot of each of the T tokens of
  the first layer, assignment (B, T) int32; -1: dropped.
  """

  x: jax.Array
  size: jax.Array
  assignment: jax.Array


def check(config: Any) -> None:
  """Raises NotImplementedError unless a reducer works inside an encoder."""
  if config is None or isinstance(config, schedule.InEncoder):
    return
  known = sorted(
    name
    for name, reducer in registry.REDUCERS.items()
    if isinstance(reducer, schedule.InEncoder)
  )
  raise NotImplementedError(
    f'{type(config).__name__} inside an encoder: it does not say how many '
    f'tokens each layer leaves; allowed {known}. Use it on the features behind '
    'the encoder.'
  )


def layers_of(
  runs: Sequence[nn.Module], lengths: Sequence[int]
) -> list[Params]:
  """The variables of each block of some scanned, bound runs of blocks."""
  return [
    jax.tree.map(lambda leaf: leaf[i], dict(run.variables))  # noqa: B023
    for run, length in zip(runs, lengths, strict=True)
    for i in range(length)
  ]


def run(
  block: nn.Module,
  layers: Sequence[Params],
  x: jax.Array,
  config: Any,
  *,
  special: int = 0,
) -> Encoded:
  """The blocks of an encoder, with a reducer in each.

  Args:
    block: unbound; `attend(x, bias)` gives the stream behind the attention with
      the queries and keys (B, T, H, D), `feed(x)` the stream behind the MLP.
    layers: variables of each block.
    x: (B, T, C), without padding.
    config: a reducer with a schedule. One that draws does so alike for the same
      layer of every call.
    special: leading tokens that are never merged nor dropped.

  Raises:
    NotImplementedError: as `check`. ValueError: as the schedule.
  """
  check(config)
  B, T, _ = x.shape
  size = jnp.ones((B, T), jnp.float32)
  assignment = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  slots = config.schedule(len(layers), T, special)
  for i, (variables, left) in enumerate(zip(layers, slots, strict=True)):
    bias = jnp.log(size) if config.proportional and left < T else None
    attended: Any = block.apply(variables, x, bias, method='attend')
    x, q, k = attended
    if left < x.shape[1]:
      reduced = _reduce(config, x, q, k, size, left, special, i)
      x, size = reduced.tokens, reduced.size
      assignment = primitives.gather(reduced.assignment + 1, assignment) - 1
    fed: Any = block.apply(variables, x, method='feed')
    x = fed
  return Encoded(x=x, size=size, assignment=assignment)


def _reduce(
  config: Any,
  x: jax.Array,
  q: jax.Array,
  k: jax.Array,
  size: jax.Array,
  left: int,
  special: int,
  layer: int,
) -> interface.Reduced:
  """Reduces x (B, T, C) to `left` slots by q, k (B, T, H, D)."""
  given: dict[str, Any] = {}
  if config.traits.scores:
    given['scores'] = class_scores(q, k) if special else received_scores(q, k)
  if config.traits.rng:
    given['rng'] = jax.random.key(layer)
  ts = interface.token_set(
    x, size=size, keys=jnp.mean(k, axis=2), special=special
  )
  return config.reduce(ts, budget=interface.Budget(k_max=left), **given)


def class_scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """Attention (B, T) of the first token, mean over heads, of q, k (B, T, H, D).

  float32; bidirectional, without padding.
  """
  first = q[:, 0].astype(jnp.float32) * q.shape[-1] ** -0.5
  logits = jnp.einsum('bhd,bthd->bht', first, k.astype(jnp.float32))
  return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1)


def received_scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """Attention (B, T) each token receives, mean over rows and heads."""
  lse = attention_received.row_logsumexp(q, k)
  received = attention_received.attention_received(q, k, lse)  # (B, H, T)
  return jnp.mean(received, axis=1) / q.shape[1]

"""What the reducers' training parts share: a loss, a step, rates by path.

A method gives its parameters as a pytree and its loss as a pure function
`loss(params, *batch) -> (value, aux)`; the model behind the reducer is an
argument of the loss. `step` makes an update of it for any optax optimizer, and
`rates` trains parts of the tree at rates of their own, or not at all.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Loss = Callable[..., tuple[jax.Array, Any]]


def cross_entropy(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> jax.Array:
  """Mean cross-entropy of the labels where mask is True; 0 where nowhere.

  Args:
    logits: (B, T, V).
    labels: (B, T) int32; any value where the mask is False.
    mask: (B, T) bool.

  Returns:
    () float32.
  """
  labels = jnp.where(mask, labels, 0)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )
  total = jnp.sum(jnp.where(mask, losses, 0.0))
  return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def next_token_loss(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> jax.Array:
  """Mean cross-entropy of what follows each slot.

  Args:
    logits: (B, T, V), in order of the slots.
    labels: (B, T) int32, the token of each slot; negative ones are not asked.
    mask: (B, T) bool, slots in use.

  Returns:
    () float32.
  """
  asked = (labels >= 0) & mask
  return cross_entropy(logits[:, :-1], labels[:, 1:], asked[:, 1:])


def step(loss: Loss, optimizer: optax.GradientTransformation) -> Callable:
  """update(params, state, *batch) -> (params, state, value, aux); jit it.

  Args:
    loss: (params, *batch) -> (value, aux).
    optimizer: its state begins as `optimizer.init(params)`.
  """

  def update(params, state, *batch):
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
    with jax.numpy_dtype_promotion('standard'):  # Its powers need that.
      updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, aux

  return update


def rates(
  rules: Sequence[tuple[str, float]],
  make: Callable[[float], optax.GradientTransformation] = optax.adamw,
) -> optax.GradientTransformation:
  """An optimizer with a rate per part of the tree.

  Args:
    rules: (regex, rate); the first whose regex is found in a leaf's path
      ('decoder/layers/...') gives its rate, 0 freezes. Every leaf needs one:
      end with ('', rate).
    make: rate -> optimizer.
  """

  def label(path, _):
    name = '/'.join(str(getattr(k, 'key', getattr(k, 'name', k))) for k in path)
    for i, (pattern, _rate) in enumerate(rules):
      if re.search(pattern, name):
        return str(i)
    raise ValueError(
      f'rates: no rule for the parameter {name!r}; the patterns are '
      f"{[pattern for pattern, _ in rules]}. End the rules with ('', rate)."
    )

  return optax.multi_transform(
    {
      str(i): make(rate) if rate else optax.set_to_zero()
      for i, (_, rate) in enumerate(rules)
    },
    lambda params: jax.tree_util.tree_map_with_path(label, params),
  )

"""Taps: named places in a model where calibration takes its statistics.

A tap is the identity. When the `taps` collection holds observer states at its
path, it also updates them with the value that passes, inside jit:

  variables = {'params': ..., 'taps': {'mlp': {'in': {'absmax': state}}}}
  y, updated = module.apply(variables, x, mutable=['taps'])

A state is any pytree with `update(x) -> state` (jaxq.calibrate.observers). No
state at the path means no work: XLA sees nothing of the tap.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  """Returns x; updates the observer states at `name`, if there are any.

  Where the collection 'tapped' is mutable, x itself is put there.

  Args:
    module: the linen module in whose scope the tap lies.
    name: the tap's name; its path is the module's path plus this name.
    x: any shape; observers treat the last axis as channels.
  """
  if module.is_mutable_collection('tapped'):
    module.put_variable('tapped', name, x)
  if module.has_variable('taps', name):
    states: Any = module.get_variable('taps', name)
    module.put_variable(
      'taps', name, {k: state.update(x) for k, state in states.items()}
    )
  return x


def get_path(tree: Mapping[str, Any], path: str) -> Any:
  """The node at a '/'-separated path of a nested dict; None if absent."""
  node: Any = tree
  for key in path.split('/'):
    if not isinstance(node, Mapping) or key not in node:
      return None
    node = node[key]
  return node


def set_path(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
  """A copy of a nested dict with `value` at a '/'-separated path."""
  key, _, rest = path.partition('/')
  copy = dict(tree)
  copy[key] = set_path(copy.get(key, {}), rest, value) if rest else value
  return copy


def leaves(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple]:
  """Yields (path, node) of every node of a nested dict that is not a dict."""
  for key in sorted(tree):
    path = f'{prefix}/{key}' if prefix else key
    if isinstance(tree[key], Mapping):
      yield from leaves(tree[key], path)
    else:
      yield path, tree[key]

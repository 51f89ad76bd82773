"""One layer of a stack of caches, read by a kernel where the stack lies.

A scan over layers slices what it scans: a kernel would be handed a copy of the
layer's tokens, which costs twice as much traffic as reading them does. So the
keys and values of a run are handed to all its layers whole, beside a layer's
number:

  own, whole = split(cache)                     outside the scan
  cache = own.joined(whole, None)               inside, of one layer

The cache inside has stores of `OfLayer` arrays, which have the shape of a
layer. The attention kernel takes the stack and the row in it where the layer
begins (`rows`, `first_row`); the plain path takes the layer out, as the scan
would have (`cut`). Writing is outside, to the whole stack.
"""

import dataclasses
from typing import Any

import flax.struct
import jax

from jaxq.kvcache import stores


@flax.struct.dataclass
class OfLayer:
  """stack[layer], not taken out: stack (L, B, S, Hkv, n), layer () int32."""

  stack: jax.Array
  layer: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the layer."""
    return self.stack.shape[1:]

  @property
  def dtype(self) -> Any:
    """Of the stack."""
    return self.stack.dtype


@flax.struct.dataclass
class Whole:
  """The stores of all layers of a run, stacked."""

  k: Any
  v: Any

  def ahead(self, T: int) -> None:
    """No layer asks for anything of the next (interface.split)."""
    del T


@flax.struct.dataclass
class Own:
  """What of a cache is the layer's own. cache: without stores. layer: ()."""

  cache: Any
  layer: jax.Array

  def joined(self, whole: Whole, ahead: None) -> Any:
    """The cache of this layer."""
    del ahead
    k, v = (of_layer(x, self.layer) for x in (whole.k, whole.v))
    return dataclasses.replace(self.cache, k=k, v=v)


def split(cache: Any) -> tuple[Own, Whole]:
  """A stacked cache with stores, or arrays, k and v."""
  own = dataclasses.replace(cache, k=None, v=None)
  layer = jax.lax.iota('int32', cache.length.shape[0])
  return Own(cache=own, layer=layer), Whole(k=cache.k, v=cache.v)


def of_layer(store: Any, layer: jax.Array) -> Any:
  """A store, or an array (L, B, S, Hkv, n), as one layer of it has it.

  The arrays of stores that no kernel reads are taken out at once.
  """
  made = jax.tree.map(lambda a: OfLayer(a, layer), store)
  kinds = jax.Array, stores.FloatStore, stores.IntStore, stores.NormedStore
  return made if isinstance(store, kinds) else cut(made)


def cut(store: Any) -> Any:
  """A store with the layer's own arrays; one that is of no stack as it is."""
  take = lambda a: jax.lax.dynamic_index_in_dim(a.stack, a.layer, 0, False)
  return _mapped(take, store)


def rows(store: Any) -> Any:
  """A store with the layers of its stack as rows, (L B, S, Hkv, n)."""
  return _mapped(lambda a: a.stack.reshape(-1, *a.shape[1:]), store)


def first_row(store: Any) -> jax.Array | None:
  """() int32, the row where the layer begins; None: it is of no stack."""
  for leaf in jax.tree.leaves(store, is_leaf=_is_of_layer):
    if _is_of_layer(leaf):
      first: jax.Array = leaf.layer * leaf.shape[0]
      return first
  return None


def _is_of_layer(a: Any) -> bool:
  return isinstance(a, OfLayer)


def _mapped(f: Any, store: Any) -> Any:
  """f of all that is OfLayer."""
  return jax.tree.map(
    lambda a: f(a) if _is_of_layer(a) else a, store, is_leaf=_is_of_layer
  )

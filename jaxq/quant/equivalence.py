"""Moving scales and shifts across an equivalence site, for all methods."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.nn import blocks, taps

Params = Mapping[str, Any]


def divide_producer(params: Params, site: blocks.Site, s: jax.Array) -> Params:
  """Divides the producer's output channels by s, multiplies consumers' rows.

  The block computes the same function. All kernels must still be float.

  Args:
    params: the block's parameters.
    site: where.
    s: (channels of the producer,) positive.
  """
  producer = dict(taps.get_path(params, site.producer))
  for name, leaf in producer.items():  # kernel (K, N); scale, bias (N,).
    producer[name] = leaf / s.reshape((1,) * (leaf.ndim - 1) + (-1,))
  params = taps.set_path(params, site.producer, producer)
  rows = site.expand(s)[:, None]  # (K, 1)
  for path in site.consumers:
    kernel = blocks.kernel_of(params, path)
    params = taps.set_path(params, f'{path}/kernel', kernel * rows)
  for path in site.shortcuts:
    scale = taps.get_path(params, f'{path}/scale')
    params = taps.set_path(params, f'{path}/scale', scale * s)
  return params


def shift_producer(params: Params, site: blocks.Site, z: jax.Array) -> Params:
  """Takes z from the producer's output and gives it back behind it.

  The producer (a norm) gets bias - z and every consumer bias + z @ kernel; the
  biases are made where there were none. The block computes the same function.

  Args:
    params: the block's parameters; kernels float.
    site: where; its producer passes its channels on one to one.
    z: (channels of the producer,) float32.

  Raises:
    NotImplementedError: the producer is a linear whose output is not what the
      consumers read.
  """
  if blocks.kernel_of(params, site.producer) is not None:
    raise NotImplementedError(
      f'equivalence: a shift of the output of {site.producer}, a linear; only '
      'that of a norm reaches its consumers unchanged. Shift the sites of '
      'norms.'
    )
  params = _add(params, f'{site.producer}/bias', -z)
  for path in site.consumers:
    kernel = blocks.kernel_of(params, path)
    moved = jnp.matmul(z, kernel, precision=jax.lax.Precision.HIGHEST)
    params = _add(params, f'{path}/bias', moved)
  for path in site.shortcuts:
    scale = taps.get_path(params, f'{path}/scale')
    params = _add(params, f'{path}/bias', z * scale)
  return params


def _add(params: Params, path: str, value: jax.Array) -> dict[str, Any]:
  """Adds to a leaf, or puts it there."""
  leaf = taps.get_path(params, path)
  return taps.set_path(params, path, value if leaf is None else leaf + value)


def consumer_absmax(params: Params, site: blocks.Site) -> jax.Array:
  """(K,): largest |weight| of each consumer row over all consumers."""
  rows = [
    jnp.max(jnp.abs(blocks.kernel_of(params, path)), axis=1)
    for path in site.consumers
  ]
  return jnp.max(jnp.stack(rows), axis=0)

"""Moving scales across an equivalence site, shared by the methods that do."""

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
  return params


def consumer_absmax(params: Params, site: blocks.Site) -> jax.Array:
  """(K,): largest |weight| of each consumer row over all consumers."""
  rows = [
    jnp.max(jnp.abs(blocks.kernel_of(params, path)), axis=1)
    for path in site.consumers
  ]
  return jnp.max(jnp.stack(rows), axis=0)

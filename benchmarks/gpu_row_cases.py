"""Cases of norm_quantize and hadamard_quantize for benchmarks.gpu_kernels.

Nothing but x moves, so it is x that rotates. The peer does what a model does
without the kernel: it stores the norm, or the rotated rows, in bfloat16, and
quantizes what it reads back.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_peers
from pallas_kernels import hopper_rows
from pallas_kernels.hadamard_quantize import api as hadamard
from pallas_kernels.hadamard_quantize import arg_specs as hadamard_specs
from pallas_kernels.hadamard_quantize import base as hadamard_base
from pallas_kernels.norm_quantize import api as norm
from pallas_kernels.norm_quantize import arg_specs as norm_specs
from pallas_kernels.norm_quantize import base as norm_base

KERNEL = 'pallas_mosaic_gpu'
_WIDTH = 128  # The least that a rotation costs: a product with H of 128.


def cases() -> Iterator[dict[str, Any]]:
  """Fields of gpu_kernels.Case."""
  for name, (M, K) in norm_specs.SPECS.items():
    yield norm_case(name, M, K)
  for name, (M, K, h) in hadamard_specs.SPECS.items():
    yield hadamard_case(name, M, K, h)


def norm_case(name: str, M: int, K: int) -> dict[str, Any]:
  """RMSNorm of (M, K) bfloat16 to int8 by row."""

  def call(w, name):
    return norm.norm_quantize(w['x'], w['weight'], implementation=name)

  def peer(w):
    y = norm_base.normalize(w['x'], 'rms', 1e-5) * w['weight'][None]
    return gpu_peers.stored_then_quantized(y)

  def draw(key):
    x = jax.random.normal(key, (M, K), jnp.bfloat16)
    return {'x': x, 'weight': jax.random.uniform(key, (K,), minval=0.5)}

  served = K % 128 == 0
  return {
    **_fields(call, served, {'norm, then codes': peer}),
    'name': f'norm/{name}',
    'M': M,
    'K': K,
    'N': 0,
    'nbytes': 3 * M * K + 4 * M + 4 * K,
    'draw': draw,
    'rotated': 2 * M * K,
  }


def hadamard_case(name: str, M: int, K: int, h: int) -> dict[str, Any]:
  """Blocks of h channels of (M, K) bfloat16 rotated, to int8 by row."""

  def call(w, name):
    return hadamard.hadamard_quantize(w['x'], block=h, implementation=name)

  def peer(w):
    y = hadamard_base.transform(w['x'], h)
    return gpu_peers.stored_then_quantized(y)

  def draw(key):
    return {'x': jax.random.normal(key, (M, K), jnp.bfloat16)}

  served = K % 1024 == 0 and hopper_rows.LONGEST >= K
  return {
    **_fields(call, served, {'rotation, then codes': peer}),
    'name': f'hadamard/{name}',
    'M': M,
    'K': K,
    'N': min(h, _WIDTH),
    'nbytes': 3 * M * K + 4 * M,
    'draw': draw,
    'rotated': 2 * M * K,
  }


def _fields(call, served, peers) -> dict[str, Any]:
  """Forms, reference and values; forms read x from the set."""

  def form(name):
    return lambda _, w: call(w, name)

  names = {'chosen': None, 'xla': 'xla'} | ({KERNEL: KERNEL} if served else {})
  forms: dict[str, Any] = {k: form(v) for k, v in names.items()}
  forms |= {
    k: functools.partial(lambda peer, _, w: peer(w), v)
    for k, v in peers.items()
  }
  return {
    'kind': 'bfloat16',
    'forms': forms,
    'reference': form('xla'),
    'values': lambda y: y[0].astype(jnp.float32) * y[1],
  }

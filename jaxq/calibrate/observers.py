"""Observers: what a tap gathers, as pytrees updated inside jit.

An observer is made for one tap from the shape of what passes it and then
updated with each batch; the last axis is channels (K). All statistics are
float32. On a mesh the batch axis is sharded and the sums and maxima become
all-reduces over `data`; the states stay replicated.

A request is a function (shape, dtype) -> state, and a method asks for a dict
{tap path: {name: request}}.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

Request = Callable[[tuple[int, ...]], Any]


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # (tokens, K)


@flax.struct.dataclass
class AbsMax:
  """absmax (K,): largest magnitude per channel over all tokens."""

  absmax: jax.Array

  def update(self, x: jax.Array) -> 'AbsMax':
    """x (..., K)."""
    return AbsMax(jnp.maximum(self.absmax, jnp.max(jnp.abs(_flat(x)), axis=0)))


@flax.struct.dataclass
class MeanAbs:
  """total (K,), count (): mean |x| per channel is total / count (AWQ)."""

  total: jax.Array
  count: jax.Array

  def update(self, x: jax.Array) -> 'MeanAbs':
    """x (..., K)."""
    flat = jnp.abs(_flat(x))
    return MeanAbs(
      self.total + jnp.sum(flat, axis=0), self.count + flat.shape[0]
    )

  @property
  def mean(self) -> jax.Array:
    """(K,)."""
    return self.total / jnp.maximum(self.count, 1.0)


@flax.struct.dataclass
class MinMax:
  """low, high (K,): the range per channel.

  kind: 'all' keeps the extremes of all batches; 'average' the mean over the
    batches of each batch's extremes (OS+); 'ema' their exponential average.
  decay: weight of the past under 'ema'.
  """

  low: jax.Array
  high: jax.Array
  batches: jax.Array
  kind: str = flax.struct.field(pytree_node=False, default='all')
  decay: float = flax.struct.field(pytree_node=False, default=0.9)

  def update(self, x: jax.Array) -> 'MinMax':
    """x (..., K)."""
    low, high = jnp.min(_flat(x), axis=0), jnp.max(_flat(x), axis=0)
    first = self.batches == 0
    if self.kind == 'all':
      merge = (jnp.minimum(self.low, low), jnp.maximum(self.high, high))
    elif self.kind == 'average':
      weight = 1.0 / (self.batches + 1.0)
      merge = (
        self.low + (low - self.low) * weight,
        self.high + (high - self.high) * weight,
      )
    else:
      merge = (
        self.low * self.decay + low * (1 - self.decay),
        self.high * self.decay + high * (1 - self.decay),
      )
    return dataclasses.replace(
      self,
      low=jnp.where(first, low, merge[0]),
      high=jnp.where(first, high, merge[1]),
      batches=self.batches + 1.0,
    )


@flax.struct.dataclass
class Percentile:
  """low, high (1,): mean over the batches of two quantiles of the tensor.

  quantile: in (0.5, 1]; low is the quantile 1 - quantile.
  """

  low: jax.Array
  high: jax.Array
  batches: jax.Array
  quantile: float = flax.struct.field(pytree_node=False, default=0.9999)

  def update(self, x: jax.Array) -> 'Percentile':
    """x (..., K)."""
    flat = x.astype(jnp.float32).reshape(-1)
    levels = jnp.array([1 - self.quantile, self.quantile], jnp.float32)
    low, high = jnp.quantile(flat, levels)
    weight = 1.0 / (self.batches + 1.0)
    return dataclasses.replace(
      self,
      low=self.low + (low - self.low) * weight,
      high=self.high + (high - self.high) * weight,
      batches=self.batches + 1.0,
    )


@flax.struct.dataclass
class Hessian:
  """upper (K, K), count (): sum of x x^T over tokens, and their number.

  The Hessian of the squared output error is twice its mean. A CPU sums only the
  blocks on and above the diagonal: 1.25 K^2 flops a token where K divides by 4.
  Elsewhere it is one product of 2 K^2, as a mesh would have to move a tap that
  is sharded by channels to cut it. At the highest matmul precision: its inverse
  is what counts.
  """

  upper: jax.Array
  count: jax.Array

  def update(self, x: jax.Array) -> 'Hessian':
    """x (..., K)."""
    flat = _flat(x)
    gram = lax.platform_dependent(flat, cpu=_upper_gram, default=_gram)
    return Hessian(self.upper + gram, self.count + flat.shape[0])

  @property
  def mean(self) -> jax.Array:
    """2 E[x x^T] (K, K), symmetric to the last bit."""
    total = jnp.triu(self.upper) + jnp.triu(self.upper, 1).mT
    return 2.0 * total / jnp.maximum(self.count, 1.0)


def _gram(x: jax.Array) -> jax.Array:
  """x (tokens, K) -> x^T x (K, K)."""
  return jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)


def _upper_gram(x: jax.Array) -> jax.Array:
  """As _gram, with zeros in the blocks below the diagonal."""
  K = x.shape[1]
  # Blocks smaller than this lose more by their size than symmetry saves.
  parts = next((n for n in (4, 3, 2) if K % n == 0 and K // n >= 192), 1)
  cut = jnp.split(x, parts, axis=1)
  zero = jnp.zeros((K // parts, K // parts), x.dtype)
  product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  return jnp.block(
    [
      [zero if j < i else product(cut[i].T, cut[j]) for j in range(parts)]
      for i in range(parts)
    ]
  )


@flax.struct.dataclass
class Sample:
  """x (sequences, T, K): the first sequences that pass; filled: how many."""

  x: jax.Array
  filled: jax.Array

  @property
  def is_full(self) -> bool:
    """Whether later sequences would be dropped; outside jit only."""
    return int(self.filled) >= self.x.shape[0]

  def update(self, x: jax.Array) -> 'Sample':
    """x (B, T, K)."""
    rows = self.filled + jnp.arange(x.shape[0])
    return Sample(
      self.x.at[rows].set(x.astype(self.x.dtype), mode='drop'),
      self.filled + x.shape[0],
    )


def absmax(shape: tuple[int, ...]) -> AbsMax:
  """Request: AbsMax. shape: of the tapped batch (B, T, K), as below."""
  return AbsMax(jnp.zeros(shape[-1:], jnp.float32))


def mean_abs(shape: tuple[int, ...]) -> MeanAbs:
  """Request: MeanAbs."""
  return MeanAbs(jnp.zeros(shape[-1:], jnp.float32), jnp.zeros(()))


def minmax(kind: str = 'all', decay: float = 0.9) -> Request:
  """Request: MinMax of a kind.

  Raises:
    ValueError: unknown kind.
  """
  if kind not in ('all', 'average', 'ema'):
    raise ValueError(
      f"observers.minmax: kind={kind!r}; allowed ['all', 'average', 'ema']."
    )
  return functools.partial(_minmax, kind=kind, decay=decay)


def percentile(quantile: float = 0.9999) -> Request:
  """Request: Percentile.

  Raises:
    ValueError: quantile outside (0.5, 1].
  """
  if not 0.5 < quantile <= 1:
    raise ValueError(
      f'observers.percentile: quantile={quantile}; it must lie in (0.5, 1].'
    )
  return functools.partial(_percentile, quantile=quantile)


def hessian(shape: tuple[int, ...]) -> Hessian:
  """Request: Hessian."""
  K = shape[-1]
  return Hessian(jnp.zeros((K, K), jnp.float32), jnp.zeros(()))


def sample(sequences: int) -> Request:
  """Request: Sample of that many sequences."""
  return functools.partial(_sample, sequences=sequences)


def _minmax(shape: tuple[int, ...], kind: str, decay: float) -> MinMax:
  # Two arrays: states are donated, and no buffer may be donated twice.
  low, high = (jnp.zeros(shape[-1:], jnp.float32) for _ in range(2))
  return MinMax(low, high, jnp.zeros(()), kind, decay)


def _percentile(shape: tuple[int, ...], quantile: float) -> Percentile:
  del shape
  low, high = (jnp.zeros((1,), jnp.float32) for _ in range(2))
  return Percentile(low, high, jnp.zeros(()), quantile)


def _sample(shape: tuple[int, ...], sequences: int) -> Sample:
  return Sample(
    jnp.zeros((sequences, *shape[1:]), jnp.float32), jnp.zeros((), jnp.int32)
  )

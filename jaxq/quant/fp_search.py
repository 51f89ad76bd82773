"""The search of LLM-FP4: formats, biases and shifts of linears that share x.

See jaxq.quant.llm_fp4 for the idea. `search_layer` is a coordinate descent
whose errors are exact sums over a sample of tokens, taken from Gram matrices
where those are smaller:

  x^ W^ - x W = x^ e + d W = d W^ + x e,   d = x^ - x, e = W^ - W

so no error is a difference of large numbers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numerics import formats, fpx
from jaxq.numerics import spec as spec_lib

_LEAST = 2.0**-60  # Range of a slice of zeros.


class SearchConfig(Protocol):
  """What the search needs of its config (llm_fp4.LlmFp4Config is one).

  weights, inputs: their bits count. weight_mans, input_mans: mantissa bits of
  the formats, the one to begin with first. gammas: candidates for a range,
  times the largest value; 1 is the initial one.
  """

  @property
  def weights(self) -> spec_lib.QuantSpec: ...

  @property
  def inputs(self) -> spec_lib.QuantSpec: ...

  @property
  def weight_mans(self) -> tuple[int, ...]: ...

  @property
  def input_mans(self) -> tuple[int, ...]: ...

  @property
  def gammas(self) -> np.ndarray: ...

  @property
  def preshift(self) -> bool: ...

  @property
  def rounds(self) -> int: ...

  @property
  def reference_search(self) -> bool: ...


class LayerParams(NamedTuple):
  """What the search found for linears that share an input.

  input_man (), input_scale () = 2^-rho, shift (K,) int32 (zeros without
  preshift); weight_mans () and weight_scales (1, N) = 2^-b_n, one per kernel.
  losses (rounds + 1,): mean squared error, before the search and after rounds.
  """

  input_man: jax.Array
  input_scale: jax.Array
  shift: jax.Array
  weight_mans: tuple[jax.Array, ...]
  weight_scales: tuple[jax.Array, ...]
  losses: jax.Array


def initial_bias(absmax: jax.Array, man_bits: Any, bits: int) -> jax.Array:
  """The bias whose range is absmax; that of zeros is large and finite."""
  absmax = jnp.maximum(absmax, _LEAST)
  return jnp.log2(fpx.largest(man_bits, bits) / absmax)


def channel_shift(bias: jax.Array, rho: jax.Array, exp_bits: Any) -> jax.Array:
  """k (K,) int32 in [0, 2^exp_bits - 1] of channel biases (K,) and rho ()."""
  low = jnp.round(rho).astype(jnp.int32)
  top = jnp.left_shift(1, jnp.asarray(exp_bits, jnp.int32)) - 1
  return jnp.clip(jnp.round(bias).astype(jnp.int32) - low, 0, top)


def candidate_scale(
  absmax: jax.Array, man_bits: Any, bits: int, gamma: Any, reference: bool
) -> jax.Array:
  """2^-bias of one candidate, shaped as absmax."""
  if reference:
    return jnp.exp2(-gamma * initial_bias(absmax, man_bits, bits))
  return gamma * jnp.maximum(absmax, _LEAST) / fpx.largest(man_bits, bits)


def search_layer(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  absmax: jax.Array,
  config: SearchConfig,
) -> LayerParams:
  """Formats, biases and shifts of linears that read the same x.

  Args:
    x: (T, K) float32 sample of the inputs; rows of zeros count nothing.
    kernels: (K, N) each.
    absmax: (K,) of each channel over all calibration data.
    config: static.

  Returns:
    LayerParams; its scales are NaN where the error is not finite.
  """
  layer = _Layer(x, kernels, absmax, config)
  W, A = len(layer.weight_mans), len(layer.input_mans)
  start = (
    jnp.zeros(len(kernels), jnp.int32),  # Index of each kernel's format;
    lax.map(lambda m: layer.weight_scale(m, 1.0), layer.weight_mans),
    jnp.int32(0),  # of the input's.
    lax.map(lambda m: layer.input_scale(m, 1.0), layer.input_mans),
  )

  def round_(state, number):
    wi, old_ws, ai, old_as = state

    def seen(new, old):  # The authors' code is late in its first round.
      late = config.reference_search
      return jnp.where(number == 0, old, new) if late else new

    form = layer.output_form(layer.input_mans[ai], old_as[ai])
    ws = lax.map(
      lambda i: layer.best_weights(layer.weight_mans[i], form), jnp.arange(W)
    )
    wq = layer.rounded_weights(wi, seen(ws, old_ws))
    as_ = lax.map(
      lambda i: layer.best_input(layer.input_mans[i], wq), jnp.arange(A)
    )
    form = layer.output_form(layer.input_mans[ai], seen(as_, old_as)[ai])
    errors = lax.map(
      lambda i: layer.per_kernel(
        layer.column_errors(
          layer.round_weights(layer.weight_mans[i], ws[i]), form
        )
      ),
      jnp.arange(W),
    )  # (W, kernels)
    wi = jnp.argmin(errors, axis=0).astype(jnp.int32)
    against = layer.input_form(layer.rounded_weights(wi, ws))
    errors = lax.map(
      lambda i: layer.input_error(layer.input_mans[i], as_[i], against),
      jnp.arange(A),
    )
    ai = jnp.argmin(errors).astype(jnp.int32)
    return (wi, ws, ai, as_), errors[ai]

  wi, ws, ai, as_ = start
  against = layer.input_form(layer.rounded_weights(wi, ws))
  first = layer.input_error(layer.input_mans[ai], as_[ai], against)
  losses = first[None]
  if config.rounds:
    state, after = lax.scan(round_, start, jnp.arange(config.rounds))
    wi, ws, ai, as_ = state
    losses = jnp.concatenate([losses, after])
  ok = jnp.where(jnp.all(jnp.isfinite(losses)), 1.0, jnp.nan)
  man, scale = layer.input_mans[ai], as_[ai]
  return LayerParams(
    input_man=man,
    input_scale=scale * ok,
    shift=layer.shift(man, scale),
    weight_mans=tuple(layer.weight_mans[i] for i in wi),
    weight_scales=tuple(
      ws[wi[n]][:, columns] * ok for n, columns in enumerate(layer.columns)
    ),
    losses=losses,
  )


class _Layer:
  """The errors of search_layer."""

  def __init__(self, x, kernels, absmax, config):
    self.x, self.w = x, jnp.concatenate(list(kernels), axis=1)
    self.config = config
    ends = np.cumsum([kernel.shape[1] for kernel in kernels])
    self.columns = [
      slice(end - kernel.shape[1], end)
      for end, kernel in zip(ends.tolist(), kernels, strict=True)
    ]
    self.absmax, self.w_absmax = absmax, jnp.max(jnp.abs(self.w), 0)[None]
    self.weight_mans = jnp.array(config.weight_mans, jnp.int32)
    self.input_mans = jnp.array(config.input_mans, jnp.int32)
    tokens = jnp.sum(jnp.any(x != 0, axis=1).astype(jnp.float32))
    self.count = jnp.maximum(tokens, 1.0) * self.w.shape[1]
    self.gammas = jnp.asarray(config.gammas)

  def weight_scale(self, man, gamma):
    """2^-b (1, N)."""
    c = self.config
    return candidate_scale(
      self.w_absmax, man, c.weights.bits, gamma, c.reference_search
    )

  def input_scale(self, man, gamma):
    """2^-rho ()."""
    c, largest = self.config, jnp.max(self.absmax)
    return candidate_scale(
      largest, man, c.inputs.bits, gamma, c.reference_search
    )

  def shift(self, man, scale):
    """k (K,)."""
    if not self.config.preshift:
      return jnp.zeros(self.absmax.shape, jnp.int32)
    bits = self.config.inputs.bits
    bias = initial_bias(self.absmax, man, bits)
    return channel_shift(bias, -jnp.log2(scale), bits - 1 - man)

  def rounded_input(self, man, scale):
    """x^ (T, K)."""
    scales = scale * formats.exp2(-self.shift(man, scale))
    return fpx.round_to(self.x, scales[None], man, self.config.inputs.bits)

  def round_weights(self, man, scale):
    """W^ (K, N) in one format."""
    return fpx.round_to(self.w, scale, man, self.config.weights.bits)

  def rounded_weights(self, wi, ws):
    """W^ of each kernel's own format; wi (kernels,), ws (W, 1, N)."""
    parts = [
      fpx.round_to(
        self.w[:, columns],
        ws[wi[n]][:, columns],
        self.weight_mans[wi[n]],
        self.config.weights.bits,
      )
      for n, columns in enumerate(self.columns)
    ]
    return jnp.concatenate(parts, axis=1)

  def output_form(self, man, scale):
    """What column_errors needs: x^T x^, x^T d W, and |d W|^2 per column."""
    y = self.rounded_input(man, scale)
    moved = _dot(y - self.x, self.w)  # (T, N)
    return _dot(y.T, y), _dot(y.T, moved), jnp.sum(moved * moved, axis=0)

  def column_errors(self, wq, form):
    """(N,), squared error of each output column."""
    gram, cross, constant = form
    e = wq - self.w
    return jnp.sum(e * (_dot(gram, e) + 2 * cross), axis=0) + constant

  def per_kernel(self, errors):
    """(N,) -> (kernels,)."""
    return jnp.stack([jnp.sum(errors[columns]) for columns in self.columns])

  def best_weights(self, man, form):
    """The scale (1, N) of least error of each column."""

    def step(best, gamma):
      scale = self.weight_scale(man, gamma)
      errors = self.column_errors(self.round_weights(man, scale), form)[None]
      better = errors < best[0]
      return (
        jnp.where(better, errors, best[0]),
        jnp.where(better, scale, best[1]),
      ), None

    first = self.weight_scale(man, 1.0)
    start = (jnp.full_like(first, jnp.inf), first)
    return lax.scan(step, start, self.gammas)[0][1]

  def input_form(self, wq):
    """What input_error needs: W^ and x e, or W^ W^T, x e W^T and |x e|^2."""
    rest = _dot(self.x, wq - self.w)  # (T, N)
    constant = jnp.sum(rest * rest)
    if wq.shape[1] <= wq.shape[0]:
      return wq, rest, constant
    return _dot(wq, wq.T), _dot(rest, wq.T), constant

  def input_error(self, man, scale, against):
    """Mean squared error of the outputs, ()."""
    matrix, cross, constant = against
    d = self.rounded_input(man, scale) - self.x
    narrow = self.w.shape[1] <= self.w.shape[0]
    if narrow:
      return jnp.sum(jnp.square(_dot(d, matrix) + cross)) / self.count
    total = jnp.sum(d * (_dot(d, matrix) + 2 * cross)) + constant
    return total / self.count

  def best_input(self, man, wq):
    """The scale () of least error."""
    against = self.input_form(wq)

    def error(gamma):
      return self.input_error(man, self.input_scale(man, gamma), against)

    errors = lax.map(error, self.gammas)
    return self.input_scale(man, self.gammas[jnp.argmin(errors)])


def round_table(
  table: jax.Array, mans: tuple[int, ...], bits: int, config: SearchConfig
) -> jax.Array:
  """table (V, C), each row rounded with its bias of least error, as floats.

  The format of least total error serves all rows.

  Args:
    table: such as an embedding.
    mans: mantissa bits of the formats, the one to begin with first.
    bits: of the formats.
    config: gives candidates and rounds; rounds=0 is no search.
  """
  table = table.astype(jnp.float32)
  absmax = jnp.max(jnp.abs(table), axis=1, keepdims=True)
  formats_ = jnp.array(mans, jnp.int32)

  def scale_of(man, gamma):
    return candidate_scale(absmax, man, bits, gamma, config.reference_search)

  def best(man):
    def step(carry, gamma):
      scale = scale_of(man, gamma)
      y = fpx.round_to(table, scale, man, bits)
      errors = jnp.sum(jnp.square(y - table), axis=1, keepdims=True)
      better = errors < carry[0]
      return (
        jnp.where(better, errors, carry[0]),
        jnp.where(better, scale, carry[1]),
      ), None

    start = (jnp.full_like(absmax, jnp.inf), scale_of(man, 1.0))
    errors, scale = lax.scan(step, start, jnp.asarray(config.gammas))[0]
    return jnp.sum(errors), scale

  if not config.rounds:
    return fpx.round_to(table, scale_of(formats_[0], 1.0), mans[0], bits)
  errors, scales = lax.map(best, formats_)
  i = jnp.argmin(errors)
  return fpx.round_to(table, scales[i], formats_[i], bits)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

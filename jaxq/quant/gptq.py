"""GPTQ: rounds row by row, each row making up for the errors before it.

Frantar et al., 2022, https://arxiv.org/abs/2210.17323.

Of y = x @ w the squared output error of E = w - dequantize(q) is tr(E^T H E),
H = 2 E[x x^T]. With H = R R^T, R upper triangular, it is the sum over rows j of
|(R^T E)_j|^2, and (R^T E)_j involves rows i <= j only. So, in order, each row
is rounded from the value that makes its term zero:

  F[i, j] = R[i, j] / R[j, j]  (i < j)      "feedback"
  x_j = w_j + sum_{i < j} F[i, j] E_i,  q_j = round(x_j / scale_j)

This is the paper's algorithm exactly: its U, the upper Cholesky factor of H^-1,
is R^-1. Departure: the paper inverts H, takes U and after each row corrects all
later ones; here the errors are gathered when a row needs them, which takes one
Cholesky factorization and no inverse, and gives the same x_j. Rows are taken in
blocks, so that nearly all work is matmuls: K^2 N multiply-adds a linear and
K^3 / 3 a tap (linears that read one tensor share its factor).

act_order takes the channels of largest E[x^2] first, while the most rows are
left to compensate. With groups it needs static_groups: scales taken from w
before rounding. Without static_groups a group's scale is taken when its turn
comes, from w as the best compensation for the errors so far would have it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.calibrate import observers
from jaxq.nn import blocks, taps
from jaxq.numerics import cholesky, qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import preconditions, transform

Params = Mapping[str, Any]
_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptqConfig:
  """How weights are quantized and their errors compensated.

  Attributes:
    weights: what kernels become; any dtype and granularity.
    search: how ranges are taken; None absmax.
    act_order: rows of largest E[x^2] first.
    static_groups: group scales from the float kernel, before any rounding.
    damping: times mean(diag H), added to diag H; above 0.
    max_retries: how often damping is multiplied by 10 where the Cholesky
      factorization fails.
    block_size: rows whose errors are applied together; changes speed and
      float rounding only.
    true_sequential: quantize linears of one tap, then measure the next tap.
      One forward pass over the block more per tap.
    num_taps: distinct taps of a block, for true_sequential only; 4 for Llama:
      q, k, v; o; gate, up; down.
  """

  weights: spec_lib.QuantSpec
  search: ranges.RangeSearch | None = None
  act_order: bool = True
  static_groups: bool = True
  damping: float = 0.01
  max_retries: int = 5
  block_size: int = 128
  true_sequential: bool = False
  num_taps: int = 4

  def __post_init__(self):
    if self.damping <= 0:
      raise ValueError(
        f'GptqConfig: damping={self.damping}; it must be above 0, or a '
        'singular Hessian could not be retried. Use 0.01.'
      )
    for name, least in (('max_retries', 0), ('block_size', 1), ('num_taps', 1)):
      if getattr(self, name) < least:
        raise ValueError(
          f'GptqConfig: {name}={getattr(self, name)}; allowed {least} or more. '
          f'The default is {GptqConfig.__dataclass_fields__[name].default}.'
        )
    if self.updates_scales and self.act_order:
      raise ValueError(
        "GptqConfig: act_order=True with granularity='group' and "
        'static_groups=False; the rows of a group are then not neighbours when '
        'its scale is taken. Set static_groups=True, or act_order=False.'
      )

  @property
  def updates_scales(self) -> bool:
    """Whether a group's scale is taken when its turn comes."""
    return self.weights.granularity == 'group' and not self.static_groups


class Feedback(NamedTuple):
  """What one Hessian says; shared by the linears that read the same tensor.

  matrix: (K, K) float32, F of the module docstring, rows and columns in
    `order`; strictly upper triangular; NaN where every retry failed.
  order: (K,) int32, original index of the j-th row to be rounded.
  dead: (K,) bool, channels that were always zero.
  damping: () float32, the damping that was used.
  """

  matrix: jax.Array
  order: jax.Array
  dead: jax.Array
  damping: jax.Array


def quantize(
  w: jax.Array, hessian: jax.Array, config: GptqConfig
) -> qarray.QArray:
  """w (K, N), hessian (K, K) -> QArray (K, N), rows in their own order.

  Args:
    w: floating kernel; computed in float32.
    hessian: proportional to E[x x^T]; rows of zeros are dead channels, whose
      weights become 0. All zeros: rounded to nearest.
    config: static.

  Returns:
    The quantized kernel. Its scales are NaN where the factorization failed
    after all retries (`failure` has the words for it).

  Raises:
    ValueError: shapes do not fit, or K is no multiple of group_size.
  """
  return quantize_with(w, feedback(hessian, config), config)


def feedback(hessian: jax.Array, config: GptqConfig) -> Feedback:
  """hessian (K, K) -> Feedback. Retries with more damping inside jit.

  Raises:
    ValueError: hessian is not square.
  """
  if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
    raise ValueError(
      f'gptq.feedback: hessian has shape {hessian.shape}; it must be (K, K). '
      'Take it from observers.hessian.'
    )
  hessian = hessian.astype(jnp.float32)
  diagonal = jnp.diagonal(hessian)
  dead = diagonal == 0
  order = jnp.arange(diagonal.shape[0], dtype=jnp.int32)
  if config.act_order:
    order = jnp.argsort(-diagonal).astype(jnp.int32)
  hessian = (hessian + jnp.diag(dead.astype(jnp.float32)))[order][:, order]
  mean = jnp.mean(jnp.diagonal(hessian))
  flipped = hessian[::-1, ::-1]  # Lower factor of it = flipped upper one.
  identity = jnp.eye(flipped.shape[0], dtype=jnp.float32)

  def attempt(state):
    tries, damping, _ = state
    damping = jnp.where(tries == 0, damping, damping * 10)
    factor = cholesky.cholesky(flipped + damping * mean * identity)
    return tries + 1, damping, factor

  def unsolved(state):
    tries, _, factor = state
    return (tries <= config.max_retries) & ~jnp.all(jnp.isfinite(factor))

  start = (
    jnp.zeros((), jnp.int32),
    jnp.asarray(config.damping, jnp.float32),
    jnp.full_like(flipped, jnp.nan),
  )
  _, damping, factor = lax.while_loop(unsolved, attempt, start)
  upper = factor[::-1, ::-1]  # (K, K), hessian = upper @ upper.T
  matrix = jnp.triu(upper / jnp.diagonal(upper)[None, :], 1)
  matrix = jnp.where(jnp.all(jnp.isfinite(factor)), matrix, jnp.nan)
  # An expert that no token reached says nothing: its kernel is rounded as is.
  return Feedback(matrix, order, dead & ~jnp.all(dead), damping)


def quantize_with(
  w: jax.Array, fb: Feedback, config: GptqConfig
) -> qarray.QArray:
  """As `quantize`, with a factor shared between kernels.

  Args:
    w: (K, N) floating.
    fb: of the kernel's input, made with the same config.
    config: static.

  Raises:
    ValueError: shapes do not fit, or K is no multiple of group_size.
  """
  if w.ndim != 2 or w.shape[0] != fb.dead.shape[0]:
    raise ValueError(
      f'gptq.quantize: w has shape {w.shape}, the Hessian '
      f'{fb.matrix.shape}; they must be (K, N) and (K, K). Use the Hessian of '
      "this kernel's own input."
    )
  spec = config.weights
  w = jnp.where(fb.dead[:, None], 0.0, w.astype(jnp.float32))
  outer = qarray.tensor_scale(w, spec)
  find = functools.partial(
    qarray.find_params, spec=spec, search=config.search, tensor_scale=outer
  )
  if config.updates_scales:  # Filled as groups are reached.
    params = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(find, w)
    )
  else:
    params = find(w)  # (rows of scales, N or 1), the zero point likewise.
  codes, (scale, zero) = _round_rows(w, fb, params, find, config)
  q = qarray.from_codes(codes, scale, zero, spec, tensor_scale=outer)
  solved = jnp.all(jnp.isfinite(fb.matrix))
  nan = jnp.full_like(q.scale, jnp.nan)
  return dataclasses.replace(q, scale=jnp.where(solved, q.scale, nan))


def failure(name: str, config: GptqConfig) -> str:
  """The error message for a linear whose scales came out NaN.

  Args:
    name: of the linear ('blocks.3.mlp.down_proj').
    config: the method's.
  """
  tried = [config.damping * 10**i for i in range(config.max_retries + 1)]
  return (
    f'gptq: the Hessian of {name} is not positive definite with damping '
    f'{tried[0]:g} to {tried[-1]:g}; its inputs must be finite. Look for NaN '
    'or Inf in the calibration data and earlier weights, or raise damping.'
  )


def gptq(config: GptqConfig) -> transform.Transform:
  """The method; a chain of config.num_taps stages if true_sequential."""
  if not config.true_sequential:
    return _stage(config, None)
  stages = [_stage(config, i) for i in range(config.num_taps)]
  return transform.chain(*stages)


def _stage(config: GptqConfig, index: int | None) -> transform.Transform:
  """Quantizes the linears of the index-th distinct tap; None is all."""

  def chosen(block):
    by_tap: dict[str, list[str]] = {}
    for lin in block.linears:
      by_tap.setdefault(lin.tap, []).append(lin.path)
    if index is None:
      return by_tap
    if len(by_tap) > config.num_taps:
      raise ValueError(
        f'gptq: num_taps={config.num_taps}, but this block has {len(by_tap)} '
        f'distinct taps {sorted(by_tap)}; true_sequential needs a stage for '
        f'each. Set num_taps={len(by_tap)}.'
      )
    return dict(list(by_tap.items())[index : index + 1])

  def observe(block: blocks.BlockSpec) -> transform.Requests:
    return {tap: {'hessian': observers.hessian} for tap in chosen(block)}

  def apply(
    block: blocks.BlockSpec,
    params: Params,
    quant: Params,
    stats: transform.Stats,
  ) -> tuple[Params, Params]:
    for tap, paths in chosen(block).items():
      preconditions.require_float(params, paths, 'gptq')
      fb = feedback(stats[tap]['hessian'].mean, config)
      for path in paths:
        q = quantize_with(blocks.kernel_of(params, path), fb, config)
        params = taps.set_path(params, f'{path}/kernel', q)
    return params, quant

  name = 'gptq' if index is None else f'gptq[{index}]'
  return transform.Transform(
    name=name,
    apply=apply,
    observe=observe,
    failure=functools.partial(failure, config=config),
  )


def _round_rows(w, fb, params, find, config):
  """The algorithm.

  Args:
    w: (K, N) float32.
    fb: Feedback.
    params: scale and zero point (or None), filled unless they are updated.
    find: slab (G, N) -> its parameters, where scales are updated.
    config: static.

  Returns:
    codes (K, N), rows in w's order; params as used.
  """
  K, spec = w.shape[0], config.weights
  B = spec.group_size if config.updates_scales else _block(K, config)
  num_blocks = -(-K // B)
  pad = num_blocks * B - K  # Rows of zeros that feed nothing back.
  w = jnp.pad(w[fb.order], ((0, pad), (0, 0)))
  matrix = jnp.pad(fb.matrix, ((0, pad), (0, pad)))
  rows = jnp.pad(_scale_rows(fb.order, spec), (0, pad))

  def round_block(b, carry):
    codes, errors, params = carry
    start = b * B
    cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=B)
    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
    w_b, f_b = cut(w, start), cut(matrix, start, axis=1)  # (B, N), (K, B)
    # Rows of errors not yet rounded are zero, so no mask is needed.
    pending = jnp.matmul(f_b.T, errors, precision=_HIGHEST)  # (B, N)
    own = cut(f_b, start)  # (B, B)
    if config.updates_scales:
      slab = w_b + jax.scipy.linalg.solve_triangular(
        own, pending, trans='T', unit_diagonal=True
      )
      params = jax.tree.map(lambda p, n: put(p, n, b), params, find(slab))
    codes_b, errors_b = _round_block(
      w_b, w_b + pending, own.T, cut(rows, start), params, spec
    )
    return put(codes, codes_b, start), put(errors, errors_b, start), params

  carry = (jnp.zeros(w.shape, spec.code_dtype), jnp.zeros_like(w), params)
  codes, _, params = lax.fori_loop(0, num_blocks, round_block, carry)
  return codes[:K][jnp.argsort(fb.order)], params


def _round_block(w, x, feed, rows, params, spec):
  """One block: w, x (B, N), feed (B, B) = F^T -> codes, errors (B, N)."""

  def round_row(j, carry):
    codes, errors = carry
    take = functools.partial(
      lax.dynamic_index_in_dim, index=j, axis=0, keepdims=False
    )
    x_j = take(x) + jnp.matmul(take(feed), errors, precision=_HIGHEST)  # (N,)
    scale, zero = jax.tree.map(lambda p: p[rows[j]], params)
    code = qarray.encode(x_j, scale, zero, spec)
    error = take(w) - qarray.decode(code, scale, zero, spec)
    return codes.at[j].set(code), errors.at[j].set(error)

  carry = (jnp.zeros(w.shape, spec.code_dtype), jnp.zeros_like(w))
  return lax.fori_loop(0, w.shape[0], round_row, carry)


def _scale_rows(order, spec):
  """(K,): for the j-th row to be rounded, its row in the scales."""
  if spec.granularity == 'group':
    return order // spec.group_size
  return order if spec.granularity == 'token' else jnp.zeros_like(order)


def _block(K, config):
  """Rows per block: near-equal blocks, of whole sublanes of 8."""
  num_blocks = -(-K // config.block_size)
  B = -(-K // num_blocks)
  return B if config.block_size < 8 else -(-B // 8) * 8

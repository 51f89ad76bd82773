"""Rotations: spread outlier channels over all channels (QuaRot).

Ashkboos et al., 2024, https://arxiv.org/abs/2404.00456.

  residual   x' = x Q,  Q = diag(signs) H / sqrt(C);  readers Q' W, writers W Q
  online     x' = x H / sqrt(K) just before o and down; their kernels H' W

A channel a hundred times the others sets the step of a whole token. Q mixes it
into every channel, so the same energy lies flat: largest / rms falls towards
that of a Gaussian. Q is orthogonal, and RMSNorm without scale commutes with it:
the norms' scales are folded into the linears they feed, then embedding, head
and every kernel on the residual stream are rotated once, offline, for nothing.
The inputs of o and down are not on that stream; their rotation runs in the
model (cost: jaxq.numerics.hadamard) and needs no statistics.

Form of the attention's rotation. QuaRot rotates v within heads offline and the
heads among each other online; for powers of two the product is the Hadamard of
H * D. Here `online` is that full Hadamard in one piece and v stays as it is:
the same rotation of o's input, and one that exists where none of order H does
(H = 9, D = 64: 576 = 16 * 36). On top of a rotated v it would undo the mixing
within heads. Without `online`, v's heads and o's rows are rotated offline,
which is free; down's input is then left alone.

Sizes without a Hadamard matrix are rotated in blocks of their largest divisor
that has one. Biases of writers turn with their kernels.

Precision: float32. One rotation rounds a kernel by at most 3e-7 of its norm, up
to 4096 channels and with a row a thousand times the others (the tests ask for
1e-6); logits keep 1e-4. The reference rotates in float64 and stores float16.

A tied head becomes its own, V x C floats more: `outside` returns a 'head', and
the model must then be built with tie_embeddings=False. All blocks and `outside`
share one Q, from the seed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.nn import blocks, linear, taps
from jaxq.numerics import hadamard
from jaxq.quant import preconditions, transform

Params = Mapping[str, Any]
_OUTSIDE = ('embed', 'final_norm', 'head')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateConfig:
  """Attributes.

  seed: of the signs in Q.
  online: whether the inputs of o and down are rotated as the model runs.
  """

  seed: int = 0
  online: bool = True

  def __post_init__(self):
    if self.seed < 0:
      raise ValueError(
        f'RotateConfig: seed={self.seed}; allowed 0 or more. Use 0.'
      )


def rotate(config: RotateConfig) -> transform.Transform:
  """The method as a Transform; see the module docstring."""
  return transform.Transform(
    name='rotate',
    apply=functools.partial(_apply, config),
    outside=functools.partial(_outside, config),
  )


def block_size(n: int) -> int:
  """The largest divisor of n for which there is a Hadamard matrix."""
  return next(
    d for d in range(n, 0, -1) if n % d == 0 and hadamard.supported(d)
  )


def residual_rotation(x: jax.Array, seed: int, axis: int = -1) -> jax.Array:
  """x @ Q along `axis`, Q = diag(signs) H / sqrt(C), C = x.shape[axis].

  Along axis 0 of a kernel (C, N) that is Q' W.
  """
  x = jnp.moveaxis(x, axis, -1)
  C = x.shape[-1]
  signs = hadamard.signs(C, jax.random.key(seed)).astype(x.dtype)
  x = x * signs.reshape((1,) * (x.ndim - 1) + (C,))
  return jnp.moveaxis(_hadamard(x, block_size(C)), -1, axis)


def _apply(
  config: RotateConfig,
  block: blocks.BlockSpec,
  params: Params,
  quant: Params,
  stats: transform.Stats,
) -> tuple[Params, Params]:
  del stats
  if block.unrotatable:
    raise NotImplementedError(
      f'rotate: the residual stream of this model cannot be rotated: '
      f'{block.unrotatable}. Leave rotate out for this model.'
    )
  readers = [path for _, consumers in block.norms for path in consumers]
  online = [
    path
    for path in (block.rotated if config.online else ())
    if block.linear(path) is not None  # One that stays float gains nothing.
  ]
  heads = [] if config.online else [s for s in block.sites if s.heads]
  touched = dict.fromkeys(
    [*readers, *block.residual_out, *online]
    + [path for site in heads for path in (site.producer, *site.consumers)]
  )
  preconditions.require_float(params, touched, 'rotate')
  preconditions.require_dynamic_inputs(quant, touched, 'rotate')
  _require_unrotated(quant, block.rotated)
  for norm, consumers in block.norms:
    params = _fold_norm(params, norm, consumers)
  turn = functools.partial(residual_rotation, seed=config.seed)
  for path in readers:
    params = _on_kernel(params, path, functools.partial(turn, axis=0))
  for path in block.residual_out:
    params = _on_outputs(params, path, turn)
  for site in heads:
    params = _rotate_heads(params, site)
  for path in online:
    size = block_size(blocks.kernel_of(params, path).shape[0])
    params = _on_kernel(
      params, path, functools.partial(_hadamard, size=size, axis=0)
    )
    quant = taps.set_path(
      quant, f'{path}/hadamard', linear.OnlineHadamard(size)
    )
  return params, quant


def _outside(config: RotateConfig, params: Params) -> Params:
  unknown = sorted(set(params) - set(_OUTSIDE))
  if unknown:
    raise NotImplementedError(
      f'rotate: parameters {unknown} outside the blocks; it can rotate '
      f'{sorted(_OUTSIDE)}. Leave rotate out for this model.'
    )
  out = jax.tree.map(jnp.asarray, dict(params))
  embedding = out['embed']['embedding']  # (V, C)
  out.setdefault('head', {'kernel': embedding.T})
  turn = functools.partial(residual_rotation, seed=config.seed)
  out = _fold_norm(out, 'final_norm', ('head',))
  out = _on_kernel(out, 'head', functools.partial(turn, axis=0))
  return taps.set_path(out, 'embed/embedding', turn(embedding))


def _fold_norm(
  params: Params, norm: str, consumers: tuple[str, ...]
) -> dict[str, Any]:
  """Moves a norm's scale (C,) into the rows of the kernels it feeds."""
  leaves = taps.get_path(params, norm)
  if 'bias' in leaves:
    raise NotImplementedError(
      f'rotate: {norm} has a bias; only norms without one (RMSNorm) commute '
      'with a rotation. Leave rotate out for this model.'
    )
  scale = leaves['scale']
  for path in consumers:
    params = _on_kernel(params, path, lambda w: w * scale[:, None])
  return taps.set_path(params, f'{norm}/scale', jnp.ones_like(scale))


def _on_kernel(
  params: Params, path: str, f: Callable[[jax.Array], jax.Array]
) -> dict[str, Any]:
  kernel = f(blocks.kernel_of(params, path))
  return taps.set_path(params, f'{path}/kernel', kernel)


def _on_outputs(
  params: Params, path: str, f: Callable[[jax.Array], jax.Array]
) -> dict[str, Any]:
  """Applies f to the last axis of a linear's kernel (K, N) and bias (N,)."""
  leaves = taps.get_path(params, path)
  return taps.set_path(params, path, {k: f(leaf) for k, leaf in leaves.items()})


def _rotate_heads(params: Params, site: blocks.Site) -> Params:
  """Rotates each head of a producer (v), and the consumers' rows back."""
  assert site.heads is not None
  D = site.heads[2]

  def per_head(x):  # (..., heads * D) -> the same
    heads = x.reshape(*x.shape[:-1], -1, D)
    return _hadamard(heads, block_size(D)).reshape(x.shape)

  params = _on_outputs(params, site.producer, per_head)
  for path in site.consumers:
    params = _on_kernel(params, path, lambda w: per_head(w.T).T)
  return params


def _hadamard(x: jax.Array, size: int, axis: int = -1) -> jax.Array:
  """x @ the block-diagonal H / sqrt(size) along `axis`."""
  turned = linear.OnlineHadamard(size)(jnp.moveaxis(x, axis, -1))
  return jnp.moveaxis(turned, -1, axis)


def _require_unrotated(quant: Params, paths: tuple[str, ...]) -> None:
  for path in paths:
    if taps.get_path(quant, f'{path}/hadamard') is not None:
      raise ValueError(
        f'rotate: the input of {path} is rotated already; a block is rotated '
        'once. Leave one rotate out of the chain.'
      )

"""OScaR: rotate keys, then divide each by its norm, and 2 bits are enough.

"OScaR: The Occam's Razor for Extreme KV Cache Quantization in LLMs and Beyond",
2026, https://arxiv.org/abs/2605.19660.

  canalized rotation   q' = q H,  k' = k H,  H = Hadamard / sqrt(D), no signs
  omni-token scaling   n_t = |k'_t| over all heads;  k'' = k' / n_t
  scores               s_t = (q' . dequantize(k'')_t) n_t / sqrt(D)
  values               rotated too, online or folded into v and o

KIVI gives the tokens of a group one step per channel. Where their norms differ
(an attention sink is small, others large) the largest sets it: token norm
imbalance, which `norm_imbalance` measures. Dividing by the norm makes all
groups alike, at one number per token; the score gets it back. Scaling alone
blows up small tokens' own large channels, so the rotation, which spreads them,
comes first. It does not repair all of that: on keys whose small tokens point in
channels of their own, plain KIVI can be better.

One implementation with KIVI: `CONFIG` is a KiviConfig with three flags set. The
zero point is an unclamped integer, as in the reference.

Sharding: the norm over all heads needs a sum over the devices that share them,
one float per token, which jit inserts; norm_scope='head' needs none and stores
one norm per head.

Departures: values are rotated online by default, which serves quantized weights
as well; `fold_value_rotation` makes it free. Heads that are no power of two are
rotated where a Hadamard matrix exists. Groups are never padded.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kvcache import kivi, rotation, stores
from jaxq.nn import taps

Params = Mapping[str, Any]
CONFIG = kivi.KiviConfig(
  mode='integer', rotate=True, token_scale=True, value_rotation='online'
)
_MARK = 'attention/value_rotation'


def canalized_rotation(x: jax.Array) -> jax.Array:
  """x (..., D) -> x H, computed in float32, in x.dtype."""
  return rotation.Rotation().apply(x)


def omni_token_scale(
  k: jax.Array, norm_scope: str = 'token'
) -> tuple[jax.Array, jax.Array]:
  """k (B, T, Hkv, D) -> k / n and n (B, T, 1 or Hkv, 1), float32.

  Raises:
    ValueError: unknown scope.
  """
  if norm_scope not in kivi.NORM_SCOPES:
    raise ValueError(
      f'oscar: norm_scope={norm_scope!r}; allowed {sorted(kivi.NORM_SCOPES)}.'
    )
  return stores.scale_tokens(k, per_head=norm_scope == 'head')


def norm_imbalance(
  k: jax.Array, group_size: int = 32
) -> tuple[jax.Array, jax.Array]:
  """How unlike the norms of the tokens that share a key group are.

  Args:
    k: (B, T, Hkv, D) keys after positions; T a multiple of group_size.
    group_size: tokens of a group.

  Returns:
    Largest / smallest norm and largest / median norm of each group, (B, T /
    group_size) each, norms over all heads. 1 is balanced.
  """
  _, norm = stores.scale_tokens(k)
  norm = norm.reshape(k.shape[0], -1, group_size)
  most = jnp.max(norm, axis=-1)
  return most / jnp.min(norm, axis=-1), most / jnp.median(norm, axis=-1)


def fold_value_rotation(
  variables: Params, num_kv_heads: int, head_dim: int
) -> dict[str, Any]:
  """Weights under which values come rotated and the output undoes it.

  W_v <- W_v H and its bias, W_o <- H' W_o, per head, in one block or stacked
  blocks; the logits are those of before. For value_rotation='folded'.

  Args:
    variables: {'params', 'quant'} of a decoder ('blocks_0', ...) or of a block.
    num_kv_heads, head_dim: Hkv, D.

  Returns:
    New variables; 'quant' holds a mark that they are rotated.

  Raises:
    ValueError: rotated already, or no such Hadamard matrix.
    TypeError: quantized kernels, which cannot be rotated.
  """
  rotation.check(head_dim)
  params, quant = dict(variables['params']), dict(variables.get('quant', {}))
  runs = [name for name in params if name.startswith('blocks_')]
  if not runs:
    params, quant = _fold(params, quant, num_kv_heads, head_dim)
  for name in runs:
    params[name], quant[name] = _fold(
      params[name], quant.get(name, {}), num_kv_heads, head_dim
    )
  return {**variables, 'params': params, 'quant': quant}


def _fold(params: Params, quant: Params, Hkv: int, D: int) -> Any:
  if taps.get_path(quant, _MARK) is not None:
    raise ValueError(
      'oscar: the values of these weights are rotated already; fold once. Use '
      'the weights as they are.'
    )
  turned = rotation.Rotation()

  def per_head(x):  # (..., heads * D) -> the same.
    heads = x.reshape(*x.shape[:-1], -1, D)
    return turned.apply(heads).reshape(x.shape)

  for path in ('attention/v_proj', 'attention/o_proj'):
    kernel = taps.get_path(params, f'{path}/kernel')
    if not isinstance(kernel, jax.Array):
      raise TypeError(
        f'oscar: {path} is a {type(kernel).__name__}; only float kernels can '
        "be rotated. Use value_rotation='online'."
      )
  v = taps.get_path(params, 'attention/v_proj')
  if v['kernel'].shape[-1] != Hkv * D:
    raise ValueError(
      f'oscar: v_proj has {v["kernel"].shape[-1]} outputs; {Hkv} heads of {D} '
      f'make {Hkv * D}. Give the heads of this model.'
    )
  params = taps.set_path(
    params, 'attention/v_proj', {name: per_head(x) for name, x in v.items()}
  )
  o = taps.get_path(params, 'attention/o_proj/kernel')
  rows = per_head(jnp.swapaxes(o, -1, -2))
  params = taps.set_path(
    params, 'attention/o_proj/kernel', jnp.swapaxes(rows, -1, -2)
  )
  mark = jnp.ones((*o.shape[:-2], 1), jnp.float32)
  return params, taps.set_path(quant, _MARK, mark)

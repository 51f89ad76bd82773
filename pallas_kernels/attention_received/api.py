"""attention_received: what each key gets of the attention of the queries.

  p[t, s] = exp(scale * q[t] . k[s] - lse[t])
  received[s] = sum over t of p[t, s], or the maximum

Flash attention leaves no weights behind, only the logarithms of its rows' sums;
from them this is one more pass over q and k. Serves FastV, VisionZip, PruMerge,
SparseVLM and QTSplus. Bytes that must move: those of q and k, 4 B H (T + S);
the weights would be 4 B H T S more, written and read.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, targets
from pallas_kernels.attention_received import base, pallas_mosaic_tpu

IMPLEMENTATIONS = ('pallas_mosaic_tpu', 'xla')
REDUCTIONS = ('max', 'sum')
_OP = 'attention_received'
_DTYPES = ('bfloat16', 'float16', 'float32')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """What of a call is static."""

  reduce: str
  scale: float
  causal: bool
  implementation: str
  chip: str
  block: pallas_mosaic_tpu.Block | None
  interpret: bool


def attention_received(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array,
  *,
  reduce: str = 'sum',
  row_mask: jax.Array | None = None,
  scale: float | None = None,
  causal: bool = False,
  implementation: str | None = None,
  chip: str | None = None,
  block: pallas_mosaic_tpu.Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """q (B, T, H, D), k (B, S, Hkv, D), lse (B, H, T) -> (B, H, S) float32.

  Columns are independent once lse is given: keys that the attention did not see
  are left out by the caller, who also takes the mean or the maximum over heads.
  Differentiable with respect to q, k and lse; the backward pass is that of
  base.py, which writes the weights out.

  Args:
    q: queries, floating.
    k: keys, of q's dtype; Hkv divides H.
    lse: of each row of the attention's logits, over the keys it saw: what flash
      attention returns, or `row_logsumexp`. A row with an infinite one does not
      count.
    reduce: one of REDUCTIONS, over rows; the maximum of no rows is 0.
    row_mask: (B, T) bool, rows that count; None: all.
    scale: of the logits; None: 1 / sqrt(D).
    causal: row t saw the keys up to t + S - T.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU compiled for; None: the one at hand.
    block: of the TPU form; None: by rule.
    interpret: runs the kernel in Pallas's interpreter.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  _check(q, k)
  B, T, H, D = q.shape
  for name, array, shape in (
    ('lse', lse, (B, H, T)),
    ('row_mask', row_mask, (B, T)),
  ):
    if array is not None and array.shape != shape:
      raise ValueError(
        f'{_OP}: {name} has shape {array.shape}; q {q.shape} needs {shape}. '
        'Reshape it.'
      )
  for name, value, allowed in (
    ('reduce', reduce, REDUCTIONS),
    ('implementation', implementation, (None, *IMPLEMENTATIONS)),
  ):
    if value not in allowed:
      raise ValueError(
        f'{_OP}: {name}={value!r}; allowed {list(allowed)}. Use one of them.'
      )
  chip = chip or targets.current()
  lse = lse.astype(jnp.float32)
  if row_mask is not None:
    lse = jnp.where(row_mask[:, None], lse, jnp.inf)
  call = _Call(
    reduce=reduce,
    scale=D**-0.5 if scale is None else float(scale),
    causal=causal,
    implementation=implementation or choose(q, k, chip),
    chip=chip,
    block=block,
    interpret=interpret,
  )
  return _received(call, q, k, lse)


def row_logsumexp(
  q: jax.Array,
  k: jax.Array,
  *,
  key_mask: jax.Array | None = None,
  scale: float | None = None,
  causal: bool = False,
) -> jax.Array:
  """q (B, T, H, D), k (B, S, Hkv, D) -> lse (B, H, T) float32.

  For layers whose attention does not return it, a sequence at a time, so that
  the logits of one are held and no more.

  Args:
    q: queries, floating.
    k: keys, of q's dtype; Hkv divides H.
    key_mask: (B, S) bool, keys that are there; None: all.
    scale: of the logits; None: 1 / sqrt(D).
    causal: row t sees the keys up to t + S - T.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
  """
  _check(q, k)
  B, S = k.shape[:2]
  if key_mask is not None and key_mask.shape != (B, S):
    raise ValueError(
      f'{_OP}: key_mask has shape {key_mask.shape}; k {k.shape} needs '
      f'{(B, S)}. Reshape it.'
    )
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  f = functools.partial(base.row_logsumexp, scale=scale, causal=causal)
  if key_mask is None:
    return jax.lax.map(lambda row: f(row[0], row[1], None), (q, k))
  return jax.lax.map(lambda row: f(*row), (q, k, key_mask))


def choose(q: Any, k: Any, chip: str | None = None) -> str:
  """The name of the implementation that None stands for.

  The kernel where it serves and XLA is not to partition it, else 'xla'.
  """
  if pallas_mosaic_tpu.why_not(q, k, chip or targets.current()):
    return 'xla'
  return 'xla' if compat.is_partitioned() else 'pallas_mosaic_tpu'


def _check(q, k):
  if q.ndim != 4 or k.ndim != 4 or 0 in q.shape + k.shape:
    raise ValueError(
      f'{_OP}: q has shape {q.shape}, k {k.shape}; they need the axes (B, T, '
      'H, D) and (B, S, Hkv, D), none of them empty. Add the axes that miss.'
    )
  B, _, H, D = q.shape
  if (k.shape[0], k.shape[3]) != (B, D) or H % k.shape[2]:
    raise ValueError(
      f'{_OP}: q has shape {q.shape}, k {k.shape}; B and D must be equal and '
      'Hkv must divide H. Give the q and k of one layer.'
    )
  if q.dtype != k.dtype or q.dtype.name not in _DTYPES:
    raise TypeError(
      f'{_OP}: q is {q.dtype} and k is {k.dtype}; both must be the same of '
      f'{sorted(_DTYPES)}. Cast them.'
    )


def _base(call, q, k, lse):
  f = functools.partial(
    base.attention_received,
    reduce=call.reduce,
    scale=call.scale,
    causal=call.causal,
  )
  return jax.vmap(f)(q, k, lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _received(call, q, k, lse):
  if call.implementation == 'xla':
    return _base(call, q, k, lse)
  return pallas_mosaic_tpu.attention_received(
    q,
    k,
    lse,
    reduce=call.reduce,
    scale=call.scale,
    causal=call.causal,
    chip=call.chip,
    block=call.block,
    interpret=call.interpret,
  )


def _forward(call, q, k, lse):
  return _received(call, q, k, lse), (q, k, lse)


def _backward(call, residuals, g):
  return jax.vjp(functools.partial(_base, call), *residuals)[1](g)


_received.defvjp(_forward, _backward)

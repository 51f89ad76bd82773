"""prefill_attention: causal attention of many queries, and what keys receive.

  out_t = sum_s p_ts v_s        p_ts = exp(s_ts - lse_t)
  received_s = sum_t w_t p_ts

Scores are made tile by tile and never written: 4 T S D multiply-adds a head
pair against 2 (T + S) D elements. The log-sum-exps are an output, so that parts
of a context merge (decode_attention.merge) and so that `received`, the saliency
of ZipCache, H2O and SnapKV, costs a second pass over the tiles and no T x S
array either.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, targets
from pallas_kernels.prefill_attention import base, pallas_mosaic_tpu

# A GPU form, 'pallas_mosaic_gpu', goes here and into `choose`.
IMPLEMENTATIONS = ('pallas_mosaic_tpu', 'xla')
_OP = 'prefill_attention'
_FEWEST = 128  # Queries.


def prefill_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  start: jax.Array | None = None,
  lengths: jax.Array | None = None,
  scale: float | None = None,
  window: int | None = None,
  softcap: float | None = None,
  implementation: str | None = None,
  chip: str | None = None,
  block: pallas_mosaic_tpu.Block | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Causal attention: output and log-sum-exp.

  Args:
    q: (B, T, H, D).
    k, v: (B, S, Hkv, D), Hkv dividing H; key s is at position s.
    start: (B,) int32 position of the first query; None: 0.
    lengths: (B,) int32 keys that are there; None: S. What is behind them may be
      anything.
    scale: of the scores; None: 1 / sqrt(D).
    window: positions a query sees, itself counted; None: all.
    softcap: scores become softcap * tanh(scores / softcap).
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU compiled for; None: the one at hand.
    block: of the TPU form; None: by rule.
    interpret: runs the kernel in Pallas's interpreter, on any platform.

  Returns:
    (B, T, H, D) in q.dtype and (B, T, H) float32; 0 and -inf where nothing is
    seen.

  Raises:
    ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  name, chip, options = _resolve(q, k, v, scale, implementation, chip)
  options |= {'window': window, 'softcap': softcap}
  start, lengths = _rows(k, start, lengths)
  if name == 'xla':
    return base.prefill_attention(q, k, v, start, lengths, **options)
  return pallas_mosaic_tpu.prefill_attention(
    q, k, v, start, lengths, block=block, interpret=interpret, **options
  )


def received(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array,
  *,
  weights: jax.Array | None = None,
  start: jax.Array | None = None,
  positions: jax.Array | None = None,
  lengths: jax.Array | None = None,
  scale: float | None = None,
  window: int | None = None,
  softcap: float | None = None,
  implementation: str | None = None,
  chip: str | None = None,
  block: pallas_mosaic_tpu.Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Attention that each key receives: (B, H, S) float32.

  Args:
    q, k: as prefill_attention has them, and all that is not said here.
    lse: (B, T, H) float32, of all keys a query sees, these or more.
    weights: (B, T) of the queries; None: 1.
    positions: (B, T) int32 of the queries, in any order, so that a few that
      were picked cost no more than they are; a negative one sees nothing. None:
      start, start + 1, ...
  """
  name, chip, options = _resolve(q, k, k, scale, implementation, chip)
  options |= {'window': window, 'softcap': softcap}
  start, lengths = _rows(k, start, lengths)
  if weights is None:
    weights = jnp.ones(q.shape[:2], jnp.float32)
  if positions is None:
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
  of_queries = weights.shape, positions.shape
  if lse.shape != q.shape[:3] or of_queries != (q.shape[:2],) * 2:
    raise ValueError(
      f'{_OP}.received: q {q.shape}, lse {lse.shape}, weights and positions '
      f'{of_queries[0]}, {of_queries[1]}; they are (B, T, H) and (B, T). Give '
      'those of these queries.'
    )
  positions = positions.astype(jnp.int32)
  if name == 'xla':
    return base.received(q, k, lse, weights, positions, lengths, **options)
  return pallas_mosaic_tpu.received(
    q,
    k,
    lse,
    weights,
    positions,
    lengths,
    block=block,
    interpret=interpret,
    **options,
  )


def choose(q: Any, k: Any, v: Any, *, chip: str | None = None) -> str:
  """The name of the implementation that None stands for.

  The kernel, on a TPU that it serves and where XLA is not to partition it; for
  fewer queries than a tile has, XLA's path, whose scores are few.
  """
  if q.shape[1] < _FEWEST:
    return 'xla'
  if pallas_mosaic_tpu.why_not(q, k, v, chip or targets.current()):
    return 'xla'
  return 'xla' if compat.is_partitioned() else 'pallas_mosaic_tpu'


def _rows(k, start, lengths):
  B, S = k.shape[:2]
  if start is None:
    start = jnp.zeros((B,), jnp.int32)
  if lengths is None:
    lengths = jnp.full((B,), S, jnp.int32)
  return start.astype(jnp.int32), lengths.astype(jnp.int32)


def _resolve(q, k, v, scale, implementation, chip):
  """Implementation, chip and the scale; all checks."""
  B, _, H, D = q.shape
  if k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, D) or H % k.shape[2]:
    raise ValueError(
      f'{_OP}: q {q.shape}, k {k.shape}, v {v.shape}; k and v are shaped '
      'alike, with the batch and head_dim of q, and their heads divide its '
      'heads. Reshape them to (B, S, Hkv, D).'
    )
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  chip = chip or targets.current()
  name = implementation or choose(q, k, v, chip=chip)
  if name != 'xla' and (why := pallas_mosaic_tpu.why_not(q, k, v, chip)):
    raise NotImplementedError(f'{_OP}: {name}: {why}')
  options: dict[str, Any] = {'scale': D**-0.5 if scale is None else scale}
  return name, chip, options

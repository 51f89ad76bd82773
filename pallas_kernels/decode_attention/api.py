"""decode_attention: a few new queries against a long, stored cache.

  s_t = q . k_t scale        p = softmax(s)        out = sum_t p_t v_t

Bytes that must move: sum over rows of length * Hkv * D * (bits_k + bits_v) / 8,
and their scales; queries and outputs are nothing beside them. Every element is
used by the H / Hkv queries of its head, for 2 H / Hkv multiply-adds: at any
format this is bound by memory, so a cache of b bits is 16 / b times as fast as
one of bfloat16 if it is unpacked where it is used. Scales never touch an
element: they multiply q, scores, probabilities or the output.

Worked: 131072 tokens, Hkv 8, D 128: bfloat16 537 MB, int8 270, int4 142, int2
at three bits with its scales 101.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, stored, targets
from pallas_kernels.decode_attention import base, pallas_mosaic_tpu

# A GPU form, 'pallas_mosaic_gpu', goes here and into `choose`.
IMPLEMENTATIONS = ('pallas_mosaic_tpu', 'xla')
_OP = 'decode_attention'
merge = base.merge


def decode_attention(
  q: jax.Array,
  k: stored.Stored,
  v: stored.Stored,
  lengths: jax.Array,
  *,
  positions: jax.Array | None = None,
  scale: float | None = None,
  window: int | None = None,
  softcap: float | None = None,
  ring: bool = False,
  table: jax.Array | None = None,
  selected: jax.Array | None = None,
  page_size: int | None = None,
  first: jax.Array | None = None,
  implementation: str | None = None,
  chip: str | None = None,
  block: pallas_mosaic_tpu.Block | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of q over what a cache holds: output and log-sum-exp.

  All queries see all tokens that are held, but for the window: the cache was
  there before them. Parts of a context (pools of other bits, a residual window,
  the new tokens) are attended to apart and put together by `merge`. One program
  serves all lengths. Slots behind a row's length may hold anything.

  Args:
    q: (B, T, H, D), T few.
    k, v: what is stored (stored.py), Hkv dividing H.
    lengths: (B,) int32 tokens held; of a ring, tokens it has seen.
    positions: (B, T) int32 of q; None: they follow the lengths. Only a window
      asks for them.
    scale: of the scores; None: 1 / sqrt(D).
    window: positions a query sees, itself counted; None: all.
    softcap: scores become softcap * tanh(scores / softcap).
    ring: whether slots are a ring.
    table: (B, N) int32, the pages of each row; k and v are then pools.
    selected: (B, N) int32, of a row's pages those to attend to; -1: none.
    page_size: slots of a selected page where there is no table.
    first: () int32, the row of k and v, or the page of the pools, where those
      of q begin: k and v may be the layers of a stack, one behind the other,
      which need not be cut apart. None: 0.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU compiled for; None: the one at hand.
    block: of the TPU form; None: by rule.
    interpret: runs the kernel in Pallas's interpreter, on any platform.

  Returns:
    (B, T, H, D) and (B, T, H), float32; 0 and -inf where nothing is seen.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  _check(q, k, v, lengths, ring, table, selected, page_size, first)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  B, T, _, D = q.shape
  chip = chip or targets.current()
  page = _page(k, table, selected, page_size)
  name = implementation or choose(
    q, k, v, pooled=table is not None, page_size=page, chip=chip
  )
  if positions is None:
    positions = lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
  oldest = jnp.zeros((B, T), jnp.int32)
  if window is not None:
    oldest = jnp.maximum(positions.astype(jnp.int32) - window + 1, 0)
  scale = D**-0.5 if scale is None else scale
  if table is not None and first is not None:
    table = table + first
  used = block or pallas_mosaic_tpu.Block()
  step = page or k.slots
  if name != 'xla':
    reason = pallas_mosaic_tpu.why_not(q, k, v, table is not None, page, chip)
    if reason:
      raise NotImplementedError(f'{_OP}: {name}: {reason}')
    used = block or pallas_mosaic_tpu.pick_block(k, page, B, chip)
    step = page or used.tokens
  rows = table.shape[1] if table is not None else k.slots // step
  seen = stored.visits(
    lengths,
    page=step,
    pages=rows,
    table=table,
    selected=selected,
    ring=k.slots if ring else 0,
  )
  options: dict[str, Any] = {
    'page': step,
    'pooled': table is not None,
    'ring': k.slots if ring else 0,
    'softcap': softcap,
  }
  if name == 'xla':
    q = q.astype(jnp.float32) * scale
    if first is not None and table is None:
      k, v = (stored.take_rows(x, first, B) for x in (k, v))
    return base.decode_attention(q, k, v, seen, oldest, **options)
  return pallas_mosaic_tpu.decode_attention(
    q,
    k,
    v,
    seen,
    oldest if window is not None else None,
    first=None if table is not None else first,
    scale=scale,
    in_order=table is None and selected is None,
    block=used,
    interpret=interpret,
    **options,
  )


def choose(
  q: Any,
  k: stored.Stored,
  v: stored.Stored,
  *,
  pooled: bool = False,
  page_size: int | None = None,
  chip: str | None = None,
) -> str:
  """The name of the implementation that None stands for.

  The kernel, on a TPU and for a layout that it serves, where XLA is not to
  partition it. Everywhere else 'xla'.

  Args:
    q: array or ShapeDtypeStruct (B, T, H, D).
    k, v: of arrays or ShapeDtypeStructs.
    pooled: whether there is a table.
    page_size: slots of a page, where pages are chosen.
    chip: the TPU compiled for; None: the one at hand.
  """
  chip = chip or targets.current()
  page = k.slots if pooled else page_size
  if pallas_mosaic_tpu.why_not(q, k, v, pooled, page, chip):
    return 'xla'
  return 'xla' if compat.is_partitioned() else 'pallas_mosaic_tpu'


def nbytes(k: stored.Stored, v: stored.Stored, tokens: int) -> int:
  """Bytes that must be read of so many tokens of one row."""
  arrays = [
    a
    for x in (k, v)
    for a in (x.codes, x.scale, x.offset, x.norm)
    if a is not None
  ]
  total = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in arrays)
  return total * tokens // k.slots


def _page(k, table, selected, page_size):
  """Slots of a page; None: a row is one run."""
  if table is not None:
    return k.slots
  return page_size if selected is not None else None


def _check(q, k, v, lengths, ring, table, selected, page_size, first):
  stored.check(_OP, 'k', k)
  stored.check(_OP, 'v', v)
  B, _, H, D = q.shape
  same = k.codes.shape[:3] == v.codes.shape[:3]
  if not same or (k.head_dim, v.head_dim) != (D, D) or H % k.heads:
    raise ValueError(
      f'{_OP}: q {q.shape}, codes of k {k.codes.shape} at {k.bits} bits, of v '
      f'{v.codes.shape} at {v.bits}; slots and heads of k and v must be the '
      'same, their head_dim that of q, and their heads divide its heads. Make '
      "the cache from the model's config."
    )
  rows = k.codes.shape[0] if table is None else table.shape[0]
  if first is not None and table is None:
    if first.shape or rows % B:
      raise ValueError(
        f'{_OP}: first {first.shape} with {rows} rows of keys for a q of {B}; '
        'it is one number, and a stack has whole layers of rows. Give the '
        "layer's number times the batch."
      )
    rows = B
  if lengths.shape != (B,) or rows != B:
    raise ValueError(
      f'{_OP}: lengths {lengths.shape} and {rows} rows of keys for a q of {B}; '
      'there must be one of each for a row. Make the cache for this batch.'
    )
  if v.norm is not None:
    raise ValueError(
      f'{_OP}: v has norms; only keys may. Fold them into the scale.'
    )
  if ring and (table is not None or selected is not None):
    raise ValueError(
      f'{_OP}: ring=True with pages; a ring is one run of slots. Leave out '
      'table and selected.'
    )
  chosen = table is None and selected is not None
  if chosen and (not page_size or k.slots % page_size):
    raise ValueError(
      f'{_OP}: page_size={page_size} with {k.slots} slots; it must divide '
      'them. Give the size that the pages were scored with.'
    )
  for name, x in (('k', k), ('v', v)):
    if selected is not None and page_size and page_size % x.tokens:
      raise ValueError(
        f'{_OP}: page_size={page_size}, groups of {x.tokens} tokens in {name}; '
        'a page must be whole groups. Use a multiple.'
      )

"""select_topk: which pages or tokens of a row to attend to.

The places of the k largest scores, in the order of the row, as decode_attention
takes them in `selected`. Nothing is sorted: the k-th largest score is found by
bisecting its bits, 32 passes over a row that lies on chip, and what is above it
is counted. Traffic: the scores, once, and the places.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, targets
from pallas_kernels.select_topk import base, pallas_mosaic_tpu

# A GPU form, 'pallas_mosaic_gpu', goes here and into `choose`.
IMPLEMENTATIONS = ('pallas_mosaic_tpu', 'xla')
_OP = 'select_topk'


def select_topk(
  scores: jax.Array,
  k: int,
  lengths: jax.Array | None = None,
  *,
  implementation: str | None = None,
  chip: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Places of the k largest scores of each row, rising; of equals the first.

  Args:
    scores: (..., S) floating, no NaN where a slot is held.
    k: 1..S.
    lengths: (...) int32 slots that are held; None: S. Where there are fewer
      than k the last places are -1.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter, on any platform.

  Returns:
    (..., k) int32.

  Raises:
    ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  *lead, S = scores.shape
  if not 1 <= k <= S:
    raise ValueError(
      f'{_OP}: k={k} of {S} scores; allowed 1..{S}. Give a smaller budget.'
    )
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  if lengths is None:
    lengths = jnp.full(lead, S, jnp.int32)
  if lengths.shape != tuple(lead):
    raise ValueError(
      f'{_OP}: lengths {lengths.shape} for scores {scores.shape}; there is one '
      'for each row. Broadcast them.'
    )
  chip = chip or targets.current()
  flat = scores.reshape(-1, S).astype(jnp.float32)
  rows = lengths.reshape(-1).astype(jnp.int32)
  name = implementation or choose(scores, chip=chip)
  if name == 'xla':
    places = base.select_topk(flat, k, rows)
  else:
    if reason := pallas_mosaic_tpu.why_not(scores, chip):
      raise NotImplementedError(f'{_OP}: {name}: {reason}')
    places = pallas_mosaic_tpu.select_topk(flat, k, rows, interpret=interpret)
  return places.reshape(*lead, k)


def choose(scores: Any, *, chip: str | None = None) -> str:
  """The name of the implementation that None stands for."""
  if pallas_mosaic_tpu.why_not(scores, chip or targets.current()):
    return 'xla'
  return 'xla' if compat.is_partitioned() else 'pallas_mosaic_tpu'

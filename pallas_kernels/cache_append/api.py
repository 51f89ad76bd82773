"""cache_append: the token of a decoding step into a cache, in place.

Moves one token of each row, or the slots around it (at most 128) where tokens
lie along lanes or sublanes; never the cache, if it is donated. A slot past the
end is dropped.
"""

from typing import Any

import jax

from pallas_kernels import compat, targets
from pallas_kernels.cache_append import base, pallas_mosaic_tpu

# A GPU form, 'pallas_mosaic_gpu', goes here and into `choose`.
IMPLEMENTATIONS = ('pallas_mosaic_tpu', 'xla')
_OP = 'cache_append'


def cache_append(
  cache: jax.Array,
  new: jax.Array,
  slots: jax.Array,
  *,
  implementation: str | None = None,
  chip: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """One token a row: cache[b, slots[b]] = new[b].

  Args:
    cache: (B, S, Hkv, W), codes or scales or norms.
    new: (B, Hkv, W) of its dtype.
    slots: (B,) int32; at or past S: nothing is written.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter, on any platform.

  Returns:
    The cache; the same memory under jit, where it was donated.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  B, _, Hkv, W = cache.shape
  if new.shape != (B, Hkv, W) or slots.shape != (B,):
    raise ValueError(
      f'{_OP}: new {new.shape}, slots {slots.shape} for a cache {cache.shape}; '
      f'they are {(B, Hkv, W)} and {(B,)}. Append one token of each row.'
    )
  if new.dtype != cache.dtype:
    raise TypeError(
      f'{_OP}: new is {new.dtype}, the cache {cache.dtype}; they must be the '
      'same. Encode or cast it first.'
    )
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  chip = chip or targets.current()
  name = implementation or choose(cache, chip=chip)
  if name == 'xla':
    return base.cache_append(cache, new, slots)
  if reason := pallas_mosaic_tpu.why_not(cache, chip):
    raise NotImplementedError(f'{_OP}: {name}: {reason}')
  return pallas_mosaic_tpu.cache_append(cache, new, slots, interpret=interpret)


def choose(cache: Any, *, chip: str | None = None) -> str:
  """The name of the implementation that None stands for."""
  if pallas_mosaic_tpu.why_not(cache, chip or targets.current()):
    return 'xla'
  return 'xla' if compat.is_partitioned() else 'pallas_mosaic_tpu'

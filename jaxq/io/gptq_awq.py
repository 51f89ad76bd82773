"""AutoGPTQ and AutoAWQ tensors as QArrays, their integers untouched.

  GPTQ  qweight int32 (K*b/32, N), a dense stream of bits along K
        qzeros  int32 (K/G, N*b/32), along N; less one in version 1
        scales  (K/G, N); g_idx (K,), the group of each row
  AWQ   qweight int32 (K, N/8), qzeros int32 (K/G, N/8), scales (K/G, N);
        nibble i of a word is its column (0, 2, 4, 6, 1, 3, 5, 7)[i]

Both mean w = (code - zero_point) * scale. Where every zero point is 2^(b-1) the
QArray is symmetric, with codes less that.

Version 1 of GPTQ's format stores zero points less one, in the arithmetic of
whole words: a zero point of 0 borrows from its neighbour. Adding one to every
field of a word (with carries) is the exact inverse; field by field would not
be. Three bits straddle words and are added field by field.

Groups out of order (desc_act): rows are sorted by group, and the linear gets
'permute', the order in which it takes its inputs (jaxq.nn.linear).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.io import compressed_tensors, words
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib

Tensors = Mapping[str, np.ndarray]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_BITS = (2, 3, 4, 8)
GPTQ_VERSIONS = ('gptq', 'gptq_v2')


def check_gptq(config: Mapping[str, Any], where: str) -> None:
  """Raises unless `config` is a quantization_config that read_gptq takes.

  Raises:
    NotImplementedError: another layout or number of bits.
  """
  _check(config, 'bits', GPTQ_BITS, where)
  _check(config, 'checkpoint_format', (None, *GPTQ_VERSIONS), where)
  if config.get('is_marlin_format'):
    _refuse(where, 'is_marlin_format=True', '[False]')


def check_awq(config: Mapping[str, Any], where: str) -> None:
  """As check_gptq, for read_awq."""
  config = {**config, 'bits': config.get('bits', config.get('w_bit'))}
  _check(config, 'bits', (4,), where)
  version = str(config.get('version') or 'gemm').lower()
  if version != 'gemm':
    _refuse(where, f'version={version!r}', "['gemm']")


def read_gptq(
  tensors: Tensors, config: Mapping[str, Any], where: str
) -> tuple[qarray.QArray, np.ndarray | None]:
  """One linear of a GPTQ checkpoint.

  Args:
    tensors: qweight, qzeros, scales and perhaps g_idx of the module.
    config: the quantization_config.
    where: the module, for messages.

  Returns:
    The kernel (K, N) with NumPy leaves, and the order of its inputs (K,) int32
    where it is not the natural one.

  Raises:
    ValueError: tensors missing or contradicting each other.
    NotImplementedError: groups of unequal size.
  """
  _check_tensors(tensors, ('qweight', 'qzeros', 'scales'), where)
  bits = int(config['bits'])
  qweight, scales = tensors['qweight'], tensors['scales']
  K, N = qweight.shape[0] * 32 // bits, qweight.shape[1]
  codes = words.unpack(qweight.T, bits, K).T  # (K, N)
  version_1 = config.get('checkpoint_format', 'gptq') != 'gptq_v2'
  zeros = _gptq_zeros(tensors['qzeros'], bits, N, version_1)
  group_size = _group_size(K, N, scales, zeros, where)
  permute = None
  if 'g_idx' in tensors:
    permute = _order(tensors['g_idx'], K, group_size, where)
  if permute is not None:
    codes = codes[permute]
  return _assemble(codes, scales, zeros, bits, group_size), permute


def read_awq(
  tensors: Tensors, config: Mapping[str, Any], where: str
) -> tuple[qarray.QArray, np.ndarray | None]:
  """One linear of an AWQ checkpoint; as read_gptq, and never permuted."""
  del config  # Checked by check_awq; the shapes say the rest.
  _check_tensors(tensors, ('qweight', 'scales'), where)
  codes = _awq_fields(tensors['qweight'])  # (K, N)
  K, N = codes.shape
  scales = tensors['scales']
  zeros = np.full(scales.shape, 8, np.uint8)
  if 'qzeros' in tensors:
    zeros = _awq_fields(tensors['qzeros'])
  group_size = _group_size(K, N, scales, zeros, where)
  return _assemble(codes, scales, zeros, 4, group_size), None


def _gptq_zeros(
  qzeros: np.ndarray, bits: int, n: int, version_1: bool
) -> np.ndarray:
  """(K/G, N*b/32) int32 -> zero points (K/G, N) uint8."""
  if version_1 and bits != 3:
    ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
    stored = np.ascontiguousarray(qzeros).view(np.uint32)
    return words.unpack((stored + ones).view(np.int32), bits, n)
  zeros = words.unpack(qzeros, bits, n)
  return (zeros + version_1) & np.uint8(2**bits - 1)


def _awq_fields(packed: np.ndarray) -> np.ndarray:
  """(R, N/8) int32 -> (R, N) uint8, columns in their own order."""
  rows = packed.shape[0]
  fields = words.unpack(packed, 4, packed.shape[1] * 8).reshape(rows, -1, 8)
  return fields[..., np.argsort(AWQ_ORDER)].reshape(rows, -1)


def _order(
  g_idx: np.ndarray, K: int, group_size: int, where: str
) -> np.ndarray | None:
  """The order (K,) that sorts rows by group; None if they are sorted."""
  if g_idx.shape != (K,):
    raise ValueError(
      f'{where}: g_idx has shape {g_idx.shape}; one group for each of {K} rows '
      'is needed. Fetch the file again.'
    )
  sizes = np.bincount(g_idx, minlength=K // group_size)
  if np.any(sizes != group_size):
    raise NotImplementedError(
      f'{where}: g_idx makes groups of {sizes.min()} to {sizes.max()} rows; '
      f'allowed are groups of {group_size} rows each. Use another checkpoint.'
    )
  order = np.argsort(g_idx, kind='stable').astype(np.int32)
  return None if np.array_equal(order, np.arange(K)) else order


def _group_size(
  K: int, N: int, scales: np.ndarray, zeros: np.ndarray, where: str
) -> int:
  groups = scales.shape[0]
  if scales.shape != zeros.shape or scales.shape[1] != N or K % groups:
    raise ValueError(
      f'{where}: scales {scales.shape} and zero points {zeros.shape} for '
      f'weights ({K}, {N}); both must be (groups, {N}) with groups dividing '
      f'{K}. Fetch the file again.'
    )
  return K // groups


def _assemble(
  codes: np.ndarray,
  scales: np.ndarray,
  zeros: np.ndarray,
  bits: int,
  group_size: int,
) -> qarray.QArray:
  """Codes from 0 (K, N), scales and zero points (K/G, N) -> QArray."""
  K = codes.shape[0]
  half = 2 ** (bits - 1)
  symmetric = bool(np.all(zeros == half))
  whole = group_size == K
  spec = spec_lib.QuantSpec(
    dtype=f'int{bits}',
    granularity='channel' if whole else 'group',
    group_size=-1 if whole else group_size,
    symmetric=symmetric,
  )
  if symmetric:
    codes = (codes.astype(np.int16) - half).astype(np.int8)
  return compressed_tensors.assemble(
    codes, scales, None if symmetric else zeros, spec
  )


def _check(
  config: Mapping[str, Any], key: str, allowed: tuple, where: str
) -> None:
  if config.get(key) not in allowed:
    _refuse(where, f'{key}={config.get(key)!r}', str(list(allowed)))


def _refuse(where: str, what: str, allowed: str) -> None:
  raise NotImplementedError(
    f'{where}: {what}; allowed are {allowed}. Use a checkpoint of one of these.'
  )


def _check_tensors(tensors: Tensors, names: tuple[str, ...], where: str):
  missing = [name for name in names if name not in tensors]
  if missing:
    raise ValueError(
      f'{where}: tensors {missing} are missing; the module has '
      f'{sorted(tensors)}. Fetch the file again.'
    )

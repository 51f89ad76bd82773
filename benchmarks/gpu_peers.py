"""What users of a GPU have today, timed beside the Hopper kernels.

XLA's bfloat16 product, XLA's chain of quantization, 8-bit product and scales,
and torch's int4 kernel where torch with CUDA is installed. Each is given its
weight in the layout that it likes.
"""

import dataclasses
import importlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import rows


def bfloat16_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """x (M, K) @ w (K, N) in bfloat16 with float32 sums."""
  y = jnp.matmul(x, w, preferred_element_type=jnp.float32)
  return y.astype(jnp.bfloat16)


def quantized_chain(
  x: jax.Array, w_nk: jax.Array, scale: jax.Array, x_format: str
) -> jax.Array:
  """x (M, K), codes (N, K), scale (1, N): each step is XLA's own.

  Both sides run along K, which XLA's products of 8 bits like best.
  """
  codes, x_scale = rows.quantize(x, x_format)
  sums = jnp.float32 if rows.is_float(x_format) else jnp.int32
  y = jax.lax.dot_general(
    codes, w_nk, (((1,), (1,)), ((), ())), preferred_element_type=sums
  )
  y = y.astype(jnp.float32) * x_scale * scale.astype(jnp.float32)
  return y.astype(jnp.bfloat16)


def stored_then_quantized(y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """y (M, K) float32, stored in bfloat16 -> int8 codes, scale (M, 1)."""
  stored = jax.lax.optimization_barrier(y.astype(jnp.bfloat16))
  return rows.quantize(stored, 'int8')


class TorchForm:
  """A form that torch runs; it is timed with torch's own events."""

  def time_us(
    self, x: jax.Array, sets: Sequence[Any], iterations: int
  ) -> float:
    """Median time of one call."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchInt4(TorchForm):
  """torch._weight_int4pack_mm, weights of its own drawing.

  Attributes:
    K, N: of the weight.
    group_size: rows that share a scale.
  """

  K: int
  N: int
  group_size: int

  def time_us(
    self, x: jax.Array, sets: Sequence[Any], iterations: int
  ) -> float:
    """Median time of one call; nan without torch and CUDA."""
    try:
      torch: Any = importlib.import_module('torch')
    except ImportError:
      return float('nan')
    if not torch.cuda.is_available():
      return float('nan')
    options: dict[str, Any] = {'device': 'cuda', 'dtype': torch.bfloat16}
    left = torch.randn(x.shape, **options)
    weights = [self._weight(torch, options) for _ in sets]

    def run():
      for packed, scales in weights:
        torch._weight_int4pack_mm(left, packed, self.group_size, scales)

    run()
    times = []
    for _ in range(iterations):
      start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
      start.record()
      run()
      end.record()
      torch.cuda.synchronize()
      times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / len(sets)

  def _weight(self, torch, options):
    """Codes in torch's tiles, and scale and zero of every group."""
    codes = torch.randint(0, 256, (self.N, self.K // 2), device='cuda')
    packed = torch._convert_weight_to_int4pack(codes.to(torch.uint8), 8)
    shape = (self.K // self.group_size, self.N, 2)
    return packed, torch.rand(shape, **options)

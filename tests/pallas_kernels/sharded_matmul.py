"""Both matmuls with K sharded over eight simulated devices, and on one.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
    python -m tests.pallas_kernels.sharded_matmul

Prints one JSON line per case: the largest difference from one device, relative
to the largest value, and the all-reduces of the program with their dtypes. A
process of its own, since the number of devices is fixed when JAX starts.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import rows
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.weight_only_matmul import api as weight_only
from tests.pallas_kernels import test_weight_only_matmul

M, K, N = 4, 2048, 128
INTERPRETED = {
  'implementation': 'pallas_mosaic_tpu',
  'chip': 'v5e',
  'interpret': True,
}


def cases():
  """Yields (name, function of (x, ..., axis_name), operands, their specs)."""
  along, whole = P('model', None), P(None, None)
  columns = P(None, 'model')
  for name, options in (
    ('kernel', INTERPRETED),
    ('xla', {'implementation': 'xla'}),
  ):
    x, q = test_weight_only_matmul.make(M, K, N, 4, 128, True)
    f = functools.partial(
      weight_only.weight_only_matmul,
      bits=4,
      group_size=128,
      out_dtype=jnp.float32,
      **options,
    )
    yield (
      f'weight_only {name}',
      f,
      (x, q.qvalue, q.scale),
      (columns, along, along),
    )
    x, q = test_weight_only_matmul.make(M, K, N, 8, -1, True)
    g = functools.partial(
      quantized.quantized_matmul, bits=8, out_dtype=jnp.float32, **options
    )
    yield f'dynamic {name}', g, (x, q.qvalue, q.scale), (columns, along, whole)
    codes, scale = rows.quantize(x, 'int8')

    def static(codes, qvalue, scale, x_scale, g=g, **kw):
      return g(codes, qvalue, scale, x_scale=x_scale, **kw)

    yield (
      f'static {name}',
      static,
      (codes, q.qvalue, q.scale, scale),
      (columns, along, whole, whole),
    )


def main():
  """Prints the lines."""
  mesh = Mesh(np.asarray(jax.devices()), ('model',))
  for name, f, operands, specs in cases():
    one = jax.jit(f)(*operands)
    sharded = jax.jit(
      jax.shard_map(
        functools.partial(f, axis_name='model'),
        mesh=mesh,
        in_specs=specs,
        out_specs=P(None, None),
        check_vma=False,
      )
    )
    text = sharded.lower(*operands).compile().as_text()
    sums = re.findall(r'= (\w+)\[[\d,]*\]\S* all-reduce\(', text)
    many = np.asarray(sharded(*operands))
    error = np.abs(many - np.asarray(one)).max() / np.abs(many).max()
    print(json.dumps({'case': name, 'error': float(error), 'sums': sums}))


if __name__ == '__main__':
  main()

"""Selects tokens on one device and on a mesh of eight, and compares.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
    python -m tests.tokens.sharded_selection

Prints one JSON line per case. A process of its own, since the number of devices
is fixed when JAX starts. Tokens lie over `model`.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.parallel import collectives
from jaxq.parallel import mesh as mesh_lib
from jaxq.tokens import primitives, sharded

B, N, D = 3, 64, 8


def main():
  """The cases: slots below and above those of a shard, ties, padding."""
  mesh = mesh_lib.choose('model:8')
  assert mesh is not None
  over = NamedSharding(mesh, PartitionSpec(None, 'model'))
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(B, N, D)), jnp.float32)
  scores = jnp.asarray(rng.integers(0, 6, (B, N)), jnp.float32)  # Many ties.
  mask = jnp.asarray(rng.random((B, N)) > 0.2).at[2].set(False)
  for k_max in (5, 24):
    k = jnp.array([k_max, 3, k_max])
    how: Any = {'mesh': mesh, 'axis': 'model'}
    select = jax.jit(
      functools.partial(sharded.select_topk, **how), static_argnums=2
    )
    gather = jax.jit(functools.partial(sharded.gather, **how))
    placed = [jax.device_put(a, over) for a in (scores, mask, x)]
    index, used = select(placed[0], placed[1], k_max, k)
    expected, expected_used = primitives.select_topk(scores, mask, k_max, k)
    compiled = gather.lower(placed[2], index).compile()
    found = collectives.collectives(compiled.as_text() or '', mesh)
    print(
      json.dumps(
        {
          'k_max': k_max,
          'same': bool(
            (index == expected).all() & (used == expected_used).all()
          ),
          'tokens': bool(
            (gather(placed[2], index) == primitives.gather(x, expected)).all()
          ),
          'moved': max(c.nbytes for c in found),
          'kinds': sorted({c.kind for c in found}),
        }
      )
    )


if __name__ == '__main__':
  main()

"""Decodes with caches on one device and on a 2 x 4 mesh, and compares.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
    python -m tests.kvcache.sharded_cache NAME...

Prints one JSON line per cache. A process of its own, since the number of
devices is fixed when JAX starts. Heads lie over `model`, rows over `data`.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import interface, kivi
from jaxq.parallel import mesh as mesh_lib
from models import decoder
from tests.kvcache import testing

CONFIG = decoder.DecoderConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=64,
  num_layers=2,
  num_heads=8,
  num_kv_heads=4,
  head_dim=testing.D,
)


def decode(variables, config, tokens, mesh):
  """Logits (B, T, V) with a cache; how its arrays lie; its collectives."""
  module = decoder.Decoder(CONFIG)
  B, T = tokens.shape
  caches = decoder.init_caches(CONFIG, (), B, 64, kv_cache=config)
  if mesh is not None:
    where = tuple(interface.shardings(cache, mesh) for cache in caches)
    caches = jax.device_put(caches, where)
    tokens = jax.device_put(tokens, mesh_lib.batch_sharding(mesh))
  apply = jax.jit(module.apply, donate_argnums=3)
  start, outs = 0, []
  for size in (T - 3, 1, 1, 1):
    positions = jnp.broadcast_to(start + jnp.arange(size)[None], (B, size))
    part = tokens[:, start : start + size]
    if size == 1 and start == T - 1:
      text = apply.lower(variables, part, positions, caches).compile().as_text()
    logits, caches = apply(variables, part, positions, caches)
    outs.append(np.asarray(logits))
    start += size
  specs = {
    jax.tree_util.keystr(path): str(getattr(leaf.sharding, 'spec', ''))
    for path, leaf in jax.tree_util.tree_flatten_with_path(caches[0])[0]
  }
  return np.concatenate(outs, axis=1), specs, text


def norms_alone(scope):
  """Collectives of an OScaR append, beside what attention costs."""
  mesh = mesh_lib.make_mesh('data:2,model:4')
  config = dataclasses.replace(testing.OSCAR, norm_scope=scope)
  shape = dataclasses.replace(testing.shape(), kv_heads=4)
  cache = config.init(shape)
  new = jnp.ones((testing.B, 16, 4, testing.D))
  update = interface.Update(k=new, v=new)
  layout = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('data', None, 'model', None)
  )
  where = interface.shardings(cache, mesh)
  compiled = (
    jax.jit(interface.append, out_shardings=where)
    .lower(
      jax.device_put(cache, where),
      jax.device_put(update, layout),
    )
    .compile()
  )
  return compiled.as_text().count('all-reduce(')


def compare(name):
  """One row of results: plain numbers and strings."""
  mesh = mesh_lib.make_mesh('data:2,model:4')
  config = (testing.CACHES | testing.SELECTING)[name]
  tokens = jax.random.randint(jax.random.key(1), (2, 36), 0, 64)
  module = decoder.Decoder(CONFIG)
  params = module.init(jax.random.key(0), tokens[:, :2])['params']
  rules = decoder.sharding_rules(CONFIG, 4)
  one, _, _ = decode({'params': params}, config, tokens, None)
  placed = mesh_lib.place({'params': params}, rules, mesh)
  many, specs, _ = decode(placed, config, tokens, mesh)
  return {
    'name': name,
    'error': float(np.max(np.abs(one - many))),
    'size': float(np.max(np.abs(one))),
    'specs': specs,
    'all_reduces': {
      scope: norms_alone(scope) if name == 'oscar' else 0
      for scope in kivi.NORM_SCOPES
    },
  }


def main(argv):
  """Prints a JSON line for each cache."""
  for name in argv[1:]:
    print(json.dumps(compare(name)), flush=True)


if __name__ == '__main__':
  main(sys.argv)

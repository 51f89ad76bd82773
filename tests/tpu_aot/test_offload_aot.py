"""A decoding step with its keys and values in host memory, by the TPU compiler.

Optimization level O1, as in test_calibration_aot: a third of the time.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.kvcache import double_sparsity, interface
from models import decoder
from pallas_kernels import ahead_of_time, targets

pytestmark = pytest.mark.slow

B, S, HKV, D, LAYERS = 1, 8192, 2, 64, 5
CONFIG = decoder.DecoderConfig(
  vocab_size=256,
  hidden_size=128,
  intermediate_size=256,
  num_layers=LAYERS,
  num_heads=4,
  num_kv_heads=HKV,
  head_dim=D,
)
KEPT = double_sparsity.DoubleSparsityConfig(channels='random')
OFFLOADED = dataclasses.replace(KEPT, offload=True)
FAR = (LAYERS - 2) * 2 * B * S * HKV * D * 2  # Bytes; layers 0 and 1 are dense.


class OffloadAotTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    level = jax.config.jax_optimization_level
    self.addCleanup(jax.config.update, 'jax_optimization_level', level)
    jax.config.update('jax_optimization_level', 'O1')

  def compile(self, config, T=1):
    """One step of T tokens, the caches donated."""
    try:
      device = ahead_of_time.devices(targets.get('v5e').topology)[0]
    except NotImplementedError as e:
      self.skipTest(str(e))
    mesh = Mesh(np.array([[device]]), ('data', 'model'))
    whole = NamedSharding(mesh, PartitionSpec())
    at = lambda a, s=whole: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    module = decoder.Decoder(CONFIG, dtype=jnp.bfloat16)
    caches = jax.eval_shape(
      lambda: decoder.init_caches(CONFIG, (), B, S, jnp.bfloat16, config)
    )
    where = tuple(interface.shardings(cache, mesh) for cache in caches)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=whole)
    variables = jax.eval_shape(
      lambda: module.init(jax.random.key(0), jnp.zeros((B, T), jnp.int32))
    )
    return (
      jax.jit(module.apply, donate_argnums=3)
      .lower(
        jax.tree.map(at, variables),
        tokens,
        tokens,
        jax.tree.map(at, caches, where),
      )
      .compile()
    )

  def test_keys_and_values_are_arguments_in_host_memory(self):
    kept = self.compile(KEPT).memory_analysis()
    compiled = self.compile(dataclasses.replace(OFFLOADED, predict=True))
    memory = compiled.memory_analysis()
    saved = kept.argument_size_in_bytes - memory.argument_size_in_bytes
    self.assertBetween(saved, 0.99 * FAR, 1.01 * FAR)
    self.check_host(compiled)
    # What the device works with shrinks by what was moved away, too.
    self.assertLess(memory.temp_size_in_bytes, kept.temp_size_in_bytes - FAR)
    (_, _, _, (cache,)), _ = compiled.input_shardings
    kinds = [s.memory_kind for s in (cache.tokens.far_k, cache.tokens.far_v)]
    self.assertEqual(kinds, ['pinned_host'] * 2)

  def test_a_chunk_reads_the_host_block_by_block(self):
    self.check_host(self.compile(OFFLOADED, T=16))

  def check_host(self, compiled):
    """New tokens are written where the others lie; those never cross whole."""
    memory = compiled.memory_analysis()
    self.assertEqual(memory.host_argument_size_in_bytes, FAR)
    self.assertEqual(memory.host_alias_size_in_bytes, FAR)
    self.assertLess(memory.host_temp_size_in_bytes, FAR // 8)
    # The chip's arrays are tiled, T(..); those in host memory say S(5).
    shape = f'{LAYERS - 2},{B},{S},{HKV},{D}'
    layouts = re.findall(
      rf'(?:bf16|u16)\[{shape}\]{{([^}}]*)}}', compiled.as_text()
    )
    tiled = [layout for layout in layouts if 'T(' in layout]
    self.assertNotEmpty(tiled)
    self.assertEmpty([layout for layout in tiled if 'S(5)' not in layout])


if __name__ == '__main__':
  absltest.main()

"""The attention kernels compile for TPUs that are not there.

A cheap case of each; caches are long enough that a copy of one would show.
"""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from jaxq.kvcache import registry
from models import decoder
from pallas_kernels import ahead_of_time, stored, targets
from pallas_kernels.cache_append import api as append_api
from pallas_kernels.decode_attention import api as decode_api
from pallas_kernels.prefill_attention import api as prefill_api
from pallas_kernels.select_topk import api as topk_api
from tests.decode import testing as decode_testing

pytestmark = pytest.mark.slow
KERNEL = 'pallas_mosaic_tpu'
B, S = 1, 16384
BF16 = jnp.bfloat16


def nbytes(shapes):
  """Of (shape, dtype)s."""
  return sum(math.prod(s) * jnp.dtype(d).itemsize for s, d in shapes)


class AttentionAotTest(parameterized.TestCase):
  def compile(self, chip, f, shapes, **options):
    try:
      device = ahead_of_time.devices(targets.get(chip).topology)[0]
    except NotImplementedError as e:
      self.skipTest(str(e))
    sharding = jax.sharding.SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(*s, sharding=sharding) for s in shapes]
    return jax.jit(f, **options).lower(*arrays).compile().memory_analysis()

  @parameterized.parameters(
    ('v6e', 16, 2, 128),  # In rows.
    ('v5p', 8, 4, 128),
    ('v5e', 16, 3, 64),  # In lanes.
    ('tpu7x', 4, 2, 128),
    ('v5e', 2, 2, 128),
  )
  def test_decode(self, chip, bits, Hkv, D):
    codes = BF16 if bits == 16 else jnp.uint8
    width = D * min(bits, 8) // 8
    names = ['codes', 'scale', 'offset'][: 1 if bits == 16 else 3]
    sides, shapes = [], []
    for name in 'kv':
      scale = (B, S, Hkv, 1)
      if bits == 2:  # As KIVI has them, with norms.
        scale = (B, S // 32, Hkv, D) if name == 'k' else (B, S, Hkv, D // 32)
      kinds = [((B, S, Hkv, width), codes), (scale, 'float16')]
      kinds.append(kinds[1])
      sides.append(dict(zip(names, kinds, strict=False)))
      if bits == 2 and name == 'k':
        sides[0]['norm'] = ((B, S, 1, 1), jnp.float32)
      shapes += sides[-1].values()

    def f(q, lengths, *leaves):
      leaves = iter(leaves)
      k, v = (
        stored.Stored(**{n: next(leaves) for n in side}, bits=bits)
        for side in sides
      )
      return decode_api.decode_attention(
        q, k, v, lengths, implementation=KERNEL, chip=chip
      )

    q = ((B, 1, 4 * Hkv, D), BF16)
    memory = self.compile(chip, f, [q, ((B,), jnp.int32), *shapes])
    # Nothing of the size of codes; float16 scales are seen as integers.
    self.assertLess(memory.temp_size_in_bytes, nbytes(shapes) // 3)

  def test_decode_of_pages(self):
    pool = ((S // 64, 64, 8, 128), BF16)

    def f(q, lengths, table, k, v):
      k, v = stored.Stored(codes=k), stored.Stored(codes=v)
      return decode_api.decode_attention(
        q, k, v, lengths, table=table, implementation=KERNEL, chip='v5e'
      )

    i32 = jnp.int32
    shapes = [((2, 1, 32, 128), BF16), ((2,), i32), ((2, S // 128), i32)]
    memory = self.compile('v5e', f, [*shapes, pool, pool])
    self.assertLess(memory.temp_size_in_bytes, nbytes([pool]) // 8)

  @parameterized.parameters(
    ('v5e', (8, 128), 'bfloat16'),
    ('v5p', (1, 128), 'bfloat16'),
    ('v6e', (8, 32), 'uint8'),
  )
  def test_append_is_in_place(self, chip, sizes, dtype):
    cache = ((2, S, *sizes), dtype)
    f = functools.partial(
      append_api.cache_append, implementation=KERNEL, chip=chip
    )
    shapes = [cache, ((2, *sizes), dtype), ((2,), jnp.int32)]
    memory = self.compile(chip, f, shapes, donate_argnums=0)
    # No pass over it either: integers of its bits would be one.
    self.assertEqual(memory.alias_size_in_bytes, nbytes([cache]))
    self.assertLess(memory.temp_size_in_bytes, nbytes([cache]) // 8)

  def test_prefill(self):
    q, kv = ((1, 1024, 8, 128), BF16), ((1, 1024, 2, 128), BF16)

    def f(q, k, v):
      options = {'implementation': KERNEL, 'chip': 'v5e', 'window': 700}
      out, lse = prefill_api.prefill_attention(q, k, v, **options)
      return out, prefill_api.received(q, k, lse, **options)

    memory = self.compile('v5e', f, [q, kv, kv])
    scores = 4 * 8 * 1024 * 1024
    self.assertLess(memory.temp_size_in_bytes, scores // 2)

  def test_received_of_probes(self):
    shapes = [((1, 1024, 8, 128), BF16), ((1, 16384, 2, 128), BF16)]
    shapes += [((1, 1024, 8), jnp.float32), ((1, 1024), jnp.int32)]

    def f(q, k, lse, positions):
      return prefill_api.received(
        q, k, lse, positions=positions, implementation=KERNEL, chip='v6e'
      )

    memory = self.compile('v6e', f, shapes)
    self.assertLess(memory.temp_size_in_bytes, 8 * 1024 * 16384)

  @parameterized.product(name=('contiguous', 'int8'), T=(1, 256))
  def test_a_decoder_writes_its_cache_in_place(self, name, T):
    try:
      device = ahead_of_time.devices(targets.get('v5e').topology)[0]
    except NotImplementedError as e:
      self.skipTest(str(e))
    L, capacity = 8, 65536
    config = dataclasses.replace(
      decode_testing.CONFIG,
      head_dim=128,
      num_heads=16,
      num_kv_heads=8,
      num_layers=L,
    )
    module = decoder.Decoder(config, dtype=BF16)
    variables, caches = jax.eval_shape(
      lambda: (
        module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)),
        decoder.init_caches(
          config, (L,), 2, capacity, BF16, registry.parse(name)
        ),
      )
    )
    cast = lambda a: jax.ShapeDtypeStruct(a.shape, BF16)
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    args = jax.tree.map(cast, variables), tokens, tokens, caches
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args
    )
    # As on the chip: None picks.
    with mock.patch.object(targets, 'current', return_value='v5e'):
      step = jax.jit(module.apply, donate_argnums=3).lower(*args)
    compiled = step.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    served = ('cache_append', 'decode_attention')
    for kernel in served if T == 1 else ('prefill_attention',):
      call = re.search(rf'%\w*{kernel}[\w.]* = .* custom-call\(', text)
      self.assertIsNotNone(call, kernel)
    size = nbytes((a.shape, a.dtype) for a in jax.tree.leaves(caches))
    self.assertGreaterEqual(memory.alias_size_in_bytes, size)
    # A kernel reads a layer where the stack lies; else it is taken out, 1 / 8.
    most = size // L // 100 if T == 1 else size // 4
    self.assertLess(memory.temp_size_in_bytes, most)

  def test_select_topk(self):
    f = functools.partial(
      topk_api.select_topk, k=256, implementation=KERNEL, chip='v5e'
    )
    scores = ((1, 8, S), jnp.float32)
    memory = self.compile('v5e', f, [scores])
    # Scores are read where they lie: no sorted copy of them.
    self.assertLess(memory.temp_size_in_bytes, nbytes([scores]))


if __name__ == '__main__':
  absltest.main()

"""Tests of kernel_packing and kernel_weight: what is packed, and its way back.

No GPU is needed: the chip is named, as a loader on it would find it.
"""

import pathlib
import tempfile
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import Mesh, PartitionSpec

from jaxq.io import trees
from jaxq.nn import (
  kernel_matmul,
  kernel_packing,
  kernel_weight,
  linear,
  matmul,
)
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import mesh as mesh_lib
from models import loading
from pallas_kernels import compat, hopper, targets

pytestmark = pytest.mark.smoke  # The newest JAX has what the oldest lacks.
GPU = 'pallas_mosaic_gpu'
TOKEN = spec_lib.QuantSpec(dtype='int8', granularity='token')
FP8_TOKEN = spec_lib.QuantSpec(dtype='fp8_e4m3', granularity='token')
DYNAMIC = linear.ActQuant(None, None, TOKEN)
K, N = 256, 128


def spec_of(dtype, group_size=-1, symmetric=True):
  return spec_lib.QuantSpec(
    dtype=dtype,
    granularity='group' if group_size > 0 else 'channel',
    group_size=group_size,
    symmetric=symmetric,
  )


def kernel(spec, *lead, size=(K, N)):
  w = jax.random.normal(jax.random.key(1), (*lead, *size)) / K**0.5
  return qarray.quantize(w, spec)


def x_of(*lead, dtype='bfloat16'):
  return jax.random.normal(jax.random.key(0), (*lead, K), dtype)


def needs_mosaic_gpu(test):
  if reason := hopper.why_not('h100'):
    test.skipTest(f'no Mosaic GPU: {reason}')


def same(a, b):
  """Equal trees of equal dtypes."""
  form: Any = jax.tree.structure(a)
  assert form == jax.tree.structure(b)
  for got, want in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert got.dtype == want.dtype, (got.dtype, want.dtype)
    np.testing.assert_array_equal(got, want)


# spec of w, layout.
PACKED = (
  (spec_of('int4', 64), 'words'),
  (spec_of('int4', -1, False), 'words'),
  (spec_of('int8', 128, False), 'words'),
  (spec_of('int2', 128), 'words'),
  (spec_of('int8'), 'rows'),
  (spec_of('fp8_e4m3'), 'rows'),
)


class PackedArrayTest(parameterized.TestCase):
  @parameterized.parameters(*PACKED)
  def test_round_trip_of_stacked_weights(self, spec, layout):
    q = kernel(spec, 2)
    w = kernel_weight.pack(q, layout)
    self.assertEqual(w.layout, layout)
    same(kernel_weight.unpack(w), q)
    same(qarray.codes(w), qarray.codes(q))
    same(qarray.dequantize(w), qarray.dequantize(q))
    self.assertEqual(qarray.nbytes(w), qarray.nbytes(q))
    self.assertEqual(qarray.bits_per_weight(w), qarray.bits_per_weight(q))

  def test_every_way_to_multiply_takes_it(self):
    x, q = x_of(2, 3), kernel(spec_of('int8'))
    for layout in kernel_weight.LAYOUTS:
      w = kernel_weight.pack(q, layout)
      for act in (None, DYNAMIC, linear.StepInput(TOKEN)):
        same(matmul.matmul(x, w, act), matmul.matmul(x, q, act))
      for name in ('float', 'integer'):
        got, want = (
          matmul.matmul(x, a, DYNAMIC, implementation=name) for a in (w, q)
        )
        same(got, want)

  def test_wrong_layout(self):
    with self.assertRaisesRegex(ValueError, "layout='tiles'; allowed .'rows'"):
      kernel_weight.pack(kernel(spec_of('int8')), 'tiles')

  def test_checkpoints_refuse_it(self):
    w = kernel_weight.pack(kernel(spec_of('int8')), 'rows')
    with tempfile.TemporaryDirectory() as folder:
      with self.assertRaisesRegex(
        TypeError, r'kernel is a PackedArray; a tree may hold dicts.*QArray'
      ):
        trees.save(pathlib.Path(folder), {'mlp': {'kernel': w}})

  @parameterized.parameters(('words', 'int4'), ('rows', 'int8'))
  def test_sharding_follows_the_matrix(self, layout, dtype):
    """A shard is what its part of the matrix would be packed to."""
    q = kernel(spec_of(dtype, 128 if layout == 'words' else -1), 3)
    w = kernel_weight.pack(q, layout)
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = mock.Mock(wraps=Mesh(devices, mesh_lib.AXES))
    mesh.shape = {'data': 1, 'model': 2}
    with mock.patch.object(
      mesh_lib, 'NamedSharding', side_effect=lambda _, spec: spec
    ):
      by_columns, by_rows, by_tile = (
        mesh_lib.shardings({'kernel': a}, [('kernel', spec)], mesh)['kernel']
        for a, spec in (
          (w, PartitionSpec(None, 'model')),
          (w, PartitionSpec('model', None)),
          (
            kernel_weight.pack(kernel(q.spec, 3, size=(K, 64)), layout),
            PartitionSpec(None, 'model'),
          ),
        )
      )
    columns, rows = {
      'words': (
        PartitionSpec(None, 'model', None, None, None),
        PartitionSpec(None, None, 'model', None, None),
      ),
      'rows': (
        PartitionSpec(None, 'model', None, None),
        PartitionSpec(None, None, None, 'model'),
      ),
    }[layout]
    self.assertEqual(by_columns.qvalue, columns)
    self.assertEqual(by_columns.scale, PartitionSpec(None, None, 'model'))
    self.assertEqual(by_rows.qvalue, rows)
    # A tile of 64 columns is whole.
    self.assertEqual(by_tile.scale, PartitionSpec(None, None, None))
    half = kernel_weight.pack(
      qarray.from_codes(
        qarray.codes(q)[..., : N // 2],
        qarray.effective_scale(q)[..., : N // 2],
        None,
        q.spec,
      ),
      layout,
    )
    np.testing.assert_array_equal(half.qvalue, w.qvalue[:, : N // 128])


def model_variables():
  """Two linears of each kind, stacked; a norm; an embedding."""
  return {
    'params': {
      'embed': {'embedding': kernel(spec_of('int4', 64))},
      'blocks_0': {
        'norm': {'scale': jnp.ones((2, K))},
        'q_proj': {'kernel': kernel(spec_of('int4', 64), 2)},
        'up_proj': {'kernel': kernel(spec_of('int8'), 2)},
        'down_proj': {'kernel': kernel(spec_of('int4'), 2)},
        'o_proj': {'kernel': jnp.ones((2, K, N))},
      },
    },
    'quant': {
      'blocks_0': {
        'up_proj': {'input': DYNAMIC},
        'down_proj': {'input': DYNAMIC},
      }
    },
  }


class PackTest(parameterized.TestCase):
  def test_a_model(self):
    needs_mosaic_gpu(self)
    variables = model_variables()
    packed = kernel_packing.pack(variables, 'h100')
    block = packed['params']['blocks_0']
    layouts = {
      name: getattr(block[name]['kernel'], 'layout', 'stored')
      for name in block
      if 'proj' in name
    }
    self.assertEqual(
      layouts,
      {
        'q_proj': 'words',
        'up_proj': 'rows',
        'down_proj': 'words',
        'o_proj': 'stored',
      },
    )
    same(packed['params']['embed'], variables['params']['embed'])
    same(kernel_packing.unpack(packed), variables)
    same(kernel_packing.pack(packed, 'h100'), packed)  # Again: nothing to do.

  @parameterized.parameters('cpu', 'v5e', 'a100')
  def test_other_chips_keep_what_is_stored(self, chip):
    variables = model_variables()
    same(kernel_packing.pack(variables, chip), variables)

  @parameterized.named_parameters(
    ('w4a16', spec_of('int4', 128), None, 'words'),
    ('w4a8', spec_of('int4', 128), DYNAMIC, 'words'),
    ('w8a8', spec_of('int8'), DYNAMIC, 'rows'),
    (
      'fp8',
      spec_of('fp8_e4m3'),
      linear.ActQuant(None, None, FP8_TOKEN),
      'rows',
    ),
    ('steps', spec_of('int8'), linear.StepInput(TOKEN), 'rows'),
    ('int3', spec_of('int3'), None, ''),
    ('binary', spec_of('binary', 128), None, ''),
    ('group', spec_of('int4', 16), None, ''),
    ('zero_points', spec_of('int8', -1, False), DYNAMIC, ''),
    ('fp8_alone', spec_of('fp8_e4m3'), None, ''),
  )
  def test_layouts(self, spec, act, layout):
    needs_mosaic_gpu(self)
    found = kernel_packing.layout_for(kernel(spec), act, 'h200')
    self.assertEqual(found, layout)

  def test_sizes_that_tiles_do_not_divide_stay(self):
    needs_mosaic_gpu(self)
    for size in ((K, 96), (192, N)):
      w = kernel(spec_of('int4', 64), size=size)
      self.assertEqual(kernel_packing.layout_for(w, None, 'h100'), '')

  def test_several_devices_without_a_shard_map_stay(self):
    needs_mosaic_gpu(self)
    with mock.patch.object(compat, 'is_partitioned', lambda: True):
      w = kernel(spec_of('int4', 64))
      self.assertEqual(kernel_packing.layout_for(w, None, 'h100'), '')

  def test_the_loader_packs_for_the_chip_at_hand(self):
    needs_mosaic_gpu(self)
    variables = model_variables()
    same(loading._packed(variables), variables)  # On a CPU.
    with mock.patch.object(targets, 'current', lambda: 'h100'):
      packed = loading._packed(variables)
    kernels = packed['params']['blocks_0']
    self.assertIsInstance(
      kernels['q_proj']['kernel'], kernel_weight.PackedArray
    )
    self.assertIsInstance(kernels['up_proj']['kernel'].qvalue, np.ndarray)


class ChoiceTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('w4a16', spec_of('int4', 128), None),
    ('w4a8', spec_of('int4', 128), DYNAMIC),
    ('w8a8', spec_of('int8'), DYNAMIC),
  )
  def test_layers_take_the_kernel(self, spec, act):
    needs_mosaic_gpu(self)
    x, q = x_of(2, 3), kernel(spec)
    w = kernel_weight.pack(q, kernel_packing.layout_for(q, act, 'h100'))
    self.assertEqual(kernel_matmul.choose(x, w, act, 'h100'), GPU)
    self.assertEqual(kernel_matmul.choose(x, q, act, 'h100'), '')
    self.assertEqual(kernel_matmul.choose(x, w, act), '')  # On a CPU.
    y = kernel_matmul.matmul(x, w, act, chip='h100', interpret=True)
    want = matmul.matmul(x, q, act, implementation='float')
    self.assertEqual((y.shape, y.dtype), (want.shape, want.dtype))
    np.testing.assert_allclose(  # bfloat16 on both sides.
      y.astype(jnp.float32), want.astype(jnp.float32), atol=0.05
    )

  def test_quant_dense_lowers_to_the_kernel(self):
    """implementation=None, as on an H100."""
    needs_mosaic_gpu(self)
    q, x = kernel(spec_of('int4', 128)), x_of(1, 4)
    layer = linear.QuantDense(N)
    with mock.patch.object(targets, 'current', lambda: 'h100'):
      variables = kernel_packing.pack({'params': {'kernel': q}})
      lowered = (
        jax.jit(layer.apply)
        .trace(variables, x)
        .lower(lowering_platforms=('cuda',))
      )
    self.assertIn('mosaic_gpu', lowered.as_text())

  def test_codes_of_a_norm_find_the_kernel(self):
    needs_mosaic_gpu(self)
    w = kernel_weight.pack(kernel(spec_of('int8')), 'rows')
    choose = kernel_matmul.choose_codes
    self.assertEqual(choose((2, 3, K), w, TOKEN, 'h100'), GPU)
    self.assertEqual(kernel_matmul.named('h200'), GPU)
    self.assertEqual(kernel_matmul.named('v5e'), 'pallas_mosaic_tpu')


if __name__ == '__main__':
  absltest.main()

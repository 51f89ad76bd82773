"""Tests of jaxq.io.safetensors_slices, and of HfSource's lazy reading."""

import pathlib
import tempfile
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from jaxq.io import hf, safetensors_slices
from tests.io import model_files


class SlicesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, **tensors):
    path = self.folder / 'a.safetensors'
    safetensors.numpy.save_file(tensors, str(path))
    return path

  @parameterized.product(
    dtype=(np.float32, np.float16, ml_dtypes.bfloat16),
    index=(np.s_[:], np.s_[3:7], np.s_[:, 5:9], np.s_[2:3, 1:2], np.s_[4:4]),
    narrow=(0, 1 << 20),  # Row by row, or whole rows at a time.
  )
  def test_a_part_is_what_the_whole_has_there(self, dtype, index, narrow):
    x = np.random.default_rng(0).standard_normal((11, 13)).astype(dtype)
    path = self.write(first=np.ones(3, np.float32), x=x)
    with (
      mock.patch.object(safetensors_slices, '_NARROW', narrow),
      mock.patch.object(safetensors_slices, '_CHUNK', 100),
    ):
      part = safetensors_slices.tensors(path)['x'][index]
    self.assertEqual(part.dtype, dtype)
    np.testing.assert_array_equal(part, x[index])

  @parameterized.parameters((), (5,), (4, 3, 2))
  def test_any_number_of_axes(self, *shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    lazy = safetensors_slices.tensors(self.write(x=np.asarray(x)))['x']
    np.testing.assert_array_equal(np.asarray(lazy), x)
    if shape:
      np.testing.assert_array_equal(lazy[1:3], x[1:3])

  def test_reads_the_bytes_of_the_part_and_no_more(self):
    x = np.zeros((64, 4096), np.float32)
    lazy = safetensors_slices.tensors(self.write(x=x))['x']
    counted = []
    read = safetensors_slices.read_range

    def count(fd, path, out, offset):
      counted.append(out.nbytes)
      read(fd, path, out, offset)

    with mock.patch.object(safetensors_slices, 'read_range', count):
      lazy[16:32]
      self.assertEqual(sum(counted), x.nbytes // 4)
      counted.clear()
      lazy[:, 1024:2048]
      self.assertEqual(sum(counted), x.nbytes // 4)

  def test_a_damaged_file_is_named(self):
    path = self.write(x=np.zeros((8, 8), np.float32))
    data = path.read_bytes()
    path.write_bytes(data[:-16])
    with self.assertRaisesRegex(ValueError, 'a.safetensors: is truncated.*ten'):
      safetensors_slices.tensors(path)
    path.write_bytes(data[:30])
    with self.assertRaisesRegex(ValueError, 'is truncated or damaged.*header'):
      safetensors_slices.tensors(path)
    path.write_bytes(data[:8] + b'[' * (len(data) - 8))
    with self.assertRaisesRegex(ValueError, 'header is not JSON.*Fetch it'):
      safetensors_slices.tensors(path)

  def test_a_file_that_shrinks_meanwhile_is_named(self):
    path = self.write(x=np.zeros((8, 8), np.float32))
    lazy = safetensors_slices.tensors(path)['x']
    path.write_bytes(path.read_bytes()[:-16])
    with self.assertRaisesRegex(ValueError, 'changed while it was read'):
      lazy[:]


class HfLazyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  @parameterized.parameters(1, 3)
  def test_lazy_leaves_are_the_eager_ones(self, shards):
    source = hf.HfSource(
      model_files.write_hf(self.folder / 'hf', shards=shards, dtype='bfloat16')
    )
    for whole, lazy in (
      (source.outside(), source.lazy_outside()),
      (source.block(1), source.lazy_block(1)),
    ):
      self.assertEqual(jax.tree.structure(whole), jax.tree.structure(lazy))
      for a, b in zip(
        jax.tree.leaves(whole), jax.tree.leaves(lazy), strict=True
      ):
        self.assertEqual((a.shape, a.dtype), (b.shape, b.dtype))
        np.testing.assert_array_equal(a, np.asarray(b))
        np.testing.assert_array_equal(a[1:3], b[1:3])

  def test_values_that_are_not_finite_are_refused_where_they_are_read(self):
    name = 'model.layers.0.mlp.up_proj.weight'
    bad = model_files.hf_tensors()[name]
    bad[3, 5] = np.nan
    folder = model_files.write_hf(self.folder / 'hf', tensors={name: bad})
    leaf = hf.HfSource(folder).lazy_block(0)['mlp']['up_proj']['kernel']
    leaf[:, 4:]  # Columns are the file's rows.
    with self.assertRaisesRegex(ValueError, 'up_proj.*1 of .* NaN or infinite'):
      leaf[5:6]


if __name__ == '__main__':
  absltest.main()

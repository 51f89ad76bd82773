"""Tests of jaxq.io.hf_quantized: GPTQ and AWQ directories, and refusals."""

import json
import pathlib
import shutil
import tempfile

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from jaxq.io import ct_export, hf_quantized, sources
from jaxq.nn import linear
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from tests.io import model_files, quantized_model, test_gptq_awq

CONFIGS = {
  'awq': {'quant_method': 'awq', 'bits': 4, 'version': 'gemm'},
  'gptq': {'quant_method': 'gptq', 'bits': 4, 'checkpoint_format': 'gptq'},
}
DOWN = 'model.layers.1.mlp.down_proj'  # K = 64, N = 32.


def write(folder, method, *, g_idx=None, config=None, tensors=None):
  """A directory with `DOWN` quantized, the rest float32.

  Args:
    folder: is made.
    method: of CONFIGS.
    g_idx: gptq: the group of each row.
    config: keys to set in quantization_config.
    tensors: name -> array to set; None removes a tensor.

  Returns:
    Codes, zero points and scales of DOWN.
  """
  codes, zeros, scales = test_gptq_awq.made(4)
  if method == 'gptq':
    linear_ = test_gptq_awq.pack_gptq(codes, zeros, scales, 4, 'gptq', g_idx)
  else:
    linear_ = test_gptq_awq.pack_awq(codes, zeros, scales)
  changes = {f'{DOWN}.weight': None}
  changes |= {f'{DOWN}.{name}': array for name, array in linear_.items()}
  quantization = CONFIGS[method] | (config or {})
  model_files.write_hf(
    folder,
    config={'quantization_config': quantization},
    tensors=changes | (tensors or {}),
  )
  return codes, zeros, scales


class DirectoryTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(root) / 'model'

  def source(self, *args, **kwargs):
    self.made = write(self.folder, *args, **kwargs)
    return sources.open_source(str(self.folder))

  @parameterized.parameters('awq', 'gptq')
  def test_integers_arrive_in_the_tree(self, method):
    source = self.source(method)
    self.assertIsInstance(source, hf_quantized.QuantizedSource)
    self.assertEqual(source.quantization['scheme'], f'{method}: W4A16')
    block = source.block(1)
    self.assertEqual(block['quant'], {})
    q = block['params']['mlp']['down_proj']['kernel']
    np.testing.assert_array_equal(qarray.codes(q), self.made[0])
    np.testing.assert_array_equal(q.zero_point, self.made[1])
    up = block['params']['mlp']['up_proj']['kernel']
    expected = model_files.hf_tensors()['model.layers.1.mlp.up_proj.weight']
    np.testing.assert_array_equal(up, expected.T)
    self.assertIn('embed', source.outside())
    self.assertNotEqual(source.fingerprint(), '')

  def test_rows_out_of_order_permute_the_input(self):
    g_idx = np.random.default_rng(1).permutation(np.arange(64) // 16)
    block = self.source('gptq', g_idx=g_idx).block(1)
    permute = block['quant']['mlp']['down_proj']['permute']
    kernel = block['params']['mlp']['down_proj']['kernel']
    x = np.random.default_rng(2).standard_normal((3, 64), np.float32)
    variables = {'params': {'kernel': kernel}, 'quant': {'permute': permute}}
    got = linear.QuantDense(32).apply(variables, jnp.asarray(x))
    codes, zeros, scales = self.made
    w = codes.astype(np.float32) - zeros[g_idx].astype(np.float32)
    w = w * scales[g_idx].astype(np.float32)
    np.testing.assert_allclose(got, x @ w, atol=1e-4)  # Another order of sums.

  def test_older_config_files(self):
    self.made = write(self.folder, 'gptq')
    path = self.folder / 'config.json'
    config = json.loads(path.read_text())
    del config['quantization_config']
    path.write_text(json.dumps(config))
    (self.folder / 'quantize_config.json').write_text('{"bits": 4}')
    source = hf_quantized.open_directory(self.folder)
    self.assertEqual(source.quantization['format'], 'gptq')
    q = source.block(1)['params']['mlp']['down_proj']['kernel']
    np.testing.assert_array_equal(qarray.codes(q), self.made[0])

  @parameterized.parameters((0.0, False), (0.5, True))
  def test_biases_of_zeros_are_dropped(self, value, kept):
    bias = np.full(32, value, np.float32)
    block = self.source('gptq', tensors={f'{DOWN}.bias': bias}).block(1)
    leaf = block['params']['mlp']['down_proj']
    self.assertEqual('bias' in leaf, kept)

  @parameterized.parameters(
    ({'quant_method': 'hqq'}, "quant_method 'hqq'; allowed are .*'awq'"),
    ({'bits': 7}, 'bits=7; allowed are'),
  )
  def test_unknown_methods(self, config, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      self.source('gptq', config=config)

  @parameterized.parameters(
    (
      {'model.norm.weight': None},
      r"1 tensors are missing.*'model.norm.weight'",
    ),
    (
      {f'{DOWN}.qweight': None, f'{DOWN}.qzeros': None},
      f"1 tensors are missing.*'{DOWN}.weight'",
    ),
    ({'x.y': np.zeros(1)}, r"1 tensors are not expected.*'x.y'"),
    ({f'{DOWN}.qscale': np.zeros(1)}, r'not expected.*qscale.*of quantized'),
  )
  def test_missing_and_extra_tensors_are_named(self, tensors, message):
    with self.assertRaisesRegex(ValueError, message):
      self.source('gptq', tensors=tensors)

  def test_shapes_that_contradict_the_configuration(self):
    codes, zeros, scales = test_gptq_awq.made(4, (32, 32))
    tensors = test_gptq_awq.pack_gptq(codes, zeros, scales, 4, 'gptq')
    tensors = {f'{DOWN}.{name}': array for name, array in tensors.items()}
    source = self.source('gptq', tensors=tensors)
    with self.assertRaisesRegex(
      ValueError, rf'{DOWN} holds weights of shape \(32, 32\).*\(32, 64\)'
    ):
      source.block(1)

  def test_scales_that_are_not_finite(self):
    scales = np.full((4, 32), np.nan, np.float16)
    source = self.source('awq', tensors={f'{DOWN}.scales': scales})
    with self.assertRaisesRegex(ValueError, 'scales that are NaN or infinite'):
      source.block(1)


class CompressedTensorsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    root = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.root = pathlib.Path(root)
    hf = str(model_files.write_hf(cls.root / 'hf'))
    spec = spec_lib.QuantSpec(dtype='int8')
    made = quantized_model.quantized(hf, {'mlp/down_proj': spec})
    cls.out = ct_export.export(made, cls.root / 'out')

  def changed(self, change):
    """A copy whose quantization_config `change` has edited."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=self.root)) / 'model'
    shutil.copytree(self.out, folder)
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    change(config['quantization_config'])
    path.write_text(json.dumps(config))
    return hf_quantized.QuantizedSource(folder)

  @parameterized.parameters(
    ({'format': 'marlin-24'}, "format 'marlin-24'; allowed are"),
    ({'sparsity_config': {'format': 'sparse-24-bitmask'}}, 'a sparsity_config'),
    ({'transform_config': {'config_groups': {'u': {}}}}, 'transform_config'),
    ({'kv_cache_scheme': {'dynamic': True}}, 'kv_cache_scheme is dynamic'),
    ({'config_groups': {'W4A16': ['Linear']}}, 'W4A16 is list; a group must'),
  )
  def test_options_outside_ours(self, keys, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      self.changed(lambda config: config.update(keys))

  @parameterized.parameters(
    ({'output_activations': {'num_bits': 8}}, 'quantizes output_activations'),
    ({'weights': None}, 'group_0 has no weights arguments'),
  )
  def test_groups_outside_ours(self, keys, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      self.changed(lambda c: c['config_groups']['group_0'].update(keys))

  def test_a_linear_no_group_names(self):
    def change(config):
      config['config_groups']['group_0']['targets'] = ['re:.*gate_proj']

    with self.assertRaisesRegex(
      ValueError, r'layers.0.mlp.down_proj has quantized.*no group of quant'
    ):
      self.changed(change).block(0)

  def test_names_win_over_expressions_and_classes(self):
    def change(config):
      group = config['config_groups']['group_0']
      other = {**group, 'weights': {**group['weights'], 'num_bits': 4}}
      config['config_groups'] = {
        'a': {**other, 'targets': ['Linear']},
        'b': {**other, 'targets': ['re:model.*']},
        'c': {**group, 'targets': ['model.layers.0.mlp.down_proj']},
      }

    source = self.changed(change)
    kernel = source.block(0)['params']['mlp']['down_proj']['kernel']
    self.assertEqual(kernel.spec.dtype, 'int8')
    kernel = source.block(1)['params']['mlp']['down_proj']['kernel']
    self.assertEqual(kernel.spec.dtype, 'int4')

  def test_cache_scales_that_are_missing(self):
    scheme = {'num_bits': 8, 'type': 'float', 'strategy': 'tensor'}
    source = self.changed(lambda c: c.update(kv_cache_scheme=scheme))
    with self.assertRaisesRegex(
      ValueError, r'layers.0.self_attn.k_scale is missing; kv_cache_scheme'
    ):
      source.block(0)

  def test_float8_tensors(self):
    path = self.root / 'f8.safetensors'
    values = jnp.asarray([[1.0, -448.0], [0.5, 2.0]], jnp.float8_e4m3fn)
    safetensors.numpy.save_file({'a': np.asarray(values)}, path)
    np.testing.assert_array_equal(hf_quantized._float8(path, 'a'), values)


if __name__ == '__main__':
  absltest.main()

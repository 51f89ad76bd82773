"""Tests of jaxq.io.ct_export, read back by jaxq.io.hf_quantized."""

import json
import pathlib
import tempfile

import jax
import numpy as np
import safetensors
import tokenizers
from absl.testing import absltest, parameterized

import models
from jaxq.io import ct_export, hf_config, hf_quantized
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import binary, qarray
from jaxq.numerics import spec as spec_lib
from models import decoder
from tests.io import model_files, quantized_model
from tests.models import test_architectures
from tests.numerics import test_binary

QuantSpec = spec_lib.QuantSpec
INT4 = QuantSpec(dtype='int4', granularity='group', group_size=16)
INT4_CHANNEL = QuantSpec(dtype='int4')
INT8 = QuantSpec(dtype='int8')
TWO = ('attention/k_proj', 'mlp/down_proj')  # Each new shape costs a compile.
TOKEN = linear.ActQuant(
  None,
  None,
  QuantSpec(dtype='int8', granularity='token', scale_rule='half'),
)
STATIC = linear.ActQuant(
  quantized_model.scalar(0.02),
  np.full((1, 1), 99, np.uint8),
  QuantSpec(dtype='int8', granularity='tensor', symmetric=False),
)
FP8_CACHE = linear.ActQuant(
  quantized_model.scalar(0.5),
  None,
  QuantSpec(dtype='fp8_e4m3', granularity='tensor'),
)
CASES = {
  'int4': (INT4, None, 'pack-quantized'),
  'int4_asym': (
    QuantSpec(dtype='int4', symmetric=False),
    None,
    'pack-quantized',
  ),
  'int8_token': (INT8, TOKEN, 'int-quantized'),
  'int8_static': (INT8, STATIC, 'int-quantized'),
  'nvfp4': (QuantSpec(dtype='nvfp4'), None, 'nvfp4-pack-quantized'),
}


def of_architecture(name):
  """A random model of test_architectures, every linear in INT8."""
  fields = test_architectures.BASE | test_architectures.CONFIGS[name]
  config = test_architectures.config_of(name)
  outside, parts = jax.device_get(test_architectures.random_parts(config))
  made = []
  for i, params in enumerate(parts):
    for lin in decoder.block_spec(config, i).linears:
      kernel = qarray.quantize(blocks.kernel_of(params, lin.path), INT8)
      params = taps.set_path(params, f'{lin.path}/kernel', kernel)
    made.append({'params': params, 'quant': {}})
  return quantized_model.QuantizedModel(
    config=hf_config.read(fields | {'model_type': name}, 'test'),
    outside_params=outside,
    blocks=made,
    made=tokenizers.Tokenizer(tokenizers.models.BPE()),
    quantization={'scheme': 'of this test'},
  )


def assert_trees_equal(test, got, expected):
  """Both trees alike, to the bit save nvfp4's reciprocal."""
  test.assertEqual(jax.tree.structure(got), jax.tree.structure(expected))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    test.assertEqual(a.dtype, b.dtype)
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=3e-7
    )


class ExportTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.hf = str(model_files.write_hf(cls.root / 'hf'))

  def made(self, weights, act=None, linears=TWO):
    if isinstance(weights, QuantSpec):
      weights = dict.fromkeys(linears, weights)
    return quantized_model.quantized(self.hf, weights, act)

  def out(self, name='out'):
    return pathlib.Path(tempfile.mkdtemp(dir=self.root)) / name

  @parameterized.parameters(*sorted(CASES))
  def test_read_back_exactly(self, name):
    weights, act, format_name = CASES[name]
    made = self.made(weights, act)
    out = ct_export.export(made, self.out())
    source = hf_quantized.QuantizedSource(out)
    self.assertEqual(source.quantization['format'], format_name)
    if not weights.is_block_format:
      assert_trees_equal(self, source.outside(), made.outside())
    for i in range(made.num_blocks):
      got, block = source.block(i), made.block(i)
      if weights.is_block_format:  # What stays float is bfloat16.
        got, block = (
          {'params': b['params']['mlp']['down_proj']} for b in (got, block)
        )
      assert_trees_equal(self, got, block)
    config = json.loads((out / 'config.json').read_text())
    group = config['quantization_config']['config_groups']['group_0']
    self.assertEqual(group['targets'], ['Linear'])
    ignored = config['quantization_config']['ignore']
    self.assertIn('model.layers.1.mlp.up_proj', ignored)
    self.assertEqual(ignored[-1], 'lm_head')
    self.assertLen(ignored, 11)
    self.assertEqual(config['architectures'], ['LlamaForCausalLM'])
    self.assertFalse(out.with_name('out.partial').exists())

  @parameterized.parameters(*test_architectures.NAMES)
  def test_every_architecture_comes_back(self, name):
    made = of_architecture(name)
    out = ct_export.export(made, self.out())
    source = hf_quantized.QuantizedSource(out)
    self.assertEqual(source.config['model_type'], name)
    assert_trees_equal(self, source.outside(), made.outside())
    for i in range(made.num_blocks):
      assert_trees_equal(self, source.block(i), made.block(i))

  def test_parts_of_one_tensor_must_be_alike(self):
    made = of_architecture('phi3')
    attention = made.blocks[1]['params']['attention']
    kernel = qarray.dequantize(attention['k_proj']['kernel'])
    attention['k_proj']['kernel'] = qarray.quantize(kernel, INT4_CHANNEL)
    with self.assertRaisesRegex(
      ValueError, 'layers.1.self_attn.qkv_proj cannot .*parts are quantized d'
    ):
      ct_export.export(made, self.out())
    made = of_architecture('phi3')
    made.blocks[0]['quant'] = {'mlp': {'up_proj': {'input': TOKEN}}}
    with self.assertRaisesRegex(
      ValueError, 'layers.0.mlp.gate_up_proj cannot .*different input quantiz'
    ):
      ct_export.export(made, self.out())

  def test_cache_scales_without_a_place(self):
    for cache, message in (
      (STATIC, 'must be stored and symmetric'),
      (TOKEN, 'must be stored and symmetric'),
    ):
      made = self.made(INT8)
      made.blocks[0]['quant'] = {'attention': {'k_cache': cache}}
      with self.assertRaisesRegex(
        ValueError, f'0.self_attn cannot .*{message}'
      ):
        ct_export.export(made, self.out())
    made = self.made(INT8)
    int8 = QuantSpec(dtype='int8', granularity='tensor')
    other = linear.ActQuant(quantized_model.scalar(0.5), None, int8)
    made.blocks[0]['quant'] = {'attention': {'k_cache': FP8_CACHE}}
    made.blocks[1]['quant'] = {'attention': {'k_cache': other}}
    with self.assertRaisesRegex(
      ValueError,
      'layers.1.self_attn cannot .*differs from that of other blocks',
    ):
      ct_export.export(made, self.out())

  def test_another_family(self):
    made = self.made(INT8)
    made.config = made.config | {'model_type': 'bert'}
    with self.assertRaisesRegex(
      NotImplementedError, r"model_type 'bert'; allowed are \['gemma2'"
    ):
      ct_export.export(made, self.out())

  def test_models_load_runs_it(self):
    made = self.made(INT8, linears=quantized_model.LINEARS)
    out = str(ct_export.export(made, self.out()))
    opened = models.open_model(out)
    self.assertEqual(
      opened.quantization['scheme'], 'compressed-tensors: pack-quantized'
    )
    with self.assertRaisesRegex(ValueError, 'quantized already .*pack-quant'):
      opened.block_params(0)
    loaded, original = models.load(out), models.load(self.hf)
    tokens = np.array([[7, 65, 104, 200, 1]], np.int32)
    got, exact = (
      m.module.apply(m.variables, tokens)[0] for m in (loaded, original)
    )
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    # Steps of 1/127 of the largest, over seven linears and two blocks.
    self.assertLess(error, 0.05)
    self.assertGreater(error, 0)

  def test_mixed_precision_has_a_group_each(self):
    weights = {'attention/k_proj': INT8, 'mlp/up_proj': INT4}
    made = self.made(weights)
    out = ct_export.export(made, self.out())
    config = json.loads((out / 'config.json').read_text())[
      'quantization_config'
    ]
    groups = config['config_groups']
    self.assertLen(groups, 2)
    self.assertIn('model.layers.1.mlp.up_proj', groups['group_1']['targets'])
    self.assertIn('model.layers.0.mlp.down_proj', config['ignore'])
    source = hf_quantized.QuantizedSource(out)
    for i in range(made.num_blocks):
      assert_trees_equal(self, source.block(i), made.block(i))

  def test_shards(self):
    made = self.made(INT4)
    out = ct_export.export(made, self.out(), shard_nbytes=4000)
    index = json.loads((out / 'model.safetensors.index.json').read_text())
    files = sorted(set(index['weight_map'].values()))
    self.assertEqual(files[0], f'model-00001-of-{len(files):05d}.safetensors')
    self.assertGreater(len(files), 1)
    source = hf_quantized.QuantizedSource(out)
    assert_trees_equal(self, source.block(1), made.block(1))

  def test_cache_scales_are_written_and_read(self):
    made = self.made(INT8, TOKEN)
    for block in made.blocks:
      block['quant']['attention'] |= {
        'k_cache': FP8_CACHE,
        'v_cache': FP8_CACHE,
      }
    out = ct_export.export(made, self.out())
    config = json.loads((out / 'config.json').read_text())[
      'quantization_config'
    ]
    self.assertEqual(config['kv_cache_scheme']['num_bits'], 8)
    self.assertEqual(config['kv_cache_scheme']['type'], 'float')
    with safetensors.safe_open(out / 'model.safetensors', 'numpy') as file:
      scale = file.get_tensor('model.layers.1.self_attn.v_scale')
    np.testing.assert_array_equal(scale, [0.5])
    source = hf_quantized.QuantizedSource(out)
    for i in range(made.num_blocks):
      assert_trees_equal(self, source.block(i), made.block(i))

  @parameterized.parameters(
    ('binary', None, r'layers.0.self_attn.k_proj cannot .*weights are binary'),
    ('nf4', None, 'self_attn.k_proj cannot .*weights are nf4'),
    ('int4', 'int4', 'k_proj cannot .*clipped by 1.*--input_clip=0.933333'),
  )
  def test_formats_that_cannot_hold_it(self, weights, inputs, message):
    spec = QuantSpec(dtype=weights, granularity='channel')
    act = None
    if inputs is not None:
      act = linear.ActQuant(
        None, None, QuantSpec(dtype=inputs, granularity='token')
      )
    out = self.out()
    with self.assertRaisesRegex(ValueError, message):
      ct_export.export(self.made(spec, act), out)
    self.assertFalse(out.exists())
    self.assertEmpty(list(out.parent.iterdir()))

  @parameterized.parameters(
    ('hadamard', linear.OnlineHadamard(16), 'online Hadamard.*rotate.online'),
    ('permute', np.arange(32, dtype=np.int32), "it has 'permute'"),
    ('output', TOKEN, "it has 'output'.*--set=os_plus.bmm="),
    (
      'low_rank',
      linear.LowRank(np.ones((32, 2)), np.ones((2, 16))),
      'low-rank term of its float input .* calibrate without quant_experts',
    ),
    (
      'split',
      linear.SplitInput(np.zeros(8, np.int32), np.zeros(40), INT8),
      'channels of its input are split .*mergequant',
    ),
    (
      'input',
      linear.StepInput(QuantSpec(dtype='int8', narrow=True)),
      'in steps, as codes of -127 to 127',
    ),
  )
  def test_quant_entries_without_a_place(self, key, value, message):
    made = self.made(INT8)
    made.blocks[1]['quant'] = {'attention': {'k_proj': {key: value}}}
    with self.assertRaisesRegex(
      ValueError, f'model.layers.1.self_attn.k_proj cannot .*{message}'
    ):
      ct_export.export(made, self.out())

  def test_biases_without_a_place(self):
    made = self.made(INT8)
    params = made.blocks[0]['params']
    params['mlp']['up_proj']['bias'] = np.ones(64, np.float32)
    with self.assertRaisesRegex(
      ValueError, "mlp.up_proj cannot .*has 'bias'.*symmetrize=never"
    ):
      ct_export.export(made, self.out())

  def test_signs_beside_rows_in_more_bits(self):
    made = self.made(INT8)
    packed = binary.pack(**test_binary.parts())
    made.blocks[0]['params']['mlp']['up_proj']['kernel'] = packed
    with self.assertRaisesRegex(
      ValueError, 'mlp.up_proj cannot .*it holds sig'
    ):
      ct_export.export(made, self.out())

  def test_float_sources_and_taken_paths(self):
    made = self.made(INT8)
    made.quantization = None
    with self.assertRaisesRegex(ValueError, 'source is float; .*calibrate'):
      ct_export.export(made, self.out())
    with self.assertRaisesRegex(ValueError, 'exists and is not an empty'):
      ct_export.export(self.made(INT8), self.hf)


if __name__ == '__main__':
  absltest.main()

"""Our compressed-tensors directories in transformers, and theirs in jaxq.

A random small Llama is quantized by rounding to nearest, exported, and run by
transformers with compressed-tensors: the same logits, and the perplexity within
0.1 %. Weight-only schemes agree to float32's rounding. Where inputs are
quantized too, an activation that falls on the other side of a rounding boundary
by its last bit changes its token's logits by a step's worth, so the perplexity
is what is compared. In the other direction the library's own compressor writes
the tensors of a linear, and its own converter reads AWQ's.
"""

import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from jaxq.io import compressed_tensors as ct
from jaxq.io import ct_export, gptq_awq
from jaxq.nn import linear
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import schemes
from tests.decode import testing
from tests.io import quantized_model, test_gptq_awq
from tests.parity import oracle

QuantSpec = spec_lib.QuantSpec
V = testing.VOCAB_SIZE
# Scheme: its group size, where it has one.
WEIGHT_ONLY = {
  'W4A16': 32,
  'W4A16_ASYM': -1,
  'W3A16': 32,
}
WITH_INPUTS = ('W8A8', 'W8A8_STATIC', 'FP8', 'FP8_DYNAMIC')
ASYMMETRIC = {'symmetric': False}
BFLOAT16 = ('NVFP4A16', 'MXFP4A16', 'MXFP8A16')


def setUpModule():
  oracle.require()
  try:
    import compressed_tensors  # noqa: F401
  except ImportError as e:
    raise absltest.SkipTest(f'compressed-tensors is not installed: {e}') from e


def input_of(scheme):
  """An ActQuant for every linear; static ones reach |x| = 4."""
  spec = scheme.inputs
  if spec is None:
    return None
  if not scheme.static_inputs:
    if (
      spec.is_integer
    ):  # The format's own step; see jaxq.io.compressed_tensors.
      spec = QuantSpec.from_dict({**spec.to_dict(), 'scale_rule': 'half'})
    return linear.ActQuant(None, None, spec)
  largest = spec.qmax * (448 if spec.dtype == 'nvfp4' else 1)
  return linear.ActQuant(quantized_model.scalar(4.0 / largest), None, spec)


def nll(logits, tokens):
  """Mean NLL of tokens 1..T-1."""
  log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)[:, :-1]))
  return -float(np.mean(np.take_along_axis(log_p, tokens[:, 1:, None], -1)))


class ExportParityTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    root = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.root = pathlib.Path(root)
    reference = oracle.random_llama(
      seed=3,
      vocab_size=V,
      hidden_size=64,
      intermediate_size=96,
      num_hidden_layers=1,
      num_attention_heads=4,
      num_key_value_heads=4,  # Few shapes, few compilations.
      head_dim=16,
      rms_norm_eps=1e-5,
      max_position_embeddings=256,
      tie_word_embeddings=False,
      eos_token_id=testing.EOS,
    )
    reference.lm_head.weight.data.mul_(0.1)
    cls.hf = str(cls.root / 'hf')
    reference.save_pretrained(cls.hf)
    testing.tokenizer().save(str(cls.root / 'hf/tokenizer.json'))
    cls.tokens = np.random.default_rng(0).integers(0, V, (2, 64))

  def export(self, name, group_size):
    scheme = schemes.parse(name, group_size=group_size)
    made = quantized_model.quantized(self.hf, scheme.weights, input_of(scheme))
    return str(ct_export.export(made, self.root / f'{name}{group_size}'))

  def ours(self, folder):
    model = models.load(folder)
    tokens = jnp.asarray(self.tokens, jnp.int32)
    return np.asarray(model.module.apply(model.variables, tokens)[0])

  def theirs(self, folder, decoded=False):
    """Logits of transformers; decoded: the weights, then all in float32."""
    import torch
    import transformers

    how = {'attn_implementation': 'eager'}
    if decoded:
      config = transformers.CompressedTensorsConfig(dequantize=True)
      how['quantization_config'] = config
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
      model = load(folder, **how).eval()
    except RuntimeError as e:
      if 'ignore_mismatched_sizes' not in str(e) or 'ASYM' not in folder:
        raise
      # Theirs too: what it makes for the checkpoint has unpacked zero points.
      self.skipTest(
        f'transformers {transformers.__version__} loads no packed zero points '
        'with this compressed-tensors, whoever wrote them'
      )
    if decoded:  # Not model.float(): transformers refuses it, decoded or not.
      torch.nn.Module.float(model)
    return oracle.logits(model, self.tokens)

  @parameterized.parameters(*sorted(WEIGHT_ONLY.items()))
  def test_weight_only_logits_agree(self, name, group_size):
    folder = self.export(name, group_size)
    error = oracle.relative_error(self.ours(folder), self.theirs(folder))
    self.assertLess(error, 1e-5)

  @parameterized.parameters(*WITH_INPUTS)
  def test_quantized_inputs_give_the_same_perplexity(self, name):
    folder = self.export(name, None)
    ours, theirs = (
      nll(logits, self.tokens)
      for logits in (self.ours(folder), self.theirs(folder))
    )
    self.assertLess(abs(math.exp(theirs - ours) - 1), 1e-3)

  def test_scales_of_keys_and_values_are_computed_with(self):
    weights = schemes.parse('W8A16').weights
    made = quantized_model.quantized(self.hf, weights)
    plain = self.ours(str(ct_export.export(made, self.root / 'plain')))
    spec = QuantSpec(dtype='fp8_e4m3', granularity='tensor')
    for name, reach in (('k_cache', 8.0), ('v_cache', 2.0)):
      scale = quantized_model.scalar(reach / spec.qmax)
      act = linear.ActQuant(scale, None, spec)
      for block in made.blocks:
        block['quant'].setdefault('attention', {})[name] = act
    folder = str(ct_export.export(made, self.root / 'kv'))
    ours, theirs = self.ours(folder), self.theirs(folder)
    # A few codes turn on the last bit of a key; all turn without the scales.
    self.assertLess(oracle.relative_error(ours, theirs), 1e-3)
    self.assertGreater(oracle.relative_error(plain, theirs), 1e-2)

  @parameterized.parameters(*BFLOAT16)
  def test_block_formats_decode_to_the_same_weights(self, name):
    # transformers decodes them to bfloat16; computed on in float32.
    folder = self.export(name, None)
    ours, theirs = self.ours(folder), self.theirs(folder, decoded=True)
    # nvfp4's products of two scales do not fit bfloat16: 2^-9 a weight.
    limit = 2e-2 if name == 'NVFP4A16' else 1e-5
    self.assertLess(oracle.relative_error(ours, theirs), limit)
    difference = nll(theirs, self.tokens) - nll(ours, self.tokens)
    self.assertLess(abs(math.exp(difference) - 1), 1e-3)


class LibraryTest(parameterized.TestCase):
  @parameterized.parameters(
    ('W4A16', 32),
    ('W4A16_ASYM', 32),
    ('W3A16', 64),
    ('W8A8', None),
    ('FP8_DYNAMIC', None),
    ('MXFP4A16', None),
    ('NVFP4A16', None),
  )
  def test_tensors_of_its_compressor_are_read(self, name, group_size):
    import torch
    from compressed_tensors import quantization
    from compressed_tensors.compressors import (
      compress_module,
      decompress_module,
    )
    from compressed_tensors.quantization import lifecycle
    from compressed_tensors.quantization.utils import calculate_qparams, helpers

    scheme = quantization.preset_name_to_scheme(name, ['Linear'])
    args = scheme.weights
    if group_size is not None:
      args.group_size = group_size
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 24, bias=False)
    lifecycle.initialize_module_for_quantization(module, scheme)
    w = module.weight.data
    size = args.group_size or 64
    groups = w.unflatten(-1, (64 // size, size))
    outer = None
    if args.strategy == 'tensor_group':
      outer = helpers.generate_gparam(w.min(), w.max())
      module.weight_global_scale.data = outer
    scale, zero = calculate_qparams(
      groups.amin(-1), groups.amax(-1), args, global_scale=outer
    )
    module.weight_scale.data = scale.to(module.weight_scale.dtype)
    module.weight_zero_point.data = zero
    compress_module(module)
    tensors = {
      key: value.view(torch.uint8).numpy().view(jnp.float8_e4m3fn)
      if value.dtype == torch.float8_e4m3fn
      else value.numpy()
      for key, value in module.state_dict().items()
    }
    dumped = args.model_dump(mode='json')
    spec = ct.weight_spec(dumped, name)
    got = qarray.dequantize(ct.read(tensors, spec, dumped, name))
    decompress_module(module)
    expected = module.weight.detach().float().numpy().T
    # Block formats decode to bfloat16 there.
    rtol = 2**-8 if spec.dtype == 'nvfp4' else 1e-6
    np.testing.assert_allclose(got, expected, rtol=rtol)

  @parameterized.parameters(
    *({'dtype': f'int{bits}'} for bits in range(2, 9)),
    {'dtype': 'int4', 'granularity': 'group', 'group_size': 16},
    {'dtype': 'int4', 'granularity': 'group', 'group_size': 16, **ASYMMETRIC},
    {'dtype': 'int3', **ASYMMETRIC},
    {'dtype': 'int8', 'granularity': 'tensor'},
    {'dtype': 'fp8_e4m3'},
    {'dtype': 'mxfp4'},
    {'dtype': 'mxfp8'},
    {'dtype': 'nvfp4'},
  )
  def test_its_decompressor_reads_our_tensors(self, **fields):
    import torch
    from compressed_tensors import compressors, quantization

    spec = QuantSpec(**fields)
    w = np.random.default_rng(0).standard_normal((64, 24), np.float32)
    q = qarray.quantize(jnp.asarray(w), spec)
    format_name = ct.format_of(spec, None)
    state = {
      key: torch.from_numpy(a.view(np.uint8)).view(torch.float8_e4m3fn)
      if a.dtype.name == 'float8_e4m3fn'
      else torch.from_numpy(a)
      for key, a in ct.write(q, format_name).items()
    }
    scheme = quantization.QuantizationScheme(
      targets=['Linear'],
      weights=quantization.QuantizationArgs(**ct.args_of(spec)),
    )
    codec = compressors.BaseCompressor.get_value_from_registry(format_name)
    got = codec.decompress(state, scheme)['weight'].float().numpy().T
    rtol = 2**-8 if spec.dtype == 'nvfp4' else 0  # Decoded to bfloat16.
    np.testing.assert_allclose(got, qarray.dequantize(q), rtol=rtol)

  @parameterized.parameters(
    *('W8A8', 'W4A8', 'W4A4', 'FP8', 'FP8_DYNAMIC', 'MXFP4', 'MXFP8', 'NVFP4')
  )
  def test_a_linear_with_quantized_inputs_is_the_same(self, name):
    import torch
    from compressed_tensors import quantization
    from compressed_tensors.quantization import lifecycle

    scheme = schemes.parse(name)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 24), np.float32)
    q = qarray.quantize(jnp.asarray(w), scheme.weights)
    act = input_of(scheme)
    module = torch.nn.Linear(64, 24, bias=False)
    lifecycle.initialize_module_for_quantization(
      module,
      quantization.QuantizationScheme(
        targets=['Linear'],
        weights=quantization.QuantizationArgs(**ct.args_of(q.spec)),
        input_activations=quantization.QuantizationArgs(**ct.input_args(act)),
      ),
    )
    module.weight.data = torch.from_numpy(np.array(qarray.dequantize(q)).T)
    module.quantization_status = quantization.QuantizationStatus.DECOMPRESSED
    for key, value in ct.write_input(act).items():
      getattr(module, key).data = torch.from_numpy(value)
    x = rng.standard_normal((1, 500, 64), np.float32)
    theirs = module(torch.from_numpy(x)).detach().float().numpy()
    variables = {'params': {'kernel': q}, 'quant': {'input': act}}
    ours = linear.QuantDense(24).apply(variables, jnp.asarray(x))
    # The same codes: what is left is the order of sums.
    np.testing.assert_allclose(ours, theirs, atol=2e-5)

  def test_its_presets_mean_what_our_schemes_do(self):
    from compressed_tensors.quantization import quant_scheme

    refused = []
    for name, preset in quant_scheme.PRESET_SCHEMES.items():
      with self.subTest(name):
        weights = preset.get('weights')
        weights = weights and weights.model_dump(mode='json')
        # Of W<b>A<b> the group size is the one thing that may differ.
        grouped = weights and weights['type'] == 'int'
        group_size = weights['group_size'] if grouped else None
        try:
          scheme = schemes.parse(name, group_size=group_size)
        except (NotImplementedError, ValueError):
          refused.append(name)
          continue
        self.assertEqual(ct.weight_spec(weights, name), scheme.weights)
        inputs = preset.get('input_activations')
        self.assertEqual(inputs is None, scheme.inputs is None)
        if inputs is not None:
          spec, static = ct.input_spec(inputs.model_dump(mode='json'), name)
          self.assertEqual(static, scheme.static_inputs)
          for field in ('dtype', 'granularity', 'group_size', 'symmetric'):
            self.assertEqual(
              getattr(spec, field), getattr(scheme.inputs, field)
            )
    # Of 0.19's; later versions have more.
    self.assertContainsSubset(['UNQUANTIZED', 'FP8_BLOCK'], refused)
    self.assertGreaterEqual(len(quant_scheme.PRESET_SCHEMES) - len(refused), 28)

  def test_its_awq_converter_reads_the_same_integers(self):
    import torch
    from compressed_tensors.entrypoints.convert.converters import autoawq

    tensors = test_gptq_awq.pack_awq(*test_gptq_awq.made(4))
    ours, _ = gptq_awq.read_awq(tensors, {}, 'w')
    converter = autoawq.AutoAWQConverter(group_size=16)
    converted = converter.process(
      {f'm.{key}': torch.from_numpy(a) for key, a in tensors.items()}
    )
    args = {'num_bits': 4, 'group_size': 16, 'symmetric': False}
    named = {key[2:]: value.numpy() for key, value in converted.items()}
    theirs = ct.read(named, ct.weight_spec(args, 'w'), args, 'w')
    self.assertEqual(ours.spec, theirs.spec)
    for a, b in zip(
      jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
    ):
      np.testing.assert_array_equal(a, b)


if __name__ == '__main__':
  absltest.main()

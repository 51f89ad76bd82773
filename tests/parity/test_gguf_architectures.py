"""GGUF files of every architecture that the format defines.

Random transformers models are saved as Hugging Face directories and, by the
rules of llama.cpp's converter, written here with the `gguf` package and its own
table of tensor names. Our reader must give the same parameters and logits for
both; what we export must give the same logits in transformers' GGUF loader.
"""

import pathlib
import re
import tempfile

import gguf as gguf_lib
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

import models
from jaxq.io import gguf, gguf_export, hf
from jaxq.nn import taps
from tests.io import model_files
from tests.parity import oracle

_SIZES = {
  'vocab_size': len(model_files.TOKENS),
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 128,
  'bos_token_id': 1,
  'eos_token_id': 0,
  'pad_token_id': 0,
}
_EXPERTS = {'num_experts_per_tok': 2}
_ROPE = {'rope_type': 'default', 'rope_theta': 10000.0}
# name: (transformers' model, its fields, GGUF architecture, its metadata).
MODELS = {
  'llama': ('Llama', {'head_dim': 16}, 'llama', {}),
  'llama_bias': (
    'Llama',
    {'attention_bias': True, 'mlp_bias': True},
    'llama',
    {},
  ),
  'llama3': (
    'Llama',
    {
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 10000.0,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
      }
    },
    'llama',
    {},
  ),
  'linear': (
    'Llama',
    {'rope_parameters': _ROPE | {'rope_type': 'linear', 'factor': 4.0}},
    'llama',
    {'rope.scaling.type': 'linear', 'rope.scaling.factor': 4.0},
  ),
  'yarn': (
    'Llama',
    {
      'rope_parameters': _ROPE
      | {
        'rope_type': 'yarn',
        'factor': 4.0,
        'original_max_position_embeddings': 32,
      }
    },
    'llama',
    {
      'rope.scaling.type': 'yarn',
      'rope.scaling.factor': 4.0,
      'rope.scaling.original_context_length': 32,
    },
  ),
  'mistral': ('Mistral', {'sliding_window': None}, 'llama', {}),
  'qwen2': ('Qwen2', {}, 'qwen2', {}),
  'qwen3': ('Qwen3', {'head_dim': 32}, 'qwen3', {}),
  'gemma2': (
    'Gemma2',
    {'head_dim': 32, 'query_pre_attn_scalar': 32, 'sliding_window': 8},
    'gemma2',
    {
      'attention.sliding_window': 8,
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
    },
  ),
  'gemma3': (
    'Gemma3',
    {
      'head_dim': 32,
      'query_pre_attn_scalar': 32,
      'sliding_window': 8,
      'num_hidden_layers': 7,
    },
    'gemma3',
    {'attention.sliding_window': 8, 'rope.freq_base': 1e6},
  ),
  'phi3': (
    'Phi3',
    {'sliding_window': 16},
    'phi3',
    {'attention.sliding_window': 16},
  ),
  'mixtral': (
    'Mixtral',
    _EXPERTS | {'num_local_experts': 4, 'sliding_window': None},
    'llama',
    {'expert_count': 4, 'expert_used_count': 2},
  ),
  'qwen3_moe': (
    'Qwen3Moe',
    _EXPERTS
    | {
      'num_experts': 4,
      'moe_intermediate_size': 32,
      'head_dim': 32,
      'norm_topk_prob': True,
    },
    'qwen3moe',
    {
      'expert_count': 4,
      'expert_used_count': 2,
      'expert_feed_forward_length': 32,
    },
  ),
}
# transformers' GGUF loader: models it reads right. It has no rope scaling of
# llama files, no mixtral, and no head_dim of qwen3 and phi3's windows.
_LOADED = ('llama', 'mistral', 'qwen2', 'gemma2', 'gemma3')


def setUpModule():
  oracle.require()


def build(name):
  """A random transformers model of MODELS[name], no two norms alike."""
  import torch
  import transformers

  family, fields, _, _ = MODELS[name]
  text = 'Text' if family == 'Gemma3' else ''
  config = getattr(transformers, f'{family}{text}Config')(
    **(_SIZES | fields), attn_implementation='eager'
  )
  torch.manual_seed(0)
  model = getattr(transformers, f'{family}ForCausalLM')(config)
  gemma = family.startswith('Gemma')
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if 'norm' in key:
        parameter.uniform_(-0.5, 0.5) if gemma else parameter.uniform_(0.5, 1.5)
      elif key.endswith('bias'):
        parameter.normal_(0.0, 0.5)
      else:
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
  return model.eval()


def write_hf(model, folder):
  """save_pretrained, with the tiny tokenizer."""
  model.save_pretrained(folder)
  model_files.write_tokenizer_json(pathlib.Path(folder) / 'tokenizer.json')
  return pathlib.Path(folder)


def write_gguf(name, folder, path, kind='F32'):
  """llama.cpp's conversion of a saved directory."""
  _, fields, arch, extra = MODELS[name]
  sizes = _SIZES | fields
  L, H = sizes['num_hidden_layers'], sizes['num_attention_heads']
  D = sizes.get('head_dim', sizes['hidden_size'] // H)
  writer = gguf_lib.GGUFWriter(str(path), arch)
  metadata = {
    'block_count': L,
    'context_length': sizes['max_position_embeddings'],
    'embedding_length': sizes['hidden_size'],
    'feed_forward_length': sizes['intermediate_size'],
    'attention.head_count': H,
    'attention.head_count_kv': sizes['num_key_value_heads'],
    'attention.layer_norm_rms_epsilon': 1e-5 if name == 'phi3' else 1e-6,
    'rope.dimension_count': D,
    'vocab_size': sizes['vocab_size'],
  } | extra
  if name == 'mixtral':
    metadata |= {
      'rope.freq_base': 1e6,
      'attention.layer_norm_rms_epsilon': 1e-5,
    }
  if 'head_dim' in fields:
    metadata |= {'attention.key_length': D, 'attention.value_length': D}
  for key, value in metadata.items():
    add = {int: writer.add_uint32, float: writer.add_float32}.get(
      type(value), writer.add_string
    )
    add(f'{arch}.{key}', value)
  for key, value in model_files.gguf_metadata().items():
    if key.startswith('tokenizer.'):
      add = {int: writer.add_uint32, list: writer.add_array}.get(
        type(value), writer.add_string
      )
      add(key, value)
  for key, array in convert(name, folder, L, H, D):
    raw = gguf_lib.GGMLQuantizationType[kind if array.ndim > 1 else 'F32']
    data = gguf_lib.quants.quantize(array, raw)
    writer.add_tensor(key, data, raw_dtype=raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def convert(name, folder, L, H, D):
  """The tensors of a saved directory in GGUF's names and forms."""
  arch = MODELS[name][2]
  [enum] = [k for k, v in gguf_lib.MODEL_ARCH_NAMES.items() if v == arch]
  names = gguf_lib.get_tensor_name_map(enum, L)
  state = safetensors.numpy.load_file(str(folder / 'model.safetensors'))
  stacks = {}
  for key, array in state.items():
    array = array.astype(np.float32)
    if arch.startswith('gemma') and key.endswith('norm.weight'):
      array = array + 1
    found = re.match(r'(.*\.experts)\.(\d+)\.(\w+)\.weight', key)
    if found:
      stacks.setdefault((found[1], found[3]), {})[int(found[2])] = array
      continue
    if arch == 'llama' and re.search(r'\.[qk]_proj\.', key):
      heads = array.shape[0] // D
      array = array.reshape(heads, 2, D // 2, *array.shape[1:])
      array = array.swapaxes(1, 2).reshape(heads * D, *array.shape[3:])
    yield names.get_name(key, try_suffixes=('.weight', '.bias')), array
  for (prefix, which), parts in stacks.items():
    key = names.get_name(f'{prefix}.{which}')
    yield f'{key}.weight', np.stack([parts[e] for e in sorted(parts)])
  if name == 'llama3':
    frequencies = 1e4 ** -(np.arange(0, D, 2) / D)
    wave = 2 * np.pi / frequencies
    factors = []
    for w in wave:  # As the converter goes about it.
      smooth = (8192 / w - 1.0) / (4.0 - 1.0)
      if w < 8192 / 4.0:
        factors.append(1.0)
      elif w > 8192 / 1.0:
        factors.append(8.0)
      else:
        factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    yield 'rope_freqs.weight', np.array(factors, np.float32)


def logits(source, tokens):
  """Of a loaded model, float32."""
  model = models.load(str(source))
  return np.asarray(model.module.apply(model.variables, jnp.asarray(tokens))[0])


class ImportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  @parameterized.parameters(*MODELS)
  def test_same_parameters_and_logits_as_the_directory(self, name):
    model = build(name)
    folder = write_hf(model, self.folder / 'hf')
    path = write_gguf(name, folder, self.folder / 'model.gguf')
    ours, theirs = gguf.GgufSource(path), hf.HfSource(folder)
    for i in range(ours.config['num_hidden_layers']):
      self.assert_same(ours.block(i), theirs.block(i))
    self.assert_same(ours.outside(), theirs.outside())
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24), np.int32)
    expected = oracle.logits(model, tokens)
    self.assertLess(oracle.relative_error(logits(path, tokens), expected), 1e-3)

  def assert_same(self, ours, theirs):
    theirs = dict(taps.leaves(theirs))
    for path, leaf in taps.leaves(ours):
      np.testing.assert_array_equal(leaf, theirs.pop(path), err_msg=str(path))
    self.assertEmpty(theirs)


class ExportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  @parameterized.parameters(*MODELS)
  def test_our_reader_gets_what_the_package_rounds(self, name):
    folder = write_hf(build(name), self.folder / 'hf')
    source = hf.HfSource(folder)
    path = self.folder / 'ours.gguf'
    config = gguf_export.GgufExportConfig(type='Q8_0', rest='F32')
    gguf_export.export(source, path, config)
    ours = gguf.GgufSource(path)
    kinds = {info.type for info in ours.tensors.values()}
    self.assertEqual(kinds, {'F32', 'Q8_0'})
    theirs = gguf.GgufSource(
      write_gguf(name, folder, self.folder / 'theirs.gguf', 'Q8_0')
    )
    for i in range(ours.config['num_hidden_layers']):
      left, right = (dict(taps.leaves(s.block(i))) for s in (ours, theirs))
      self.assertEqual(set(left), set(right))
      for leaf_path, leaf in left.items():
        if 'router' not in leaf_path:  # A router stays float32 with us.
          np.testing.assert_array_equal(leaf, right[leaf_path], str(leaf_path))
    for key in ('rope_scaling', 'sliding_window', 'layer_types', 'head_dim'):
      self.assertEqual(ours.config.get(key), theirs.config.get(key), key)

  @parameterized.parameters(*_LOADED)
  def test_transformers_reads_it(self, name):
    folder = write_hf(build(name), self.folder / 'hf')
    path = self.folder / 'ours.gguf'
    gguf_export.export(
      hf.HfSource(folder), path, gguf_export.GgufExportConfig(type='Q4_0')
    )
    model, tokenizer = oracle.load_gguf(path)
    if name.startswith('gemma'):  # It takes 256 for every gemma.
      for layer in model.model.layers:
        layer.self_attn.scaling = 32**-0.5
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24), np.int32)
    error = oracle.relative_error(
      logits(path, tokens), oracle.logits(model, tokens)
    )
    self.assertLess(error, 1e-3)
    text = "It's a hello world, été 日本"
    ours = gguf.GgufSource(path).tokenizer()
    self.assertEqual(
      tokenizer(text, add_special_tokens=False)['input_ids'],
      ours.encode(text, add_special_tokens=False).ids,
    )


if __name__ == '__main__':
  absltest.main()

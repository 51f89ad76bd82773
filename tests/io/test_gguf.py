"""GGUF files: the tensors, the configuration, and every refusal."""

import pathlib
import tempfile

import gguf as gguf_lib
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import gguf
from tests.io import ggml, model_files

Q_PROJ = 'blk.0.attn_q.weight'


class GgufTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.folder / 'tiny.gguf'

  def write(self, **kwargs):
    return model_files.write_gguf(self.path, **kwargs)


class ReadTest(GgufTestCase):
  def test_half_split_by_hand(self):
    # One head of 4: pairs (a0, b0), (a1, b1) become a0 a1 b0 b1.
    w = np.array([[0.0], [2.0], [1.0], [3.0]])
    np.testing.assert_array_equal(gguf.half_split(w, 1)[:, 0], [0, 1, 2, 3])

  @parameterized.parameters(True, False)
  def test_tree_holds_the_tensors_of_hugging_face(self, tied):
    config = model_files.CONFIG | {'tie_word_embeddings': tied}
    source = gguf.GgufSource(self.write(config=config))
    hf = model_files.hf_tensors(config)
    self.assertEqual(source.config['tie_word_embeddings'], tied)
    for i in range(2):
      block, prefix = source.block(i), f'model.layers.{i}'
      self.assertEqual(
        set(block), {'input_norm', 'attention', 'post_norm', 'mlp'}
      )
      for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
        np.testing.assert_array_equal(
          block['attention'][name]['kernel'],
          hf[f'{prefix}.self_attn.{name}.weight'].T,
        )
      for name in ('gate_proj', 'up_proj', 'down_proj'):
        np.testing.assert_array_equal(
          block['mlp'][name]['kernel'], hf[f'{prefix}.mlp.{name}.weight'].T
        )
      np.testing.assert_array_equal(
        block['post_norm']['scale'],
        hf[f'{prefix}.post_attention_layernorm.weight'],
      )
    outside = source.outside()
    np.testing.assert_array_equal(
      outside['embed']['embedding'], hf['model.embed_tokens.weight']
    )
    self.assertEqual('head' in outside, not tied)
    if not tied:
      np.testing.assert_array_equal(
        outside['head']['kernel'], hf['lm_head.weight'].T
      )

  def test_config_in_hugging_face_names(self):
    config = gguf.GgufSource(self.write()).config
    for key, value in model_files.CONFIG.items():
      if isinstance(value, float):
        self.assertAlmostEqual(config[key], value, places=6)
      else:
        self.assertEqual(config[key], value, key)

  @parameterized.parameters(*ggml.TYPES)
  def test_a_block_by_hand(self, kind):
    """One random block per row, taken apart byte by byte."""
    rng = np.random.default_rng(0)
    enum = gguf_lib.GGMLQuantizationType[kind]
    _, nbytes = gguf_lib.GGML_QUANT_SIZES[enum]
    values = ggml.TYPES[kind][0]
    config = model_files.CONFIG | {'hidden_size': 256, 'head_dim': 64}
    # Without bit 6 no byte pair is an infinite or NaN scale, nor any BF16.
    raw = rng.integers(0, 256, (256, 256 // values * nbytes), np.uint8) & 0xBF
    name = 'blk.0.attn_output.weight'
    path = self.write(config=config, tensors={name: raw}, kinds={name: kind})
    kernel = gguf.GgufSource(path).block(0)['attention']['o_proj']['kernel']
    for row in (0, 17, 255):
      expected = ggml.dequantize(bytes(raw[row]), kind)
      np.testing.assert_allclose(kernel[:, row], expected, rtol=1e-6)

  def test_all_types_are_taken_apart(self):
    self.assertEqual(set(ggml.TYPES) | {'F32', 'F16'}, set(gguf.TYPES))

  @parameterized.parameters('Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'BF16')
  def test_quantized_types_come_back_as_the_package_says(self, kind):
    w = model_files.gguf_tensors()[Q_PROJ]
    source = gguf.GgufSource(self.write(kinds={Q_PROJ: kind}))
    ggml = gguf_lib.GGMLQuantizationType[kind]
    raw = gguf_lib.quants.quantize(w, ggml)
    expected = gguf.half_split(gguf_lib.quants.dequantize(raw, ggml), 4).T
    kernel = source.block(0)['attention']['q_proj']['kernel']
    np.testing.assert_array_equal(kernel, expected)
    # Half a step of the coarsest of these grids, on values up to about 3.
    np.testing.assert_allclose(kernel, gguf.half_split(w, 4).T, atol=0.5)

  def test_float16(self):
    w = model_files.gguf_tensors()[Q_PROJ].astype(np.float16)
    source = gguf.GgufSource(self.write(tensors={Q_PROJ: w}))
    np.testing.assert_array_equal(
      source.block(0)['attention']['q_proj']['kernel'],
      gguf.half_split(w, 4).T.astype(np.float32),
    )

  def test_fingerprint_follows_the_content_not_the_folder(self):
    first = gguf.GgufSource(self.write()).fingerprint()
    other = self.folder / 'elsewhere'
    other.mkdir()
    copy = other / self.path.name
    copy.write_bytes(self.path.read_bytes())
    self.assertEqual(gguf.GgufSource(copy).fingerprint(), first)
    model_files.write_gguf(
      copy, tensors={'output_norm.weight': np.ones(32, np.float32)}
    )
    self.assertNotEqual(gguf.GgufSource(copy).fingerprint(), first)

  def test_tokenizer(self):
    tokenizer = gguf.GgufSource(self.write()).tokenizer()
    self.assertEqual(tokenizer.encode('hello').tokens, ['hello'])


class RefusalTest(GgufTestCase):
  def test_missing_file(self):
    with self.assertRaisesRegex(FileNotFoundError, 'tiny.gguf: no such file'):
      gguf.GgufSource(self.path)

  def test_bad_magic(self):
    self.path.write_bytes(b'PK\x03\x04 and more')
    with self.assertRaisesRegex(ValueError, r"tiny.gguf: starts with b'PK"):
      gguf.GgufSource(self.path)

  def test_truncated_anywhere(self):
    data = self.write().read_bytes()
    for size in np.linspace(5, len(data) - 1, 25).astype(int):
      self.path.write_bytes(data[:size])
      with self.assertRaisesRegex(ValueError, 'truncated or damaged.*Fetch'):
        gguf.GgufSource(self.path)

  def test_cut_while_in_use(self):
    source = gguf.GgufSource(self.write())
    self.path.write_bytes(self.path.read_bytes()[:-1000])
    with self.assertRaisesRegex(ValueError, 'was cut or changed while in use'):
      source.block(1)

  def test_unknown_architecture(self):
    with self.assertRaisesRegex(
      NotImplementedError,
      r"architecture 'mamba'; allowed are \['gemma2', .*'llama'",
    ):
      gguf.GgufSource(self.write(arch='mamba'))

  def test_unknown_type(self):
    raw = np.zeros((256, 84), np.uint8)
    name = 'blk.1.ffn_up.weight'
    config = model_files.CONFIG | {
      'hidden_size': 256,
      'head_dim': 64,
      'intermediate_size': 256,
    }
    path = self.write(config=config, tensors={name: raw}, kinds={name: 'Q2_K'})
    with self.assertRaisesRegex(
      NotImplementedError, f'{name} has GGUF type Q2_K; allowed.*Q8_0'
    ):
      gguf.GgufSource(path)

  def test_missing_tensor(self):
    path = self.write(tensors={'blk.1.ffn_up.weight': None})
    with self.assertRaisesRegex(
      ValueError, r"1 tensors are missing, first \['blk.1.ffn_up.weight'\]"
    ):
      gguf.GgufSource(path)

  def test_unexpected_tensor(self):
    extra = {'blk.0.attn_q_norm.weight': np.zeros(8, np.float32)}
    with self.assertRaisesRegex(
      ValueError, r"1 tensors are not expected.*\['blk.0.attn_q_norm.weight'\]"
    ):
      gguf.GgufSource(self.write(tensors=extra))

  def test_shape_mismatch(self):
    path = self.write(tensors={Q_PROJ: np.zeros((16, 32), np.float32)})
    with self.assertRaisesRegex(
      ValueError, r'attn_q.weight has shape \(16, 32\).*asks for \(32, 32\)'
    ):
      gguf.GgufSource(path)

  @parameterized.parameters(np.nan, np.inf)
  def test_not_finite(self, value):
    w = model_files.gguf_tensors()[Q_PROJ]
    w[3, 5] = value
    source = gguf.GgufSource(self.write(tensors={Q_PROJ: w}))
    with self.assertRaisesRegex(
      ValueError, f'tensor {Q_PROJ}: 1 of 1024 values are NaN or infinite'
    ):
      source.block(0)

  @parameterized.parameters(
    ({'llama.embedding_length': None}, ValueError, r"lacks \['hidden_size'\]"),
    ({'llama.block_count': 0}, ValueError, 'num_hidden_layers=0'),
    (
      {'llama.attention.head_count_kv': 3},
      ValueError,
      'num_key_value_heads=3; the second must divide',
    ),
    ({'llama.attention.key_length': 5}, ValueError, 'head_dim=5'),
    (
      {'llama.rope.scaling.type': 'longrope'},
      NotImplementedError,
      "rope.scaling.type='longrope' without tensors",
    ),
    ({'llama.rope.scaling.type': 'yarn'}, ValueError, 'rope.scaling.factor'),
    ({'llama.expert_count': 8}, ValueError, 'expert_used_count'),
    (
      {'llama.rope.dimension_count': 4},
      NotImplementedError,
      'rope.dimension_count=4, head size 8',
    ),
  )
  def test_metadata(self, metadata, error, message):
    with self.assertRaisesRegex(error, message):
      gguf.GgufSource(self.write(metadata=metadata))

  def test_rope_freqs(self):
    extra = {'rope_freqs.weight': np.full(4, 3, np.float32)}
    with self.assertRaisesRegex(
      NotImplementedError, 'rope_freqs.weight divides.*not that of Llama 3'
    ):
      gguf.GgufSource(self.write(tensors=extra))

  def test_block_out_of_range(self):
    source = gguf.GgufSource(self.write())
    with self.assertRaisesRegex(ValueError, r'block 2 was.*allowed are 0\.\.1'):
      source.block(2)


if __name__ == '__main__':
  absltest.main()

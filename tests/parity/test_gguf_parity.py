"""The packaged GGUF file and Hugging Face files, against transformers.

transformers 5 rebuilds the GGUF tokenizer with GPT-2's pre-tokenizer whatever
the file's `tokenizer.ggml.pre` says. Ours follows the file (smollm: digits are
split first), so ids are compared on text without digits as transformers is,
and on all text after its pre-tokenizer was given the digit split.
"""

import pathlib
import re
import tempfile

import gguf as gguf_lib
import numpy as np
from absl.testing import absltest, parameterized
from tokenizers import pre_tokenizers

from jaxq.data import packaged, wiki
from jaxq.io import gguf, hf

try:
  import torch
  import transformers
except ImportError:
  transformers = None

BLOCKS = 2
_SPECIAL = (
  '<|im_start|>user\nHi  there, 2024 ½ ²\t<|im_end|>\n<|endoftext|> 日本語 🙂 '
  '<repo_name>x<file_sep>'
)


def fetch(test, name):
  """The path of a packaged input; skips the test where it cannot be had."""
  if transformers is None:
    test.skipTest('torch or transformers is not installed')
  try:
    return packaged.fetch(name)
  except OSError as e:
    test.skipTest(f'{name} cannot be fetched: {e}')


def assert_same_tree(test, block, state, i):
  """A block of ours equals a Hugging Face state dict's, bit by bit."""
  flat = {
    'input_layernorm': block['input_norm']['scale'],
    'post_attention_layernorm': block['post_norm']['scale'],
  }
  for name, linear in block['attention'].items():
    flat[f'self_attn.{name}'] = linear['kernel'].T
  for name, linear in block['mlp'].items():
    flat[f'mlp.{name}'] = linear['kernel'].T
  test.assertLen(flat, 9)
  for name, ours in flat.items():
    theirs = state[f'model.layers.{i}.{name}.weight'].float().numpy()
    np.testing.assert_array_equal(ours, theirs, err_msg=name)


class TokenizerParityTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pair = None

  def tokenizers(self):
    path = fetch(self, 'smollm2-135m')
    if type(self).pair is None:
      oracle = transformers.AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name
      )
      type(self).pair = gguf.GgufSource(path).tokenizer(), oracle
    return type(self).pair

  def documents(self):
    fetch(self, 'wiki-sample')
    articles = wiki.wiki_articles('evaluation')
    return [_SPECIAL, *(text[:30_000] for _, text in articles)]

  def assert_same_ids(self, documents):
    ours, oracle = self.tokenizers()
    total = 0
    for document in documents:
      expected = oracle(document, add_special_tokens=False)['input_ids']
      ids = ours.encode(document, add_special_tokens=False).ids
      self.assertEqual(ids, expected)
      total += len(ids)
      # transformers asks the same of its decoder: the text comes back.
      self.assertEqual(ours.decode(ids, skip_special_tokens=False), document)
    return total

  def test_text_without_digits(self):
    documents = [re.sub(r'[\d½²]', '', d) for d in self.documents()]
    self.assertGreater(self.assert_same_ids(documents), 90_000)

  def test_all_text_with_the_digit_split(self):
    _, oracle = self.tokenizers()
    backend = oracle.backend_tokenizer
    before = backend.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, before])
    try:
      self.assertGreater(self.assert_same_ids(self.documents()), 90_000)
    finally:
      backend.pre_tokenizer = before

  def test_special_tokens(self):
    ours, oracle = self.tokenizers()
    for i in range(17):
      token = oracle.convert_ids_to_tokens(i)
      self.assertEqual(ours.encode(f'a{token}b').ids[1], i)
    self.assertEqual(ours.get_vocab_size(), len(oracle))


class WeightParityTest(parameterized.TestCase):
  def test_first_blocks_of_the_packaged_file(self):
    path = fetch(self, 'smollm2-135m')
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    _cut(path, folder / 'cut.gguf')
    model = transformers.AutoModelForCausalLM.from_pretrained(
      str(folder), gguf_file='cut.gguf', dtype=torch.float32
    )
    state = model.state_dict()
    source = gguf.GgufSource(path)
    for i in range(BLOCKS):
      assert_same_tree(self, source.block(i), state, i)
    outside = source.outside()
    np.testing.assert_array_equal(
      outside['embed']['embedding'],
      state['model.embed_tokens.weight'].numpy(),
    )
    np.testing.assert_array_equal(
      outside['final_norm']['scale'], state['model.norm.weight'].numpy()
    )
    for key in ('hidden_size', 'num_key_value_heads', 'rms_norm_eps'):
      self.assertEqual(source.config[key], getattr(model.config, key))
    rope = model.config.rope_parameters
    self.assertEqual(source.config['rope_theta'], rope['rope_theta'])

  @parameterized.product(kv_heads=(1, 3, 6), tied=(True, False))
  def test_what_transformers_saves(self, kv_heads, tied):
    if transformers is None:
      self.skipTest('torch or transformers is not installed')
    config = transformers.LlamaConfig(
      vocab_size=64,
      hidden_size=48,
      intermediate_size=80,
      num_hidden_layers=2,
      num_attention_heads=6,
      num_key_value_heads=kv_heads,
      tie_word_embeddings=tied,
      rope_theta=5000.0,
    )
    model = transformers.LlamaForCausalLM(config)
    folder = self.enterContext(tempfile.TemporaryDirectory())
    model.save_pretrained(folder, max_shard_size='100KB')
    source = hf.HfSource(folder)
    self.assertEqual(source.config['rope_theta'], 5000.0)
    self.assertEqual(source.config['tie_word_embeddings'], tied)
    state = model.state_dict()
    for i in range(2):
      assert_same_tree(self, source.block(i), state, i)
    if not tied:
      np.testing.assert_array_equal(
        source.outside()['head']['kernel'].T, state['lm_head.weight'].numpy()
      )


def _cut(path, target):
  """Copies the first blocks of a GGUF file, raw, without the tokenizer."""
  reader = gguf_lib.GGUFReader(path)
  writer = gguf_lib.GGUFWriter(str(target), 'llama')
  for key, field in reader.fields.items():
    if key.startswith('llama.'):
      value = field.contents()
      value = BLOCKS if key == 'llama.block_count' else value
      writer.add_key_value(key, value, field.types[0])
  for tensor in reader.tensors:
    block = re.match(r'blk\.(\d+)\.', tensor.name)
    if block and int(block[1]) >= BLOCKS:
      continue
    writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


if __name__ == '__main__':
  absltest.main()

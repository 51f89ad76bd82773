"""Tokenizers rebuilt from metadata or read from tokenizer.json."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized

from jaxq.io import tokenizer
from tests.io import model_files

SIZE = len(model_files.TOKENS)


def build(vocab_size=SIZE, **changes):
  changes = {f'tokenizer.ggml.{k}': v for k, v in changes.items()}
  metadata = model_files.gguf_metadata() | changes
  metadata = {k: v for k, v in metadata.items() if v is not None}
  return tokenizer.from_gguf(metadata, vocab_size, 'tiny.gguf')


class FromGgufTest(parameterized.TestCase):
  def test_merges_and_ids_are_the_files(self):
    encoding = build().encode('hello world')
    self.assertEqual(encoding.tokens, ['hello', 'Ġw', 'o', 'r', 'l', 'd'])
    self.assertEqual(
      encoding.ids, [model_files.TOKENS.index(t) for t in encoding.tokens]
    )

  @parameterized.parameters('gpt-2', 'default', 'smollm', 'llama-bpe', 'qwen2')
  def test_every_text_comes_back(self, pre):
    text = 'hello  world\n\n 1860 ½ été 日本 🙂\t'
    rebuilt = build(pre=pre)
    self.assertEqual(rebuilt.decode(rebuilt.encode(text).ids), text)

  def test_smollm_parts_digits_from_what_stands_before(self):
    # GPT-2 keeps the last space for the word that follows; digits are no word.
    pieces = build().pre_tokenizer.pre_tokenize_str('a\n\n18 b')
    self.assertEqual([p for p, _ in pieces], ['a', 'ĊĊ', '1', '8', 'Ġb'])
    pieces = build(pre='gpt-2').pre_tokenizer.pre_tokenize_str('a\n\n18 b')
    self.assertEqual([p for p, _ in pieces], ['a', 'Ċ', 'Ċ', '18', 'Ġb'])

  def test_llama_bpe_takes_three_digits(self):
    pieces = build(pre='llama-bpe').pre_tokenizer.pre_tokenize_str("It's 18605")
    self.assertEqual([p for p, _ in pieces], ['It', "'s", 'Ġ', '186', '05'])

  def test_special_tokens_are_found_in_text(self):
    rebuilt = build()
    encoding = rebuilt.encode('<|start|>hello<|end|><user>')
    self.assertEqual(
      encoding.tokens, ['<|start|>', 'hello', '<|end|>', '<user>']
    )
    # User-defined tokens are text, control tokens are not.
    self.assertEqual(rebuilt.decode(encoding.ids), 'hello<user>')

  def test_bos_is_added_where_the_file_says_so(self):
    rebuilt = build(add_bos_token=True)
    self.assertEqual(rebuilt.encode('hello').tokens, ['<|start|>', 'hello'])
    plain = rebuilt.encode('hello', add_special_tokens=False)
    self.assertEqual(plain.tokens, ['hello'])

  @parameterized.parameters(
    ({'model': 'llama'}, ValueError, f'{SIZE} tokens and 0 scores'),
    ({'model': 'bert'}, NotImplementedError, "model 'bert'; allowed are gpt2"),
    ({'pre': 'tekken'}, NotImplementedError, r"'tekken'; allowed.*'smollm'"),
    ({'tokens': None}, ValueError, r"lacks \['tokens'\]"),
    ({'merges': None}, ValueError, r"lacks \['merges'\]"),
    ({'token_type': [1]}, ValueError, f'{SIZE} tokens .* and 1 token types'),
    (
      {'tokens': ['a', 'a'], 'token_type': [1, 1]},
      ValueError,
      r'2 tokens \(1 different\)',
    ),
    ({'merges': ['x yz']}, ValueError, 'tokens and merges do not fit'),
    (
      {'add_bos_token': True, 'bos_token_id': 10**6},
      ValueError,
      'bos_token_id=1000000; allowed are 0',
    ),
  )
  def test_refusals(self, changes, error, message):
    with self.assertRaisesRegex(error, message):
      build(**changes)

  def test_more_tokens_than_the_model_embeds(self):
    with self.assertRaisesRegex(
      ValueError, f'token id {SIZE - 1}, the model embeds 100 tokens'
    ):
      build(vocab_size=100)


class FromFileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = folder / 'tokenizer.json'

  def test_truncation_and_padding_are_off(self):
    stored = build()
    stored.enable_truncation(2)
    stored.enable_padding(length=8)
    stored.save(str(self.path))
    read = tokenizer.from_file(self.path, SIZE)
    self.assertLen(read.encode('hello world').ids, 6)

  def test_refusals(self):
    with self.assertRaisesRegex(FileNotFoundError, 'needs tokenizer.json'):
      tokenizer.from_file(self.path, SIZE)
    self.path.write_text('{}')
    with self.assertRaisesRegex(ValueError, 'is not a tokenizer.json'):
      tokenizer.from_file(self.path, SIZE)
    build().save(str(self.path))
    with self.assertRaisesRegex(ValueError, 'model embeds 10 tokens'):
      tokenizer.from_file(self.path, 10)


if __name__ == '__main__':
  absltest.main()

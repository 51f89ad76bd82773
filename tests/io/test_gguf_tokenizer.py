"""Tokenizers written as GGUF metadata read back as they were."""

import tokenizers
from absl.testing import absltest, parameterized
from tokenizers import models, normalizers, pre_tokenizers, processors

from jaxq.io import gguf_tokenizer, tokenizer
from tests.io import model_files, test_spm

SIZE = len(model_files.TOKENS)
CONFIG = {'vocab_size': SIZE, 'bos_token_id': 1, 'eos_token_id': 0}
TEXT = "hello  world, it's<user> 18605\n\n½ étě 日本 🙂<|end|>hello"


def byte_level(pre, **changes):
  changes = {f'tokenizer.ggml.{k}': v for k, v in changes.items()}
  metadata = model_files.gguf_metadata() | {'tokenizer.ggml.pre': pre} | changes
  return tokenizer.from_gguf(metadata, SIZE, 'tiny.gguf')


class RoundTripTest(parameterized.TestCase):
  @parameterized.product(
    pre=('gpt-2', 'smollm', 'llama-bpe', 'qwen2'), bos=(True, False)
  )
  def test_byte_level(self, pre, bos):
    original = byte_level(pre, add_bos_token=bos)
    metadata = gguf_tokenizer.metadata(original, CONFIG)
    self.assertEqual(metadata['tokenizer.ggml.pre'], pre)
    self.assertEqual(metadata['tokenizer.ggml.add_bos_token'], bos)
    self.assertEqual(
      metadata['tokenizer.ggml.token_type'], list(model_files.TYPES)
    )
    back = tokenizer.from_gguf(metadata, SIZE, 'written')
    self.assertEqual(back.encode(TEXT).tokens, original.encode(TEXT).tokens)
    self.assertEqual(back.encode(TEXT).ids, original.encode(TEXT).ids)

  @parameterized.parameters('llama', 'gemma')
  def test_sentencepiece(self, kind):
    original = test_spm.build(kind)
    config = CONFIG | {'vocab_size': 604}  # Rows that no token uses.
    metadata = gguf_tokenizer.metadata(original, config)
    self.assertEqual(metadata['tokenizer.ggml.tokens'][603], '[PAD603]')
    self.assertEqual(metadata['tokenizer.ggml.token_type'][603], 5)
    for key in ('token_type', 'add_space_prefix'):
      self.assertEqual(
        metadata[f'tokenizer.ggml.{key}'][:600]
        if key == 'token_type'
        else metadata[f'tokenizer.ggml.{key}'],
        test_spm.metadata(kind)[f'tokenizer.ggml.{key}'],
      )
    back = tokenizer.from_gguf(metadata, 604, 'written')
    self.assertEqual(back.encode(TEXT).ids, original.encode(TEXT).ids)

  def test_metaspace_is_sentencepiece(self):
    original = test_spm.build('llama')
    original.normalizer = normalizers.Sequence([])
    original.pre_tokenizer = pre_tokenizers.Metaspace(
      prepend_scheme='first', split=False
    )
    metadata = gguf_tokenizer.metadata(original, CONFIG | {'vocab_size': 600})
    self.assertTrue(metadata['tokenizer.ggml.add_space_prefix'])

  def test_several_ends_of_text_give_the_first(self):
    config = CONFIG | {'eos_token_id': [1, 0]}
    metadata = gguf_tokenizer.metadata(byte_level('gpt-2'), config)
    self.assertEqual(metadata['tokenizer.ggml.eos_token_id'], 1)


class RefusalTest(parameterized.TestCase):
  def test_another_model(self):
    unigram = tokenizers.Tokenizer(models.Unigram([('a', 0.0)], None))
    with self.assertRaisesRegex(
      NotImplementedError, 'is a Unigram model.*keeps tokenizer.json'
    ):
      gguf_tokenizer.metadata(unigram, CONFIG)

  def test_pre_tokenizer_without_a_name(self):
    changed = byte_level('gpt-2')
    changed.pre_tokenizer = pre_tokenizers.Whitespace()
    with self.assertRaisesRegex(
      NotImplementedError, r"'Whitespace'.*no name in GGUF; known.*'smollm'"
    ):
      gguf_tokenizer.metadata(changed, CONFIG)

  def test_normalizer_without_a_name(self):
    changed = byte_level('gpt-2')
    changed.normalizer = normalizers.Lowercase()
    with self.assertRaisesRegex(NotImplementedError, "'Lowercase'.*no name"):
      gguf_tokenizer.metadata(changed, CONFIG)

  def test_sentencepiece_with_other_steps_or_merges(self):
    config = CONFIG | {'vocab_size': 600}
    changed = test_spm.build('llama')
    changed.pre_tokenizer = pre_tokenizers.Whitespace()
    with self.assertRaisesRegex(NotImplementedError, 'its text steps are not'):
      gguf_tokenizer.metadata(changed, config)
    tokens = ['<0x00>', 'a', 'b', 'c', 'ab', 'bc', 'abc']
    model = models.BPE(
      {t: i for i, t in enumerate(tokens)},
      [('a', 'b'), ('ab', 'c')],
      byte_fallback=True,
    )
    changed = tokenizers.Tokenizer(model)
    changed.normalizer = normalizers.Replace(' ', '\u2581')
    with self.assertRaisesRegex(NotImplementedError, 'its merges are not'):
      gguf_tokenizer.metadata(changed, config)

  def test_templates_of_several_tokens(self):
    changed = byte_level('gpt-2')
    changed.post_processor = processors.TemplateProcessing(
      single=['<|start|>', '<|end|>', '$A'],
      special_tokens=[('<|start|>', 1), ('<|end|>', 0)],
    )
    with self.assertRaisesRegex(NotImplementedError, 'one token before'):
      gguf_tokenizer.metadata(changed, CONFIG)

  def test_more_ids_than_rows(self):
    with self.assertRaisesRegex(ValueError, 'the model embeds 10 tokens'):
      gguf_tokenizer.metadata(byte_level('gpt-2'), CONFIG | {'vocab_size': 10})


if __name__ == '__main__':
  absltest.main()

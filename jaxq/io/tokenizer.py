"""Tokenizers: rebuilt from GGUF metadata, or read from tokenizer.json.

A GGUF file carries tokens and token types, and with them what its tokenizer
model needs: merges and the name of a pre-tokenizer (`gpt2`, byte-level BPE), or
scores (`llama`, SentencePiece). Control and user-defined tokens become added
tokens, so that they are found in text before any splitting.

Two things no GGUF file says are taken from the models themselves: qwen2 text
is first normalised to NFC, and a Llama 3 word that is a token is not cut.
"""

import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxq.io import spm

_LLAMA_BPE = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2 = _LLAMA_BPE.replace('{1,3}', '')


def _gpt2():
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm():
  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _gpt2()])


def _split(pattern):
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
  level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([split, level])


def _llama_bpe():
  return _split(_LLAMA_BPE)


def _qwen2():
  return _split(_QWEN2)


# 'default' is what converters write for a model they do not know; like
# transformers, we read it as GPT-2's. The first name of a kind is written.
PRE_TOKENIZERS = {
  'gpt-2': _gpt2,
  'default': _gpt2,
  'smollm': _smollm,
  'llama-bpe': _llama_bpe,
  'llama3': _llama_bpe,
  'llama-v3': _llama_bpe,
  'qwen2': _qwen2,
  'deepseek-r1-qwen': _qwen2,
}
NORMALIZERS = {'qwen2': normalizers.NFC, 'deepseek-r1-qwen': normalizers.NFC}
LLAMA_3 = ('llama-bpe', 'llama3', 'llama-v3')


def from_gguf(
  metadata: dict, vocab_size: int, where: str
) -> tokenizers.Tokenizer:
  """Rebuilds the tokenizer of a GGUF file.

  Args:
    metadata: the file's key-value pairs.
    vocab_size: rows of the model's embedding.
    where: the file, for messages.

  Returns:
    A `tokenizers.Tokenizer` whose ids are the file's.

  Raises:
    NotImplementedError: an unknown tokenizer model or pre-tokenizer.
    ValueError: tokens, merges, scores or types missing or contradicting each
      other, or more tokens than the model has embeddings.
  """
  kind = metadata.get('tokenizer.ggml.model')
  if kind not in _MODELS:
    raise NotImplementedError(
      f'{where}: tokenizer model {kind!r}; allowed are gpt2 (byte-level BPE) '
      'and llama (SentencePiece). Load the Hugging Face directory, which has '
      'tokenizer.json.'
    )
  tokens, types = _lists(metadata, where)
  tokenizer = _MODELS[kind](metadata, tokens, types, where)
  template = _template(metadata, tokens, where)
  if template is not None:
    tokenizer.post_processor = template
  special = [
    tokenizers.AddedToken(
      token, special=kind != spm.USER_DEFINED, normalized=False
    )
    for token, kind in zip(tokens, types, strict=True)
    if kind in (spm.UNKNOWN, spm.CONTROL, spm.USER_DEFINED)
  ]
  tokenizer.add_tokens([t for t in special if not t.special])
  tokenizer.add_special_tokens([t for t in special if t.special])
  check_vocabulary(tokenizer, vocab_size, where)
  return tokenizer


def from_file(path: pathlib.Path, vocab_size: int) -> tokenizers.Tokenizer:
  """Reads tokenizer.json; truncation and padding stored in it are off."""
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; a Hugging Face directory needs tokenizer.json. '
      'Save the tokenizer in its fast format.'
    )
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as e:  # The library raises a bare Exception.
    raise ValueError(
      f'{path}: is not a tokenizer.json that can be read ({e}). Save it again.'
    ) from e
  tokenizer.no_truncation()
  tokenizer.no_padding()
  check_vocabulary(tokenizer, vocab_size, str(path))
  return tokenizer


def check_vocabulary(
  tokenizer: tokenizers.Tokenizer, vocab_size: int, where: str
) -> None:
  """Raises ValueError when the tokenizer has ids the model has no row for."""
  largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
  if largest >= vocab_size:
    raise ValueError(
      f'{where}: the tokenizer has token id {largest}, the model embeds '
      f'{vocab_size} tokens; allowed are ids below that. Tokenizer and model '
      'do not belong together.'
    )


def _gpt2_model(metadata, tokens, types, where) -> tokenizers.Tokenizer:
  """Byte-level BPE, from merges and the name of a pre-tokenizer."""
  del types
  pre = metadata.get('tokenizer.ggml.pre', 'default')
  if pre not in PRE_TOKENIZERS:
    raise NotImplementedError(
      f'{where}: pre-tokenizer {pre!r}; allowed are {sorted(PRE_TOKENIZERS)}. '
      'Load the Hugging Face directory, which has tokenizer.json.'
    )
  merges = metadata.get('tokenizer.ggml.merges')
  if not merges:
    raise ValueError(
      f"{where}: the metadata lacks ['merges'] under tokenizer.ggml; a gpt2 "
      'tokenizer needs them. Convert the model again.'
    )
  try:
    pairs = [tuple(merge.split(' ')) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, pairs, ignore_merges=pre in LLAMA_3)
  except Exception as e:  # The library raises a bare Exception.
    raise ValueError(
      f'{where}: tokens and merges do not fit together ({e}). Convert the '
      'model again.'
    ) from e
  tokenizer = tokenizers.Tokenizer(model)
  if pre in NORMALIZERS:
    tokenizer.normalizer = NORMALIZERS[pre]()
  tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  return tokenizer


def _llama_model(metadata, tokens, types, where) -> tokenizers.Tokenizer:
  """SentencePiece's BPE, from scores."""
  scores = metadata.get('tokenizer.ggml.scores')
  if not scores or len(scores) != len(tokens):
    raise ValueError(
      f'{where}: {len(tokens)} tokens and {len(scores or ())} scores under '
      'tokenizer.ggml; a llama tokenizer needs one score per token. Convert '
      'the model again.'
    )
  for key in ('remove_extra_whitespaces', 'precompiled_charsmap'):
    if metadata.get(f'tokenizer.ggml.{key}'):
      raise NotImplementedError(
        f'{where}: tokenizer.ggml.{key} is set, which changes the text before '
        'it is cut; allowed is a llama tokenizer without it. Load the Hugging '
        'Face directory, which has tokenizer.json.'
      )
  unknown = metadata.get('tokenizer.ggml.unknown_token_id')
  if unknown is None and spm.UNKNOWN in types:
    unknown = types.index(spm.UNKNOWN)
  if unknown is not None and not 0 <= unknown < len(tokens):
    raise ValueError(
      f'{where}: unknown_token_id={unknown}; allowed are 0..{len(tokens) - 1}. '
      'Convert the model again.'
    )
  return spm.build(
    tokens,
    scores,
    types,
    add_space_prefix=metadata.get('tokenizer.ggml.add_space_prefix', True),
    unknown=None if unknown is None else tokens[unknown],
  )


# tokenizer.ggml.model: (metadata, tokens, types, where) -> the tokenizer.
_MODELS = {'gpt2': _gpt2_model, 'llama': _llama_model}


def _lists(metadata: dict, where: str) -> tuple[list, list]:
  """Tokens and token types, checked."""
  tokens = metadata.get('tokenizer.ggml.tokens')
  if not tokens:
    raise ValueError(
      f"{where}: the metadata lacks ['tokens'] under tokenizer.ggml; a "
      'tokenizer needs them. Convert the model again.'
    )
  types = metadata.get('tokenizer.ggml.token_type') or [1] * len(tokens)
  if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(
      f'{where}: {len(tokens)} tokens ({len(set(tokens))} different) and '
      f'{len(types)} token types; the three must be equal. Convert the model '
      'again.'
    )
  return tokens, types


def _template(metadata: dict, tokens: list, where: str):
  """BOS before and EOS behind the text, where the file asks for them.

  A file that says nothing means llama.cpp's default: BOS for SentencePiece and
  for Llama 3.
  """
  default = metadata.get('tokenizer.ggml.model') == 'llama' or (
    metadata.get('tokenizer.ggml.pre') in LLAMA_3
  )
  ends = {}
  for name, implied in (('bos', default), ('eos', False)):
    key, i = (
      f'add_{name}_token',
      metadata.get(f'tokenizer.ggml.{name}_token_id'),
    )
    stated = metadata.get(f'tokenizer.ggml.{key}')
    if not (implied and i is not None if stated is None else stated):
      continue
    if i is None or not 0 <= i < len(tokens):
      raise ValueError(
        f'{where}: {key} is set and {name}_token_id={i}; allowed are '
        f'0..{len(tokens) - 1}. Convert the model again.'
      )
    ends[name] = i
  if not ends:
    return None
  bos = [tokens[ends['bos']]] if 'bos' in ends else []
  eos = [tokens[ends['eos']]] if 'eos' in ends else []
  return processors.TemplateProcessing(
    single=[*bos, '$A', *eos],
    pair=[*bos, '$A', *eos, *bos, '$B', *eos],
    special_tokens=sorted({(tokens[i], i) for i in ends.values()}),
  )

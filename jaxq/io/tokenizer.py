"""Tokenizers: rebuilt from GGUF metadata, or read from tokenizer.json.

A GGUF file of a byte-level BPE model carries tokens, merges and token types,
and names its pre-tokenizer in `tokenizer.ggml.pre`; that is all a
`tokenizers.Tokenizer` needs. Control and user-defined tokens become added
tokens, so that they are found in text before any splitting.
"""

import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

# llama.cpp's token types.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_LLAMA_BPE = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _gpt2():
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm():
  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _gpt2()])


def _llama_bpe():
  split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA_BPE), 'isolated')
  level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([split, level])


# 'default' is what converters write for a model they do not know; like
# transformers, we read it as GPT-2's.
PRE_TOKENIZERS = {
  'gpt-2': _gpt2,
  'default': _gpt2,
  'smollm': _smollm,
  'llama-bpe': _llama_bpe,
}


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
    NotImplementedError: SentencePiece, or an unknown pre-tokenizer.
    ValueError: tokens, merges or types missing or contradicting each other,
      or more tokens than the model has embeddings.
  """
  kind = metadata.get('tokenizer.ggml.model')
  if kind == 'llama':
    raise NotImplementedError(
      f'{where}: tokenizer model llama (SentencePiece with scores); allowed is '
      'gpt2 (byte-level BPE), as SentencePiece is not rebuilt yet. Load the '
      'Hugging Face directory, which has tokenizer.json.'
    )
  if kind != 'gpt2':
    raise NotImplementedError(
      f'{where}: tokenizer model {kind!r}; allowed is gpt2 (byte-level BPE). '
      'Load the Hugging Face directory, which has tokenizer.json.'
    )
  pre = metadata.get('tokenizer.ggml.pre', 'default')
  if pre not in PRE_TOKENIZERS:
    raise NotImplementedError(
      f'{where}: pre-tokenizer {pre!r}; allowed are {sorted(PRE_TOKENIZERS)}. '
      'Load the Hugging Face directory, which has tokenizer.json.'
    )
  tokens, merges, types = _lists(metadata, where)
  tokenizer = tokenizers.Tokenizer(
    _bpe(tokens, merges, ignore_merges=pre == 'llama-bpe', where=where)
  )
  tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = _post_processor(metadata, tokens, where)
  special = [
    tokenizers.AddedToken(
      token, special=kind != _USER_DEFINED, normalized=False
    )
    for token, kind in zip(tokens, types, strict=True)
    if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
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


def _lists(metadata: dict, where: str) -> tuple[list, list, list]:
  """Tokens, merges and token types, checked."""
  keys = ('tokens', 'merges')
  missing = [k for k in keys if not metadata.get(f'tokenizer.ggml.{k}')]
  if missing:
    raise ValueError(
      f'{where}: the metadata lacks {missing} under tokenizer.ggml; a gpt2 '
      'tokenizer needs both. Convert the model again.'
    )
  tokens, merges = (metadata[f'tokenizer.ggml.{k}'] for k in keys)
  types = metadata.get('tokenizer.ggml.token_type') or [1] * len(tokens)
  if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(
      f'{where}: {len(tokens)} tokens ({len(set(tokens))} different) and '
      f'{len(types)} token types; the three must be equal. Convert the model '
      'again.'
    )
  return tokens, merges, types


def _bpe(tokens, merges, *, ignore_merges: bool, where: str) -> models.BPE:
  vocab = {token: i for i, token in enumerate(tokens)}
  try:
    pairs = [tuple(merge.split(' ')) for merge in merges]
    return models.BPE(vocab, pairs, ignore_merges=ignore_merges)
  except Exception as e:  # The library raises a bare Exception.
    raise ValueError(
      f'{where}: tokens and merges do not fit together ({e}). Convert the '
      'model again.'
    ) from e


def _post_processor(metadata: dict, tokens: list, where: str):
  if not metadata.get('tokenizer.ggml.add_bos_token', False):
    return processors.ByteLevel(trim_offsets=False)
  bos = metadata.get('tokenizer.ggml.bos_token_id')
  if bos is None or not 0 <= bos < len(tokens):
    raise ValueError(
      f'{where}: add_bos_token is set and bos_token_id={bos}; allowed are '
      f'0..{len(tokens) - 1}. Convert the model again.'
    )
  token = tokens[bos]
  return processors.TemplateProcessing(
    single=[token, '$A'],
    pair=[token, '$A', token, '$B'],
    special_tokens=[(token, bos)],
  )

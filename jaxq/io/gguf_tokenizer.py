"""A `tokenizers.Tokenizer` as GGUF metadata: jaxq.io.tokenizer inverted.

GGUF knows a tokenizer by the name of its kind, not by its parts. So the parts
are compared with those that each name stands for, and a tokenizer that is
none of them is refused: a file whose ids are silently others is worse than no
file.
"""

import json
from typing import Any

import tokenizers

from jaxq.io import spm
from jaxq.io import tokenizer as tokenizer_lib

_ADVICE = 'Export to a format that keeps tokenizer.json.'


def metadata(
  tokenizer: tokenizers.Tokenizer, config: dict[str, Any]
) -> dict[str, Any]:
  """The key-value pairs under `tokenizer.ggml`.

  Args:
    tokenizer: byte-level BPE with a pre-tokenizer that has a name, or a
      SentencePiece BPE.
    config: of the model: vocab_size, bos_token_id, eos_token_id.

  Raises:
    NotImplementedError: a tokenizer GGUF has no name for.
    ValueError: a tokenizer with more ids than the model embeds.
  """
  tokenizer_lib.check_vocabulary(tokenizer, config['vocab_size'], 'export')
  parts = json.loads(tokenizer.to_str())
  model = parts['model']
  if model['type'] != 'BPE':
    raise NotImplementedError(
      f'export: the tokenizer is a {model["type"]} model; GGUF as written here '
      f'holds BPE, byte-level or of SentencePiece. {_ADVICE}'
    )
  tokens, types = _tokens(tokenizer, parts, config['vocab_size'])
  pairs = [
    tuple(m.split(' ') if isinstance(m, str) else m) for m in model['merges']
  ]
  if model.get('byte_fallback'):
    found = _sentencepiece(parts, tokens, types, pairs)
  else:
    found = _byte_level(parts, pairs)
  pairs_out = {
    **found,
    'tokens': tokens,
    'token_type': types,
    **_ends(tokenizer, config),
  }
  return {f'tokenizer.ggml.{key}': value for key, value in pairs_out.items()}


def _tokens(tokenizer, parts, vocab_size) -> tuple[list[str], list[int]]:
  """Token and type of every row of the embedding."""
  names = {i: t for t, i in tokenizer.get_vocab(True).items()}
  kinds = dict.fromkeys(names, spm.NORMAL)
  for added in parts['added_tokens']:
    special = added['special']
    kinds[added['id']] = spm.CONTROL if special else spm.USER_DEFINED
  unknown = parts['model'].get('unk_token')
  if parts['model'].get('byte_fallback'):
    for i, name in names.items():
      if name == unknown:
        kinds[i] = spm.UNKNOWN
      elif len(name) == 6 and name.startswith('<0x') and name.endswith('>'):
        kinds[i] = spm.BYTE
  return (
    [names.get(i, f'[PAD{i}]') for i in range(vocab_size)],
    [kinds.get(i, spm.UNUSED) for i in range(vocab_size)],
  )


def _byte_level(parts, pairs) -> dict[str, Any]:
  """Finds the name that stands for these parts."""
  for name, make in tokenizer_lib.PRE_TOKENIZERS.items():
    probe = tokenizers.Tokenizer(tokenizers.models.BPE())
    probe.pre_tokenizer = make()
    if name in tokenizer_lib.NORMALIZERS:
      probe.normalizer = tokenizer_lib.NORMALIZERS[name]()
    known = json.loads(probe.to_str())
    if all(
      _plain(known[key]) == _plain(parts[key])
      for key in ('pre_tokenizer', 'normalizer')
    ) and (name in tokenizer_lib.LLAMA_3) == bool(
      parts['model'].get('ignore_merges')
    ):
      return {
        'model': 'gpt2',
        'pre': name,
        'merges': [' '.join(pair) for pair in pairs],
      }
  raise NotImplementedError(
    'export: the tokenizer cuts text in a way (normalizer '
    f'{_plain(parts["normalizer"])}, pre_tokenizer '
    f'{_plain(parts["pre_tokenizer"])}) that has no name in GGUF; known are '
    f'those of {sorted(tokenizer_lib.PRE_TOKENIZERS)}. {_ADVICE}'
  )


def _sentencepiece(parts, tokens, types, pairs) -> dict[str, Any]:
  prefix = _space_prefix(parts)
  scores = None if prefix is None else spm.scores(tokens, types, pairs)
  if scores is None:
    what = 'text steps' if prefix is None else 'merges'
    raise NotImplementedError(
      f'export: the tokenizer has byte fallback, but its {what} are not those '
      'of a SentencePiece BPE model, which is what GGUF can hold. '
      f'{_ADVICE}'
    )
  found = {
    'model': 'llama',
    'pre': 'default',
    'scores': scores,
    'add_space_prefix': prefix,
  }
  if spm.UNKNOWN in types:
    found['unknown_token_id'] = types.index(spm.UNKNOWN)
  return found


def _space_prefix(parts) -> bool | None:
  """Whether a space is put before the text; None for steps we do not know.

  Metaspace puts none before text that begins with one, and with 'first' none
  after a special token; GGUF has one rule, and this is nearest to it.
  """
  replace = {
    'type': 'Replace',
    'pattern': {'String': ' '},
    'content': spm.SPACE,
  }
  prepend = {'type': 'Prepend', 'prepend': spm.SPACE}
  normalizer, before = parts['normalizer'], parts['pre_tokenizer']
  steps = [normalizer] if normalizer else []
  if normalizer and normalizer['type'] == 'Sequence':
    steps = normalizer['normalizers']
  if before and before['type'] == 'Metaspace' and not steps:
    return (
      None
      if before.get('split', True)
      else (before['prepend_scheme'] != 'never')
    )
  # Gemma cuts at spaces of which none are left.
  if before and not (
    before['type'] == 'Split' and before['pattern'] == {'String': ' '}
  ):
    return None
  return {1: False, 2: True}.get(
    len(steps) if steps in ([replace], [prepend, replace]) else 0
  )


def _ends(tokenizer, config) -> dict[str, Any]:
  """BOS and EOS, and whether the tokenizer adds them."""
  plain = tokenizer.encode('a', add_special_tokens=False).ids
  ids = tokenizer.encode('a').ids
  start = next(
    (n for n in range(2) if ids[n : n + len(plain)] == plain), len(ids)
  )
  before, behind = ids[:start], ids[start + len(plain) :]
  if start == len(ids) or len(behind) > 1:
    raise NotImplementedError(
      f'export: the tokenizer turns the ids {plain} into {ids}; GGUF can say '
      f'one token before and one behind the text. {_ADVICE}'
    )
  eos = config.get('eos_token_id')
  found = {
    'bos_token_id': before[0] if before else config.get('bos_token_id'),
    'eos_token_id': behind[0]
    if behind
    else eos[0]
    if isinstance(eos, list | tuple) and eos
    else eos,
    'add_bos_token': bool(before),
    'add_eos_token': bool(behind),
  }
  return {key: value for key, value in found.items() if value is not None}


def _plain(part: Any) -> Any:
  """A tokenizer part without what does not change ids."""
  if part is None:
    return None
  if part['type'] == 'Sequence':
    [key] = [k for k in part if k != 'type']
    parts = [_plain(p) for p in part[key]]
    return parts[0] if len(parts) == 1 else {'type': 'Sequence', 'of': parts}
  return {k: v for k, v in part.items() if k != 'trim_offsets'}

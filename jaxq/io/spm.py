"""SentencePiece's BPE as a `tokenizers.Tokenizer`, from pieces and scores.

Kudo and Richardson, 2018, arXiv 1808.06226. SentencePiece joins, again and
again, the neighbours whose joint piece has the best score. `tokenizers` joins
the pair of the lowest rank; so every way to cut a piece in two becomes a merge,
ranked by the score of the piece it makes: `merges`. What no piece covers
becomes its UTF-8 bytes, as pieces <0x00>..<0xFF> (byte fallback).

A space is the character U+2581, and one is put before the text
(`add_space_prefix`), also after a special token, as llama.cpp and the first
Llama releases do.
"""

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

SPACE = '\u2581'
# llama.cpp's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def build(
  tokens: Sequence[str],
  scores: Sequence[float],
  types: Sequence[int],
  *,
  add_space_prefix: bool,
  unknown: str | None,
) -> tokenizers.Tokenizer:
  """The tokenizer of a vocabulary, without added tokens and templates.

  Args:
    tokens: pieces in the order of their ids.
    scores: of each piece; the highest is joined first.
    types: of each piece, in llama.cpp's numbers.
    add_space_prefix: put a space before the text.
    unknown: the piece of what cannot be written, if any.
  """
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      {token: i for i, token in enumerate(tokens)},
      merges(tokens, scores, types),
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=BYTE in types,
    )
  )
  steps: list[Any] = [normalizers.Replace(' ', SPACE)]
  back: list[Any] = [
    decoders.Replace(SPACE, ' '),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if add_space_prefix:
    steps.insert(0, normalizers.Prepend(SPACE))
    back.append(decoders.Strip(' ', 1, 0))
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.decoder = decoders.Sequence(back)
  return tokenizer


def merges(
  tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
  """All cuts of normal pieces into two, best score of the whole first.

  Pieces of equal score keep the order of their ids, cuts of one piece that of
  the ids of their parts.
  """
  ids = {
    token: i
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    if kind == NORMAL
  }
  found = []
  for i in sorted(ids.values(), key=lambda i: (-scores[i], i)):
    piece = tokens[i]
    cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
    known = [(a, b) for a, b in cuts if a in ids and b in ids]
    found += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
  return found


def scores(
  tokens: Sequence[str],
  types: Sequence[int],
  pairs: Sequence[tuple[str, str]],
) -> list[float] | None:
  """Scores under which SentencePiece joins as `pairs` do: `merges` inverted.

  A piece made by the k-th pair scores -k, one that no pair makes less than all
  of these.

  Returns:
    One score per token, or None where no scores do: pieces that could be cut
    in ways which `pairs` lacks, or cuts of one piece of very different rank.
  """
  rank: dict[str, int] = {}
  for pair in pairs:
    rank.setdefault(''.join(pair), len(rank) + 1)
  last = len(rank)
  found = [
    0.0 if kind != NORMAL else -float(rank.get(token, last + i + 1))
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
  ]
  again = merges(tokens, found, types)
  same = set(again) == set(pairs) and (
    [a + b for a, b in again] == [a + b for a, b in pairs]
  )
  return found if same else None

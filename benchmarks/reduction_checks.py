"""What the table of token reducers is expected to show, and what it showed.

A line per expectation, with the figures and whether they are as expected. The
margins are those that the methods were set when they were chosen for this
testbed, not the papers' (theirs are on large models).
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]

ALL = 'all tokens'
CONTROLS = ('random', 'uniform', 'frames')
QUERY_AWARE = ('fastv, layer 1', 'fastv, layer 2', 'sparsevlm, layer 1')
BLIND = ('tome', 'visionzip', 'prumerge', 'prumerge_plus', 'vqtoken_codes')
PEAKS = 'density peaks'
BUDGETS = (0.5, 0.25, 0.15, 0.1, 0.05)
# Rows that a check is about.
OWN_NUMBER = ('prumerge, own number', 'prumerge_plus, own number')
SHARE = "qtsplus, another question's share"
HEAVY = 'qtsplus, losses on the share x 10'
MLP = 'tokenflex, MLP'
ALIVE = 'embedlens, as many alive dropped'
CODES = 'vqtoken_codes, decoder trained'
IN_SEQUENCE = 'vqtoken, in sequence'
SHUFFLED = 'vqtoken, in sequence, map shuffled'
SEQUENCE_CODES = 'vqtoken_codes, in sequence, decoder trained'
# A count that TokenFLEX was not trained with, 9 of 16 a frame, and the largest.
FLEX_BUDGETS = (0.5625, 1.0)


def lines(rows: Rows) -> list[str]:
  """All of them, as far as their rows are there."""
  found = [*_untrained(rows)]
  for of in (_qtsplus, _cacovid, _tokenflex, _embedlens, _vqtoken, _decoder):
    found += of(rows)
  return [f'- {line}' for line in found]


def find(rows: Rows, name: str, ratio: float) -> Mapping[str, Any] | None:
  """The row of a method at a budget."""
  for row in rows:
    if row['method'] == name and row['budget'] == ratio:
      return row
  return None


def metrics(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row's metrics by name."""
  return {m['name']: m for m in row['metrics']}


def value(row: Mapping[str, Any], name: str) -> float:
  """One of them."""
  return float(metrics(row)[name]['value'])


def how_trained(folder: pathlib.Path) -> dict[str, Any]:
  """What a row stores of a trained reducer: reducer, training, schedule."""
  found = json.loads((folder / 'config.json').read_text('utf-8'))
  fields = {k: v for k, v in found['train'].items() if k != 'type'}
  return {
    'reducer': found['reducer']['text'],
    'train': fields,
    'schedule': found['schedule'],
  }


def _verdict(met: bool) -> str:
  return 'as expected' if met else 'NOT as expected'


def _gain(
  rows: Rows, name: str, than: str, ratio: float, metric: str = 'accuracy'
) -> float | None:
  """How much more a method has than another at a budget; None: no such row."""
  pair = find(rows, name, ratio), find(rows, than, ratio)
  if pair[0] is None or pair[1] is None:
    return None
  return value(pair[0], metric) - value(pair[1], metric)


def _beats(
  rows: Rows,
  name: str,
  than: str,
  ratio: float,
  least: float,
  metric: str = 'accuracy',
) -> list[str]:
  """The line of one comparison, where both rows are there."""
  gain = _gain(rows, name, than, ratio, metric)
  if gain is None:
    return []
  return [
    f'{name} against {than} at {ratio:.0%}, {metric}: {gain:+.1%} points, of '
    f'at least {least:+.1%}: {_verdict(gain >= least)}.'
  ]


def _untrained(rows: Rows) -> list[str]:
  """Reducers that are put into a model as they are."""
  full, random = find(rows, ALL, 1.0), find(rows, 'random', 0.25)
  out = []
  if full and random:
    drop = value(full, 'accuracy') - value(random, 'accuracy')
    high = metrics(random)['accuracy']['high']
    clear = high < metrics(full)['accuracy']['low']
    out.append(
      f'Random tokens at 25 % cost accuracy: {drop:.1%} points, '
      f'{_verdict(clear)}.'
    )
  for ratio in (0.25, 0.1):
    for name in BLIND:
      gain = _gain(rows, name, 'random', ratio, 'evidence recall')
      if gain is not None:
        out.append(
          f'{name} finds more evidence than random at {ratio:.0%}: '
          f'{gain:+.1%} points, {_verdict(gain > 0)}.'
        )
  for ratio in (0.1, 0.05):
    blind = [r for r in (find(rows, n, ratio) for n in BLIND) if r]
    aware = [r for r in (find(rows, n, ratio) for n in QUERY_AWARE) if r]
    if blind and aware:
      best_blind = max(blind, key=lambda r: value(r, 'accuracy'))
      best_aware = max(aware, key=lambda r: value(r, 'accuracy'))
      gain = value(best_aware, 'accuracy') - value(best_blind, 'accuracy')
      out.append(
        f'The best that sees the question ({best_aware["method"]}) beats the '
        f'best that does not ({best_blind["method"]}) at {ratio:.0%}: '
        f'{gain:+.1%} points, {_verdict(gain > 0)}.'
      )
  return out


def _qtsplus(rows: Rows) -> list[str]:
  """At the share it chooses itself, which the largest budget leaves it."""
  full, row = find(rows, ALL, 1.0), find(rows, 'qtsplus', BUDGETS[0])
  if not full or not row:
    return []
  share = value(row, 'tokens') / value(full, 'tokens')
  kept = value(row, 'accuracy') / value(full, 'accuracy')
  out = [
    f'qtsplus left to itself keeps {share:.1%} of the tokens, of at most 15 %: '
    f'{_verdict(share <= 0.15)}; and {kept:.1%} of the accuracy, of at least '
    f'95 %: {_verdict(kept >= 0.95)}.'
  ]
  ratio = min((b for b in BUDGETS if b >= share), default=BUDGETS[0])
  uniform = find(rows, 'uniform', ratio)
  if uniform:
    gain = value(row, 'accuracy') - value(uniform, 'accuracy')
    out.append(
      f'qtsplus left to itself against uniform at {ratio:.0%}: {gain:+.1%} '
      f'points, of at least +5.0%: {_verdict(gain >= 0.05)}.'
    )
  out += _beats(rows, 'qtsplus', SHARE, BUDGETS[0], 0.05)
  heavy = find(rows, HEAVY, BUDGETS[0])
  if heavy:
    less, more = value(heavy, 'tokens'), value(row, 'tokens')
    out.append(
      f'Losses on the share ten times as heavy leave fewer tokens: {less:.1f} '
      f'of {more:.1f}, {_verdict(less < more)}.'
    )
  tokens = row.get('tokens by kind', {})
  if {'presence', 'cell'} <= set(tokens):
    presence, cell = tokens['presence'], tokens['cell']
    out.append(
      f'qtsplus keeps more for presence than for one cell: {presence:.1f} and '
      f'{cell:.1f} tokens, {_verdict(presence > cell)}.'
    )
  return out


def _cacovid(rows: Rows) -> list[str]:
  """At 10 %, against what is evenly spaced, attended to, and diverse."""
  return [
    line
    for than in ('uniform', 'fastv, layer 1', PEAKS)
    for metric in ('accuracy', 'evidence recall')
    for line in _beats(rows, 'cacovid', than, 0.1, 0.05, metric)
  ]


def _tokenflex(rows: Rows) -> list[str]:
  """One model for all counts against models of one count."""
  out = []
  for ratio, fixed, least in (
    (0.25, 'tokenflex, 4 a frame only', -0.005),
    (0.05, 'tokenflex, 1 a frame only', 0.01),
  ):
    out += _beats(rows, 'tokenflex', fixed, ratio, least)
  full, pooled = find(rows, ALL, 1.0), find(rows, 'adaptive_pool', 0.25)
  if out and full and pooled:
    drop = value(full, 'accuracy') - value(pooled, 'accuracy')
    out.append(
      'A model of all patches alone, pooled to 4 a frame, loses at least 10 '
      f'points: {drop:.1%}, {_verdict(drop >= 0.1)}.'
    )
  own, fewer = (
    find(rows, 'tokenflex, 4 a frame only', b) for b in (0.25, 0.05)
  )
  if own and fewer:
    drop = value(own, 'accuracy') - value(fewer, 'accuracy')
    out.append(
      'A model of 4 a frame alone, asked for 1, loses at least 10 points: '
      f'{drop:.1%}, {_verdict(drop >= 0.1)}.'
    )
  few, new, all_ = (find(rows, 'tokenflex', b) for b in (0.25, *FLEX_BUDGETS))
  if few and new and all_:
    low, between, high = (value(r, 'accuracy') for r in (few, new, all_))
    met = min(low, high) <= between <= max(low, high)
    out.append(
      'tokenflex at 9 a frame, which it was not trained with, is between 4 and '
      f'16: {low:.1%}, {between:.1%}, {high:.1%}, {_verdict(met)}.'
    )
  pairs = [_gain(rows, 'tokenflex', MLP, b) for b in (0.25, 0.05)]
  gains = [gain for gain in pairs if gain is not None]
  if gains:
    mean = sum(gains) / len(gains)
    out.append(
      f'SwiGLU against an MLP of as many parameters, mean over counts: '
      f'{mean:+.1%} points, of at least +0.0%: {_verdict(mean >= 0)}.'
    )
  return out


def _embedlens(rows: Rows) -> list[str]:
  """What survives holds the evidence."""
  full, row = find(rows, ALL, 1.0), find(rows, 'embedlens', BUDGETS[0])
  if not full or not row:
    return []
  recall = value(row, 'evidence recall')
  lost = value(full, 'accuracy') - value(row, 'accuracy')
  share = value(row, 'tokens') / value(full, 'tokens')
  out = [
    f'embedlens keeps at least 95 % of the evidence: {recall:.1%} in '
    f'{share:.1%} of the tokens, {_verdict(recall >= 0.95)}; '
    f'and loses at most 1 point: {lost:.1%}, {_verdict(lost <= 0.01)}.'
  ]
  alive = find(rows, ALIVE, BUDGETS[0])
  if alive:
    more = value(full, 'accuracy') - value(alive, 'accuracy')
    out.append(
      'Dropping as many alive tokens, as far as there are, loses at least 3 '
      f'points more: {more - lost:+.1%}, {_verdict(more - lost >= 0.03)}.'
    )
  probe = row.get('probe')
  if probe:
    nearest, chance = probe['nearest'], probe['chance']
    out += [
      'embedlens tells noise from digits by their nearest words: it drops '
      f'{probe["noise dropped"]:.1%} of the cells of noise and '
      f'{probe["digits dropped"]:.1%} of the digits, AUC {probe["auc"]:.3f}, '
      f'of at least 0.900: {_verdict(probe["auc"] >= 0.9)}.',
      "The nearest words mean something: mean cosine of a token's nearest "
      f'{nearest:.3f}, above the 95th percentile of random vectors '
      f'{chance:.3f}: {_verdict(nearest > chance)}.',
    ]
  return out


def _vqtoken(rows: Rows) -> list[str]:
  """The map against the codes alone, both with a decoder trained for them."""
  out = []
  for metric in ('cell', 'order'):
    out += _beats(rows, 'vqtoken', CODES, 0.25, 0.1, metric)
  for metric in ('cell', 'order'):
    out += _beats(rows, IN_SEQUENCE, SEQUENCE_CODES, 0.25, 0.1, metric)
  gap = _gain(rows, SHUFFLED, SEQUENCE_CODES, 0.25)
  if gap is not None:
    out.append(
      f'{SHUFFLED} is at most as good as {SEQUENCE_CODES} at 25%: {gap:+.1%} '
      f'points, {_verdict(gap <= 0.01)}.'
    )
  for than in ('tome, decoder trained', 'random, decoder trained'):
    out += _beats(rows, 'vqtoken', than, 0.25, 0.05)
  return out


def _decoder(rows: Rows) -> list[str]:
  """More evidence is worth more, where the decoder is used to few tokens."""
  name, than = 'visionzip, decoder trained', 'random, decoder trained'
  return [
    line for ratio in (0.25, 0.1) for line in _beats(rows, name, than, ratio, 0)
  ]

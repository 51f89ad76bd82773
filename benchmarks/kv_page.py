"""docs/kv_cache.md from what benchmarks.kv_quality stored."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import passkey
from jaxq.kvcache import registry

Groups = Mapping[str, Sequence[str]]


_SELECTING = (
  'What selects tokens:',
  '',
  '- `evict` really holds fewer tokens, in a prompt and while decoding; its',
  '  policies are in jaxq/kvcache/scores.py, what tokens are kept in is',
  '  `inner`, and `head_budgets=true` lets heads share their slots (AdaKV).',
  '- `quest`, `double_sparsity` and `tokenselect` keep all and read few, which',
  '  saves traffic and no bytes. Label channels of a model come from',
  '  `python -m experiments.label_channels`, for',
  '  `--kv_cache=double_sparsity:channels=FILE`.',
  '- `double_sparsity:offload=true` keeps the keys and values of all but the',
  '  dense layers in host memory; labels and what a step reads stay on the',
  '  device. `predict=true` asks for it one layer ahead; which layers bear',
  '  that is measured by `python -m benchmarks.kv_prediction`.',
  '- `quest` and `tokenselect` with `inner=paged` read what they chose through',
  '  a page table (`paged.with_table`); with `quest:group_by=all` the heads of',
  '  a layer share pages, which the attention kernel reads by number on a TPU.',
  '- `tokenselect` and `evict:policy=streaming,reposition=true` number what',
  '  they read anew, so that a text may be longer than the model was trained',
  '  for.',
  '- `dont_waste_bits` gives every token 2, 4, 8 or 16 bits; the network that',
  '  chooses is trained by `python -m experiments.train_bit_controller`, and',
  "  SmolLM2-135M's is part of the package.",
)


_SPARSE = 'double_sparsity:heavy_tokens={n},dense_prefill=false,channels='
_TYPED = 'dont_waste_bits:shares={shares}'
# (what should lose less, what it is compared with), of equal bits or budgets.
CLAIMS = (
  ('oscar', 'kivi'),
  ('oscar', 'kivi:mode=integer'),
  ('kivi', 'int2'),
  ('zipcache', 'int2'),
  ('zipcache', 'zipcache:split=random'),
  ('zipcache', 'zipcache:separate=false'),
  *(
    (f'evict:policy={policy},ratio=0.5', 'evict:policy=random,ratio=0.5')
    for policy in ('streaming', 'h2o', 'snapkv', 'expected', 'knorm')
  ),
  *(
    (f'{_SPARSE.format(n=n)}CALIBRATED', other)
    for n in (256, 128)
    for other in (
      f'{_SPARSE.format(n=n)}random',
      f'evict:policy=streaming,budget={n + n // 2}',
      f'evict:policy=h2o,budget={n + n // 2}',
    )
  ),
  *(
    (_TYPED.format(shares=shares), _TYPED.format(shares=shares) + other)
    for shares in ('0.35/0.35/0.2/0.1', '0.7/0.3/0/0')
    for other in (',controller=random', ',controller=position')
  ),
)


def page(stored: dict[str, Any], groups: Groups) -> str:
  """The page, of groups {name: caches} of comparable ones."""
  lines = [
    '# Key/value caches',
    '',
    'Made by `python -m benchmarks.kv_quality`; do not edit.',
    '',
    '`--kv_cache=NAME` or `--kv_cache=NAME:field=value,field=value` chooses',
    'the cache of `experiments.generate`, `evaluate` and `benchmark`:',
    '',
    *_members(),
    '',
    *_SELECTING,
    '',
  ]
  windows = {
    int(window): table
    for window, table in stored['windows'].items()
    if table.get('rows')
  }
  if not windows:
    return '\n'.join([*lines, 'Quality: not measured yet.', ''])
  for window, table in sorted(windows.items()):
    lines += _quality(stored, window, table, groups)
  if stored['beyond']:
    lines += _beyond_lines(stored)
  lines += _imbalance_lines(stored)
  lines += ['', f'- {stored.get("run", "")}', '']
  return '\n'.join(lines)


def _quality(
  stored: dict[str, Any],
  window: int,
  table: dict[str, Any],
  groups: Groups,
) -> list[str]:
  settings = stored['settings']
  text = (
    f'{settings["model"]}, {table["text"]}, float32 activations, read in '
    f'chunks of {settings["chunk"]} tokens: a token sees its own chunk as it '
    'is and all before as the cache holds it. Without a cache: '
    f'{table["float"]:.2f}. In brackets: paired 95 % bootstrap intervals over '
    'blocks of 128 tokens, which hold for these articles. "All bits" are those '
    'of the caches of all layers, scales, positions, kept queries and windows '
    'in bfloat16 counted, per key or value element of the window; "stored" '
    'less the newest tokens that are kept in full precision. Compare at equal '
    'bits. What reads few tokens keeps all, and saves traffic, not bytes. '
    'Passkey: the share of numbers found in texts of '
    f'{settings["passkey"]} tokens, and the negative log-likelihood of their '
    'tokens, where the text was read before the question came, and with the '
    'question in sight; the question ends with the space before the number '
    '([notes.md](notes.md)). Milliseconds are of a decoding step of '
    'the plain JAX form behind a window, batch 1.'
  )
  lines = [
    f'## Quality, {window} tokens',
    '',
    textwrap.fill(text, 80),
    '',
    '| | stored bits | all bits | token perplexity | ratio to float | passkey, '
    'asked after | asked before | ms |',
    '|---|---:|---:|---:|---:|---:|---:|---:|',
  ]
  for group, texts in groups.items():
    if group == 'beyond':  # It has a table of its own.
      continue
    found = [text for text in texts if text in table['rows']]
    if found:
      lines.append(f'| **{group}** | | | | | | | |')
    for name in found:
      lines.append(_line(name, table, stored))
  return [*lines, '', *_claim_lines(table['rows'])]


def _claim_lines(rows: Mapping[str, Any]) -> list[str]:
  """What the papers say of pairs that were measured, and what was seen.

  Told apart are pairs whose intervals, of the ratio to float, do not meet; of
  what is drawn the mean of the seeds counts, with the widest interval.
  """
  lines = []
  for better, worse in CLAIMS:
    a, b = _over_seeds(rows, better), _over_seeds(rows, worse)
    if a is None or b is None:
      continue
    verdict = 'not told apart'
    if a[2] < b[1]:
      verdict = 'yes'
    elif b[2] < a[1]:
      verdict = '**no**'
    lines.append(
      f'| `{better}` | {a[0]:.4f} | `{worse}` | {b[0]:.4f} | {verdict} |'
    )
  if not lines:
    return []
  return [
    '### Does what the papers claim hold?',
    '',
    'Ratio of the perplexity to that without a cache; of what is drawn, the',
    'mean of the seeds.',
    '',
    '| this | | should lose less than | | does it |',
    '|---|---:|---|---:|---|',
    *lines,
    '',
  ]


def _over_seeds(
  rows: Mapping[str, Any], name: str
) -> tuple[float, float, float] | None:
  """The mean ratio of a cache's seeds, the lowest and highest end."""
  found = [
    row['ratio']
    for text, row in rows.items()
    if text == name or text.rpartition(',seed=')[0] == name
  ]
  if not found:
    return None
  values, lows, highs = zip(*found, strict=True)
  return sum(values) / len(values), min(lows), max(highs)


def _line(text: str, table: dict[str, Any], stored: dict[str, Any]) -> str:
  row = table['rows'][text]
  value, low, high = row['ratio']
  ratio = f'{value:.3f} [{low:.3f}, {high:.3f}]'
  shares = ' | '.join(
    _share(stored[kind].get(text)) for kind in ('passkey', 'asked')
  )
  step = table.get('steps', {}).get(text, {})
  return (
    f'| `{text}` | {row["stored bits"]:.2f} | {row["all bits"]:.2f} | '
    f'{row["perplexity"]:.2f} | {ratio} | {shares} | {step.get("ms", "")} |'
  )


def _share(row: Mapping[str, Any] | None) -> str:
  """'0.90 [0.60, 0.98], 0.12': Wilson's interval, loss of the number."""
  if not row:
    return ''
  hits, num = row['found']
  low, high = passkey.wilson(hits, num)
  return f'{hits / num:.2f} [{low:.2f}, {high:.2f}], {row["nll"]:.2f}'


def _beyond_lines(stored: dict[str, Any]) -> list[str]:
  lines = [
    '## Beyond the trained window',
    '',
    'Numbers found in texts longer than the model was trained for, and the',
    'negative log-likelihood of their tokens.',
    '',
    '| | found |',
    '|---|---:|',
  ]
  for text, row in stored['beyond'].items():
    lines.append(f'| `{text}` | {_share(row)} |')
  return [*lines, '']


def _imbalance_lines(stored: dict[str, Any]) -> list[str]:
  norms = (
    'Largest / smallest norm of the 32 consecutive keys that share a scale, in '
    'the first window: of all heads together, and of one head. It is what '
    'OScaR mends.'
  )
  lines = [
    '## Token norm imbalance',
    '',
    textwrap.fill(norms, 80),
    '',
    '| layer | median | largest | largest / median norm | one head, median | '
    'one head, largest |',
    '|---:|---:|---:|---:|---:|---:|',
  ]
  for i, row in enumerate(stored.get('imbalance', [])):
    lines.append(
      f'| {i} | ' + ' | '.join(f'{value:.2f}' for value in row.values()) + ' |'
    )
  return lines


def _members() -> list[str]:
  """A table of the caches and their fields."""
  lines = ['| name | fields and defaults |', '|---|---|']
  for name, config in registry.CACHES.items():
    made: Any = config
    fields = ', '.join(
      f'`{field.name}={getattr(made, field.name)}`'
      for field in dataclasses.fields(made)
    )
    lines.append(f'| `{name}` | {fields} |')
  return lines

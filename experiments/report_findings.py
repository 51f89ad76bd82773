"""What a report says in words: the summary, the warnings, the outliers.

Plain functions from a run folder's data to sentences and rows. A sentence is
made only of numbers that the run holds; what is not there is not said.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import results, run_folder

# Below it noise is more than a third of the block's output in amplitude.
LOW_SQNR_DB = 10.0
# Two levels that differ by less are called equal.
EQUAL_DB = 0.1
# A channel is an outlier at this many times the median channel.
OUTLIER = 10.0

_NAMES = {
  'awq': 'AWQ',
  'gptq': 'GPTQ',
  'rotate': 'rotation',
  'rtn': 'round to nearest',
  'smoothquant': 'SmoothQuant',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlier:
  """A channel far above the others of its tap, in some blocks.

  tap, channel: which. blocks: those where it is. block: where it is largest.
  before, after: its absmax there, in medians of the tap's channels.
  """

  tap: str
  channel: int
  blocks: tuple[int, ...]
  block: int
  before: float
  after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """The linears of one name over all blocks ('mlp.down_proj')."""

  name: str
  size: int
  bits: float
  mean_sqnr_db: float
  min_sqnr_db: float
  worst: int


def method(run: run_folder.RunData) -> str:
  """What was done, as in 'SmoothQuant + GPTQ'."""
  names = [n for n in run_folder.flag(run, 'method').split(',') if n]
  return ' + '.join(_NAMES.get(n, n) for n in names or ['rtn'])


def scheme(run: run_folder.RunData) -> str:
  """The scheme and, where they were set, its groups: 'W4A16 g64'."""
  name = run_folder.flag(run, 'scheme', '')
  groups = run_folder.flag(run, 'group_size', '')
  if groups in ('', 'None'):
    return name
  return f'{name} per channel' if groups == '-1' else f'{name} g{groups}'


def title(run: run_folder.RunData) -> str:
  """'smollm2-135m, W4A16 g64 by GPTQ'."""
  model = run_folder.flag(run, 'model', '').rstrip('/').rsplit('/', 1)[-1]
  reducers = run_folder.flag(run, 'token_reducer')
  if reducers:
    return f'{model or run.path.name}, visual tokens by {reducers}'
  return f'{model or run.path.name}, {scheme(run)} by {method(run)}'


def metric(row: results.Row | None, name: str) -> results.Metric | None:
  """The metric of a row, or None."""
  found = [m for m in row.metrics if m.name == name] if row else []
  return found[0] if found else None


def measured(run: run_folder.RunData) -> tuple:
  """(reference row, quantized row), None where they are not there."""
  if not run.rows:
    return None, None
  return (run.rows[0] if len(run.rows) > 1 else None), run.rows[-1]


def output_sqnr(run: run_folder.RunData, field: str) -> list[float | None]:
  """A field of every block, in order; None where it is not there."""
  return [_float(block.get(field)) for block in run.blocks]


def weakest(run: run_folder.RunData, count: int) -> list[int]:
  """Positions of the blocks with the least output SQNR, least first."""
  values = output_sqnr(run, 'output_sqnr_db')
  known = [i for i, v in enumerate(values) if v is not None]
  return sorted(known, key=lambda i: values[i] or 0.0)[:count]


def against_rtn(run: run_folder.RunData) -> list[float]:
  """dB over round to nearest, of the blocks that have both."""
  pairs = zip(
    output_sqnr(run, 'output_sqnr_db'),
    output_sqnr(run, 'rtn_sqnr_db'),
    strict=True,
  )
  return [a - b for a, b in pairs if a is not None and b is not None]


def kinds(run: run_folder.RunData) -> list[Kind]:
  """The quantized linears by name, in the order they are met."""
  found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
  for block in run.blocks:
    for linear in block['linears']:
      found.setdefault(short(linear['name']), []).append(
        (block['index'], linear)
      )
  made = []
  for name, linears in found.items():
    size = sum(linear['size'] for _, linear in linears)
    levels = [(linear['sqnr_db'], index) for index, linear in linears]
    low, worst = min(levels)
    made.append(
      Kind(
        name=name,
        size=size,
        bits=sum(x['size'] * x['bits'] for _, x in linears) / max(size, 1),
        mean_sqnr_db=statistics.fmean(level for level, _ in levels),
        min_sqnr_db=low,
        worst=worst,
      )
    )
  return made


def short(name: str) -> str:
  """'blocks.3.mlp.down_proj' -> 'mlp.down_proj'."""
  parts = name.split('.')
  while parts and not parts[0].isdigit():
    parts = parts[1:]
  return '.'.join(parts[1:]) or name


def bits(run: run_folder.RunData) -> tuple[float, int]:
  """(bits per weight, weights) of the quantized linears."""
  found = kinds(run)
  size = sum(kind.size for kind in found)
  return sum(k.bits * k.size for k in found) / max(size, 1), size


def ratios(channels: np.ndarray) -> np.ndarray:
  """absmax (K,) of channels in medians; nan where all of them are 0."""
  middle = float(np.median(channels))
  if middle <= 0:
    positive = channels[channels > 0]
    middle = float(np.median(positive)) if positive.size else math.nan
  return channels / middle


def taps(run: run_folder.RunData) -> list[str]:
  """The taps whose channels were kept, in the order of their first block."""
  return list(dict.fromkeys(t for c in run.channels.values() for t in c))


def outlier_ratio(
  run: run_folder.RunData, tap: str, which: int
) -> list[float | None]:
  """Per block the largest channel in medians; which: 0 before, 1 after."""
  found = []
  for block in run.blocks:
    pair = run.channels.get(block['index'], {}).get(tap)
    value = None if pair is None else float(np.max(ratios(pair[which])))
    found.append(_float(value))
  return found


def outliers(run: run_folder.RunData, count: int) -> list[Outlier]:
  """The channels farthest above the others of their tap, farthest first."""
  met: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
  for index, channels in run.channels.items():
    for tap, (before, after) in channels.items():
      high, low = ratios(before), ratios(after)
      for k in np.flatnonzero(high > OUTLIER):
        met.setdefault((tap, int(k)), []).append(
          (float(high[k]), float(low[k]), index)
        )
  rows = []
  for (tap, channel), places in met.items():
    farthest, left, block = max(places)
    rows.append(
      Outlier(
        tap=tap,
        channel=channel,
        blocks=tuple(sorted(index for _, _, index in places)),
        block=block,
        before=farthest,
        after=left,
      )
    )
  return sorted(rows, key=lambda row: -row.before)[:count]


def summary(
  run: run_folder.RunData, others: Sequence[run_folder.RunData] = ()
) -> str:
  """What came of it, in a few sentences.

  Args:
    run: the folder.
    others: runs whose perplexity is told beside it.
  """
  said = []
  width, size = bits(run)
  reference, row = measured(run)
  model = run_folder.flag(run, 'model', 'the model').rstrip('/').split('/')[-1]
  if size:
    said.append(
      f'{_capital(method(run))} stores the linears of {model} in {width:.2f} '
      'bits per weight'
    )
    was, now = metric(reference, _PPL), metric(row, _PPL)
    if was and now:
      ratio = metric(row, 'perplexity ratio')
      interval = (
        f' [{ratio.low:.3f}, {ratio.high:.3f}]'
        if ratio and ratio.low is not None and ratio.high is not None
        else ''
      )
      times = ratio.value if ratio else now.value / was.value
      said[-1] += (
        f' and takes {_PPL} from {was.value:.2f} to {now.value:.2f}, '
        f'{times:.3f} times{interval}'
      )
  for other in others:
    found = metric(measured(other)[1], _PPL)
    if found:
      said.append(
        f'{_capital(method(other))} at {scheme(other)} takes it to '
        f'{found.value:.2f}'
      )
  gains = against_rtn(run)
  if gains:
    mean = statistics.fmean(gains)
    better = sum(gain > EQUAL_DB for gain in gains)
    if max(map(abs, gains)) <= EQUAL_DB:
      said.append('Its block outputs are those of rounding to nearest')
    else:
      verb = 'less' if mean > 0 else 'more'
      said.append(
        f'Its block outputs have {abs(mean):.1f} dB {verb} noise than rounding '
        f'to nearest, on average; {better} of {len(gains)} blocks are better'
      )
  worst = weakest(run, 1)
  if worst:
    block = run.blocks[worst[0]]
    said.append(
      f'The weakest block is {block["index"]}, whose output SQNR is '
      f'{block["output_sqnr_db"]:.1f} dB'
    )
  if run_folder.flag(run, 'token_reducer') and reference and row:
    was, now = metric(reference, 'accuracy'), metric(row, 'accuracy')
    kept = metric(row, 'tokens')
    if was and now and kept:
      said.append(
        f'With {kept.value:.0f} visual tokens {now.value:.1%} of the questions '
        f'are answered, {was.value:.1%} with all of them'
      )
  return '. '.join(said) + '.' if said else 'Nothing was quantized yet.'


def warnings(run: run_folder.RunData) -> list[str]:
  """What a reader should know before believing or using the result."""
  said = list(run.damaged)
  have = [block['index'] for block in run.blocks]
  total = run.num_blocks or (max(have) + 1 if have else 0)
  missing = sorted(set(range(total)) - set(have))
  if missing:
    said.append(
      f'{len(missing)} of {total} blocks are missing ({_some(missing)}): the '
      'run is not finished, or its log is not whole.'
    )
  reference, row = measured(run)
  if row is None:
    said.append(
      'The model was not measured: what this costs in quality is not known. '
      'Run experiments.evaluate, or calibrate without --noevaluate.'
    )
  else:
    said += _about_results(row)
  low = [
    b['index'] for b in run.blocks if _float(b['output_sqnr_db']) is not None
    and b['output_sqnr_db'] < LOW_SQNR_DB
  ]  # fmt: skip
  if low:
    said.append(
      f'Output SQNR is below {LOW_SQNR_DB:.0f} dB in {_blocks(low)}; keep '
      'their linears wider, or leave them float with --ignore.'
    )
  lost = [
    b['index'] for b in run.blocks
    if _float(b.get('rtn_sqnr_db')) is not None
    and b['rtn_sqnr_db'] > b['output_sqnr_db'] + EQUAL_DB
  ]  # fmt: skip
  if lost:
    said.append(
      f'Rounding to nearest has less output noise in {_blocks(lost)}. A method '
      'that fits each linear on its own can lose at the block; compare KL.'
    )
  said += _unseen_experts(run)
  left = run_folder.flag(run, 'ignore')
  if left:
    said.append(f'Left float, and not counted in bits per weight: {left}.')
  if run.info is not None and run.info.commit.endswith('-dirty'):
    said.append(
      'The checkout had changes that are in no commit: this run cannot be '
      'repeated from its commit alone.'
    )
  return said


_PPL = 'token perplexity'


def _unseen_experts(run: run_folder.RunData) -> list[str]:
  """Experts that no calibration token was routed to."""
  counts = [(b['index'], b.get('expert_tokens') or ()) for b in run.blocks]
  unseen = [index for index, tokens in counts if 0 in tokens]
  if not unseen:
    return []
  total = sum(list(tokens).count(0) for _, tokens in counts)
  return [
    f'{total} experts met no calibration token, in {_blocks(unseen)}: they are '
    'rounded to nearest. Give more --sequences, or calibrate all experts.'
  ]


def _about_results(row: results.Row) -> list[str]:
  said = []
  bad = [m.name for m in row.metrics if not math.isfinite(m.value)]
  if bad:
    said.append(f'NaN or Inf was measured: {", ".join(bad)}.')
  ratio = metric(row, 'perplexity ratio')
  if ratio and ratio.low is not None and ratio.high is not None:
    if ratio.low <= 1 <= ratio.high:
      said.append(
        f'The perplexity ratio\u2019s interval [{ratio.low:.3f}, '
        f'{ratio.high:.3f}] holds 1: this many tokens do not tell the models '
        'apart. Give more --eval_tokens.'
      )
    elif ratio.low > 1.5:
      said.append(
        f'Perplexity is {ratio.value:.2f} times the float model\u2019s: expect '
        'damage that a reader sees.'
      )
  return said


def _blocks(indices: Sequence[int]) -> str:
  return f'block{"s" if len(indices) > 1 else ""} {_some(indices)}'


def _some(indices: Sequence[int]) -> str:
  """Indices as ranges: '0-3, 7'."""
  spans: list[list[int]] = []
  for i in indices:
    if spans and spans[-1][1] == i - 1:
      spans[-1][1] = i
    else:
      spans.append([i, i])
  return ', '.join(f'{a}-{b}' if b > a else f'{a}' for a, b in spans)


def _float(value: Any) -> float | None:
  """A finite number, or None."""
  if isinstance(value, int | float) and math.isfinite(value):
    return float(value)
  return None


def _capital(words: str) -> str:
  return words[:1].upper() + words[1:]

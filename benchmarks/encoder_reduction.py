"""Merging and pruning inside pretrained encoders, with the controls.

In every layer, between attention and MLP, r tokens go (models.encoder_
reduction): merged (ToMe), or the least attended ones dropped (attention, in the
manner of FastV and VisionZip), or any (random, uniform). All have the same
number of tokens at every place. A ViT's attention is the class token's,
Whisper's, which has none, what a frame receives on average. Nothing is trained.

vit-s14  crops of real photographs: cosine of the class token's feature with
         that of all tokens, and 1-NN among the crops: the same photo, and the
         same neighbour as with all tokens
whisper  packaged speech: word error rate of the transcripts
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import models
from experiments import results, transcription
from jaxq.data import images, speech
from jaxq.eval import features as features_lib
from jaxq.eval import wer
from jaxq.tokens import controls, fastv, interface, schedule, tome

METHODS: Mapping[str, interface.Config] = {
  'ToMe': tome.TomeConfig(),
  'attention': fastv.FastvConfig(),
  'random': controls.RandomConfig(),
  'uniform': controls.UniformConfig(),
}
VIT_RATES = (4, 8, 11)  # Of 145 tokens, over 12 layers.
WHISPER_RATES = (100, 200)  # Of 1,500, over 6 layers.
_CROPS, _SIZE = 40, 168
_SEEDS = 3
_ALL = 'all tokens'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByCount(interface.Config):
  """A reducer that takes r tokens from every layer, whichever it is.

  base: the reducer. r: tokens. seed: of what it draws.
  """

  base: interface.Config
  r: int
  seed: int = 0

  @property
  def traits(self) -> interface.Traits:
    """Those of the reducer."""
    return self.base.traits

  @property
  def proportional(self) -> bool:
    """Only what has been merged counts for more."""
    return self.traits.kind == 'merger'

  def schedule(self, num_layers: int, n: int, special: int) -> tuple[int, ...]:
    """Slots behind each layer."""
    return schedule.by_count(self.r, num_layers, n, special)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    rng = given.rng
    if rng is not None:
      rng = jax.random.fold_in(rng, self.seed)
    return self.base.reduce(ts, scores=given.scores, budget=budget, rng=rng)


def run_vit(
  wanted: Callable[[str], bool], keep: Callable[[str, Any], None]
) -> None:
  """The rows of vit-s14 that are missing."""
  missing = _missing('vit-s14', VIT_RATES, wanted)
  if not missing:
    return
  model = models.load('vit-s14')
  config = images.ImageConfig(
    source='photos:evaluation', num_images=_CROPS, size=_SIZE
  )
  crops = images.load(config)

  def features_of(reducer: ByCount | None) -> Callable[[], Any]:
    module = model.module.clone(token_reducer=reducer)
    run = jax.jit(module.apply)
    return lambda: run(model.variables, crops.images)

  full = np.asarray(features_of(None)())
  tokens = 1 + (_SIZE // model.config.patch_size) ** 2
  for key, name, r in missing:
    found = [
      np.asarray(features_of(reducer)()) for reducer in _reducers(name, r)
    ]
    run = features_of(_reducers(name, r)[0])
    metrics = {
      'cosine': _mean(lambda f: _cosine(f, full), found),
      '1-NN photo': _mean(
        lambda f: features_lib.accuracy(f, crops.photo), found
      ),
      '1-NN as all': _mean(lambda f: features_lib.agreement(f, full), found),
      'tokens left': _left(r, model.config.num_layers, tokens, 1),
      'images/s': len(crops.images) / _seconds(run),
    }
    keep(key, _row('vit-s14', name, r, metrics))


def run_whisper(
  wanted: Callable[[str], bool], keep: Callable[[str, Any], None]
) -> None:
  """The rows of whisper-base that are missing."""
  missing = _missing('whisper-base', WHISPER_RATES, wanted)
  if not missing:
    return
  model = models.load('whisper-base')
  clips = speech.load('speech:evaluation', 8)
  said = [clip.text for clip in clips]
  for key, name, r in missing:
    rates = []
    for reducer in _reducers(name, r):
      module = model.module.clone(token_reducer=reducer)
      heard = transcription.transcribe(
        dataclasses.replace(model, module=module),
        [clip.samples for clip in clips],
      )
      rates.append(wer.word_errors(said, heard).rate)
    layers, frames = model.config.encoder_layers, model.config.max_source
    metrics = {
      'WER': float(np.mean(rates)),
      'frames left': _left(r, layers, frames, 0),
    }
    keep(key, _row('whisper-base', name, r, metrics))


PARTS: Mapping[str, Callable[..., None]] = {
  'vit': run_vit,
  'whisper': run_whisper,
}


def page(store: Mapping[str, Mapping[str, Any]]) -> str:
  """Markdown of the encoders' rows; '' without any."""
  out = []
  titles = {
    'vit-s14': (
      f'## vit-s14, {_CROPS} crops of {_SIZE} pixels of photos:evaluation',
      'A ViT of the shape of DINOv2-S/14, as it is packaged. Cosine of the '
      "class token's feature with that of all tokens; 1-NN among the crops: of "
      'the same photo, and the same crop as with all tokens. Random: mean of '
      f'{_SEEDS} seeds.',
    ),
    'whisper-base': (
      '## whisper-base, speech:evaluation',
      'Word error rate over all clips; a window of 30 s is 1,500 frames. It is '
      'little speech: the rows rank methods and are no benchmark. Random: mean '
      f'of {_SEEDS} seeds.',
    ),
  }
  for part, (title, explained) in titles.items():
    rows = [row for row in store.values() if row['part'] == part]
    if not rows:
      continue
    names = [m['name'] for m in rows[0]['metrics']]
    lines = [
      '| method | r | ' + ' | '.join(names) + ' |',
      '| --- |' + ' ---: |' * (1 + len(names)),
    ]
    for row in sorted(rows, key=lambda row: row['r']):
      values = ' | '.join(_text(m) for m in row['metrics'])
      lines.append(f'| {row["method"]} | {row["r"]} | {values} |')
    out += [title, '', explained, '', *lines, '']
  return '\n'.join(out)


def _missing(
  part: str, rates: Sequence[int], wanted: Callable[[str], bool]
) -> list[tuple[str, str, int]]:
  """(key, method, r) of the rows that are to be run."""
  settings = [(_ALL, 0), *((name, r) for r in rates for name in METHODS)]
  keyed = [(f'{part}, {name}, {r}', name, r) for name, r in settings]
  return [setting for setting in keyed if wanted(setting[0])]


def _reducers(name: str, r: int) -> list[ByCount | None]:
  """One, or of what draws one for every seed."""
  if name == _ALL:
    return [None]
  seeds = range(_SEEDS if name == 'random' else 1)
  return [ByCount(base=METHODS[name], r=r, seed=seed) for seed in seeds]


def _left(r: int, layers: int, n: int, special: int) -> float:
  return float(schedule.by_count(r, layers, n, special)[-1])


def _mean(measure: Callable[[Any], Any], found: Sequence[Any]) -> float:
  return float(np.mean([np.mean(measure(f)) for f in found]))


def _row(
  part: str, name: str, r: int, metrics: Mapping[str, float]
) -> dict[str, Any]:
  found = [results.Metric(name=k, value=v) for k, v in metrics.items()]
  return {
    'part': part,
    'method': name,
    'r': r,
    'metrics': [dataclasses.asdict(metric) for metric in found],
  }


def _text(metric: Mapping[str, Any]) -> str:
  if metric['name'] in ('frames left', 'images/s', 'tokens left'):
    return f'{metric["value"]:.0f}'
  return f'{metric["value"]:.3f}'


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Of each row: (N, C), (N, C) -> (N,)."""
  lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  return np.sum(a * b, axis=1) / lengths


def _seconds(run: Callable[[], Any]) -> float:
  """The faster of two; it is compiled before."""
  jax.block_until_ready(run())
  times = []
  for _ in range(2):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)

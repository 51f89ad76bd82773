"""What real videos repeat, and which reducers make use of it.

Windows of eight frames of the packaged clips (jaxq.data.videos) go through
vit-s14, frame by frame; a reducer gets the patches of a window, all eight
frames, without a question and untrained. Two things are measured:

redundancy     cosine of a patch's feature with that of the same place in the
               frame before, beside that with its right neighbour
what is kept   every patch is shown as the slot nearest to it: the share of the
               patches' variance, over the window, that is kept

A control stands beside every row: the same reducer on windows whose frames are
of other places and other clips, so that nothing is repeated from frame to
frame. What a reducer gains from time is what it loses there more than a random
choice does.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments import results
from jaxq.data import videos
from jaxq.eval import bootstrap
from jaxq.tokens import controls, dycoke, interface, pooling, tome, vqtoken

PART = 'video'
METHODS: Mapping[str, interface.Config] = {
  'random': controls.RandomConfig(),
  'uniform': controls.UniformConfig(),
  'frames': controls.FramesConfig(),
  'average_pool': pooling.PoolingConfig(),
  'tome': tome.TomeConfig(),
  'dycoke': dycoke.DycokeConfig(),
  'vqtoken_codes': vqtoken.VQTokenConfig(wiring='none', codebook_of='raw'),
}
RATIOS = (0.5, 0.25, 0.1)
REPEATED = 0.9  # A patch is called repeated above this cosine.
_PATCH = 14  # Pixels of a patch of vit-s14, both sides.
_SEEDS = 3  # Of what draws.
_CONFIG = videos.VideoConfig()
_KEPT, _MIXED = 'variance kept', 'frames of other clips'


def run(
  wanted: Callable[[str], bool], keep: Callable[[str, Any], None]
) -> None:
  """The rows that are missing."""
  missing = [
    (f'{PART}, {name}, {ratio:g}', name, ratio)
    for ratio in RATIOS
    for name in METHODS
    if _reducer(name, ratio) is not None
    and wanted(f'{PART}, {name}, {ratio:g}')
  ]
  clips = [clip for clip in videos.CLIPS if wanted(f'{PART}, {clip}')]
  if not missing and not clips:
    return
  model = models.load('vit-s14')
  windows = videos.load(_CONFIG)
  side = _CONFIG.size // _PATCH
  tokens = features(model, windows.frames)  # (N, T, side * side, C)
  for clip in clips:
    of_clip = tokens[windows.video == windows.names.index(clip)]
    keep(f'{PART}, {clip}', _redundancy_row(clip, of_clip, side))
  for key, name, ratio in missing:
    reducer = _reducer(name, ratio)
    assert reducer is not None
    found = [variance_kept(reducer, x, side) for x in (tokens, mixed(tokens))]
    keep(key, _reducer_row(name, ratio, *found))


def features(model: models.Model, frames: np.ndarray) -> np.ndarray:
  """Windows (N, T, size, size, 3) -> their frames' patches (N, T, P, C)."""
  apply = jax.jit(
    lambda variables, x: model.module.apply(variables, x, method='hidden')
  )
  shown = [np.asarray(apply(model.variables, window)) for window in frames]
  return np.stack(shown)[:, :, 1:]  # Without the class token.


def mixed(tokens: np.ndarray) -> np.ndarray:
  """Windows (N, T, P, C) whose frames are each of another window.

  Frame t of window i comes from window i + step * t modulo N; the step is the
  first one from N / 3 on that has no divisor in common with N, so that no
  window comes twice while T <= N, and neighbours are far apart.
  """
  N, T = tokens.shape[:2]
  step = next(s for s in range(max(1, N // 3), N + 2) if math.gcd(s, N) == 1)
  source = (np.arange(N)[:, None] + step * np.arange(T)[None]) % N
  return tokens[source, np.arange(T)[None]]


def repeats(tokens: np.ndarray, side: int) -> dict[str, np.ndarray]:
  """Cosines of one clip's patches (N, T, P, C), each (N, values).

  'time': with the same place one frame before. 'space': with the place to the
  right in the same frame.
  """
  N, T, _, C = tokens.shape
  unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
  grid = unit.reshape(N, T, side, side, C)
  time = np.sum(unit[:, 1:] * unit[:, :-1], axis=-1)
  space = np.sum(grid[..., 1:, :] * grid[..., :-1, :], axis=-1)
  return {'time': time.reshape(N, -1), 'space': space.reshape(N, -1)}


def variance_kept(
  reducer: interface.Config, tokens: np.ndarray, side: int
) -> np.ndarray:
  """Share of each window's variance that its slots keep: (N,) float64.

  Of what draws, the mean of three seeds.
  """
  N, T, P, C = tokens.shape

  @jax.jit
  def kept(x: jax.Array, rng: jax.Array) -> jax.Array:
    ts = interface.token_set(x[None], grid=(T, side, side))
    reduced = reducer.reduce(ts, rng=rng if reducer.traits.rng else None)
    slots, used = reduced.tokens[0], reduced.mask[0]
    distance = (
      jnp.sum(x**2, axis=1)[:, None]
      - 2 * x @ slots.T
      + jnp.sum(slots**2, axis=1)[None]
    )
    nearest = jnp.min(jnp.where(used[None], distance, jnp.inf), axis=1)
    return 1 - jnp.sum(nearest) / jnp.sum((x - x.mean(axis=0)[None]) ** 2)

  seeds = range(_SEEDS if reducer.traits.rng else 1)
  found = [
    [kept(x, jax.random.fold_in(jax.random.key(seed), i)) for seed in seeds]
    for i, x in enumerate(tokens.reshape(N, T * P, C))
  ]
  return np.asarray(found, np.float64).mean(axis=1)


def page(store: Mapping[str, Mapping[str, Any]]) -> str:
  """Markdown of the videos' rows; '' without any."""
  rows = [row for row in store.values() if row['part'] == PART]
  if not rows:
    return ''
  clips = [row for row in rows if 'clip' in row]
  methods = [row for row in rows if 'method' in row]
  out = [
    '## vit-s14, real videos',
    '',
    f'{_CONFIG.description}. Of each clip, the cosine of a patch with the same '
    'place one frame before, and with its neighbour in the same frame; '
    f'repeated: above {REPEATED}. In brackets: 95 % bootstrap intervals over '
    'windows.',
    '',
    results.to_markdown([_parsed(row, row['clip']) for row in clips]),
    'Every patch shown as the nearest slot of its window: the share of the '
    "window's variance that is kept, and the same where the eight frames are "
    f'of other clips. Random: mean of {_SEEDS} seeds. Tokens at even distances '
    'do worst at 10%, since every tenth of rows of ten is one column.',
    '',
    results.to_markdown(
      [_parsed(row, f'{row["method"]}, {row["budget"]:.0%}') for row in methods]
    ),
    _verdicts(methods),
  ]
  return '\n'.join(out)


def _verdicts(rows: list[Mapping[str, Any]]) -> str:
  """The comparison with random, with and without anything to gain in time."""
  by = {
    (row['method'], row['budget']): _parsed(row, row['method']) for row in rows
  }
  lines = []
  for (name, ratio), row in sorted(by.items(), key=lambda item: -item[0][1]):
    beside = by.get(('random', ratio))
    if name == 'random' or beside is None:
      continue
    real, other = (row[m].value - beside[m].value for m in (_KEPT, _MIXED))
    lines.append(
      f'- {name} at {ratio:.0%}: {real:+.1%} points against random, '
      f'{other:+.1%} where nothing is repeated in time.'
    )
  return '\n'.join(lines) + '\n'


def _reducer(name: str, ratio: float) -> interface.Config | None:
  """The method at a budget; None where it cannot have that."""
  if name == 'average_pool' and ratio != 0.25:
    return None  # Windows of 2 x 2.
  if name == 'dycoke' and ratio < 0.25:
    return None  # One frame of four stays whole.
  fields: dict[str, Any] = {'budget': ratio}
  if name == 'vqtoken_codes':
    patches = (_CONFIG.size // _PATCH) ** 2 * _CONFIG.num_frames
    fields['codes'] = interface.budget_from_ratio(patches, ratio).k_max
  config: Any = METHODS[name]
  return dataclasses.replace(config, **fields)


def _redundancy_row(clip: str, tokens: np.ndarray, side: int) -> dict[str, Any]:
  cosines = repeats(tokens, side)
  metrics = [
    *(_metric(f'cosine in {name}', cosines[name]) for name in cosines),
    *(
      _metric(f'repeated in {name}', cosines[name] > REPEATED)
      for name in cosines
    ),
  ]
  return {
    'part': PART,
    'clip': clip,
    'metrics': [dataclasses.asdict(metric) for metric in metrics],
  }


def _reducer_row(
  name: str, ratio: float, kept: np.ndarray, other: np.ndarray
) -> dict[str, Any]:
  metrics = [
    _metric(_KEPT, kept[:, None]),
    _metric(_MIXED, other[:, None]),
  ]
  return {
    'part': PART,
    'method': name,
    'budget': ratio,
    'metrics': [dataclasses.asdict(metric) for metric in metrics],
  }


def _metric(name: str, values: np.ndarray) -> results.Metric:
  """The mean of (windows, values), with its interval over windows."""
  config = bootstrap.BootstrapConfig(block=values.shape[1])
  found = bootstrap.interval(
    lambda mean: mean, values.astype(np.float64), config=config
  )
  return results.Metric.of(name, found, {})


def _parsed(row: Mapping[str, Any], name: str) -> results.Row:
  metrics = tuple(results.Metric(**metric) for metric in row['metrics'])
  return results.Row(name=name, metrics=metrics)

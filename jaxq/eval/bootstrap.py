"""Bootstrap confidence intervals for means over tokens.

Efron and Tibshirani, 1993; blocks after Kuensch, 1989. Draw as many blocks as
there are, with replacement; recompute the statistic; the interval is between
the percentiles of many such draws.

The unit drawn is a block of consecutive tokens. The losses of neighbouring
tokens rise and fall together (a rare name, a list, a hard paragraph), and
drawing single tokens would pretend that there is more evidence than there is.
Whole windows are too few for percentiles: 16,384 tokens have 8 of 2,048, but
128 blocks of 128. Standard errors by block size, SmolLM2-135M on 16,384 tokens
of wiki-sample, round-to-nearest int4 for the difference:

  block                           1      32     128     256     512
  mean NLL                    0.023   0.032   0.046   0.059   0.084
  difference of two models   0.0087  0.0097  0.0107  0.0106  0.0121

The difference settles at 128. The NLL of one model does not, as whole articles
are easy or hard: its interval holds for these articles, not for another text.

Several arrays are drawn with the same blocks: an interval of a ratio or of a
difference between two models on one text is paired, and narrow, because the
hard passages are hard for both and cancel.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

_MAX_ENTRIES = 1 << 22  # Of one slab of draws: 32 MB.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
  """block: tokens drawn together. resamples: draws. seed: of the draws."""

  block: int = 128
  resamples: int = 2000
  confidence: float = 0.95
  seed: int = 0

  def __post_init__(self):
    for name in ('block', 'resamples'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'BootstrapConfig: {name}={getattr(self, name)}; it must be at least '
          f'1. {name}={getattr(BootstrapConfig, name)} is the default.'
        )
    if not 0.0 < self.confidence < 1.0:
      raise ValueError(
        f'BootstrapConfig: confidence={self.confidence}; it must lie between 0 '
        'and 1. 0.95 is the default.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """A statistic and the ends of its confidence interval."""

  value: float
  low: float
  high: float


def interval(
  statistic: Callable[..., np.ndarray],
  *values: np.ndarray,
  config: BootstrapConfig | None = None,
) -> Interval:
  """The interval of a function of means.

    interval(np.exp, nll)                          perplexity
    interval(lambda a, b: np.exp(b - a), nll_a, nll_b)  paired ratio of two

  Args:
    statistic: takes as many arrays (R,) of means as there are values, returns
      (R,).
    *values: (num, T) each, of the same tokens; a row is a window, and no block
      reaches over its end.
    config: None is BootstrapConfig().

  Returns:
    The statistic of the means themselves, and its interval.

  Raises:
    ValueError: shapes differ or are not (num, T), or nothing is given.
  """
  config = BootstrapConfig() if config is None else config
  sums, counts = _blocks(values, config.block)
  total = sums.sum(axis=1) / counts.sum()  # (k,)
  draws = np.asarray(statistic(*_resample(sums, counts, config)))  # (R,)
  tail = (1.0 - config.confidence) / 2.0
  # A diverged model has inf or nan everywhere; its interval is no more.
  with np.errstate(invalid='ignore'):
    low, high = np.quantile(draws, [tail, 1.0 - tail])
  value = np.asarray(statistic(*total[:, None]))  # (1,)
  return Interval(value=float(value[0]), low=float(low), high=float(high))


def _blocks(
  values: tuple[np.ndarray, ...], block: int
) -> tuple[np.ndarray, np.ndarray]:
  """Sums (k, n) and counts (n,) of the blocks; the last of a row is shorter."""
  shapes = [np.shape(v) for v in values]
  if len(set(shapes)) != 1 or len(shapes[0]) != 2 or not all(shapes[0]):
    raise ValueError(
      f'bootstrap.interval: shapes {shapes}; allowed are arrays of one shape '
      '(num, T), not empty. Give the values of the same tokens.'
    )
  num, T = shapes[0]
  starts = np.arange(0, T, block)
  stacked = np.stack([np.asarray(v, np.float64) for v in values])
  sums = np.add.reduceat(stacked, starts, axis=2)  # (k, num, T/block)
  counts = np.diff(np.append(starts, T))
  return sums.reshape(len(values), -1), np.tile(counts, num)


def _resample(
  sums: np.ndarray, counts: np.ndarray, config: BootstrapConfig
) -> np.ndarray:
  """Means (k, R) over R draws of blocks, the same draws for all k."""
  rng = np.random.default_rng(config.seed)
  n = counts.size
  slab = max(1, _MAX_ENTRIES // n)
  means = []
  for start in range(0, config.resamples, slab):
    size = min(slab, config.resamples - start)
    times = rng.multinomial(n, np.full(n, 1.0 / n), size=size)  # (r, n)
    times = times.astype(np.float64)
    means.append((sums @ times.T) / (times @ counts))  # (k, r)
  return np.concatenate(means, axis=1)

"""MergeQuant: int4 inputs with one static scale per channel, at no cost.

Wang et al., 2025, https://arxiv.org/abs/2503.07654.

  s_j = c_j max |x_j| / qmax,  c_j in {1, .99, .., .5} of least squared error
  norm scale_j / s_j,  W'[j] = s_j W[j],  q = clip(round(norm(h)))   "migration"
  y = (q @ W'_q) * w_scale

As in OutlierTune the steps are in the norm and in the rows, and rounding is all
that is left to do at run time. At 4 bits three things break, and are mended:

clipping  A range taken from an outlier leaves few codes to the rest: c_j is
  searched for, and the first token's massive values are left out. Channels
  that will be split have codes enough, and keep their range.
splitting  Rows grown by a large s_j take the range of all columns of W': those
  channels are split into several (jaxq.quant.channel_split).
rounding  W' is solved by GPTQ on the integer inputs, its ranges searched. With
  `rank` low-rank terms then make up for more of it (jaxq.quant.low_rank).

What norms do not feed (o, down) is rotated online and quantized per token, or,
rest='static', gets steps too, folded into v and up.

Cost: four passes over the block; 51 roundings of its inputs in one of them.

Departures; the paper has no public code, and theta, the shares, the ratios and
the settings of the low-rank terms are our choice. o's input is rotated whole,
not per head (jaxq.quant.rotate). Low-rank terms are trained on the output of
attention and MLP by themselves, inputs behind the first linears not rounded.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.calibrate import observers
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  channel_split,
  channel_steps,
  gptq,
  low_rank,
  outliertune,
  preconditions,
  rotate,
  transform,
)

Params = Mapping[str, Any]
_HIGHEST = lax.Precision.HIGHEST
_CHOICES = {
  'rest': ('dynamic', 'dynamic_hadamard', 'static'),
  'weight': ('gptq', 'none', 'rtn'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeQuantConfig:
  """Attributes.

  weights: integers per channel.
  inputs: symmetric int4..int8; its clip counts for inputs per token only.
  clip: 'adaptive' searches each channel's range and each column's of W', 'none'
    takes the largest.
  refine: sequences on which one more ratio per site is searched by the error of
    its output; 0 is none.
  skip_tokens: at the start of each sequence that do not count for ranges; 0 for
    encoders, whose first token matters.
  reconstruct: whether large channels are split.
  theta, max_share, max_extra, split, width, multiple, max_growth, prune: how,
    as in SplitConfig.
  rest: inputs that no norm feeds: 'dynamic' per token, 'dynamic_hadamard'
    rotated before, 'static' where a linear before can take the steps.
  weight: 'gptq', 'rtn', or 'none' for a method that follows in the chain.
  rank, compensate, epochs, learning_rate, sample_sequences: of the terms, as in
    LowRankConfig; rank 0 is none.
  """

  weights: spec_lib.QuantSpec
  inputs: spec_lib.QuantSpec
  clip: str = 'adaptive'
  refine: int = 0
  skip_tokens: int = 1
  reconstruct: bool = True
  theta: float = 4.0
  max_share: float = 0.02
  max_extra: float = 0.1
  split: str = 'hermite'
  width: str = 'grow'
  multiple: int = 128
  max_growth: float = 1.5
  prune: str = 'obs'
  rest: str = 'dynamic_hadamard'
  weight: str = 'gptq'
  rank: int = 0
  compensate: str = 'merge'
  epochs: int = 3
  learning_rate: float = 1e-3
  sample_sequences: int = 16

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'MergeQuantConfig: {name}={getattr(self, name)!r}; allowed '
          f'{list(allowed)}. Use one of them.'
        )
    preconditions.require_step_specs(
      self.weights, self.inputs, 'MergeQuantConfig', 'W4A4'
    )
    if self.rank and self.weight == 'none':
      raise ValueError(
        f"MergeQuantConfig: rank={self.rank} with weight='none'; there is no "
        "rounding error to make up for. Use weight='gptq', or rank=0."
      )
    # Each checks its own.
    _ = self.migration, self.splitting, self.compensation

  @property
  def migration(self) -> channel_steps.StepsConfig:
    """Its part on steps."""
    return channel_steps.StepsConfig(
      weights=self.weights,
      steps=self.steps,
      clip=self.clip,
      refine=self.refine,
      skip_tokens=self.skip_tokens,
      all_sites=self.rest == 'static',
      split=self.splitting if self.reconstruct else None,
    )

  @property
  def splitting(self) -> channel_split.SplitConfig:
    """Its part on splitting."""
    return _part(self, channel_split.SplitConfig)

  @property
  def compensation(self) -> low_rank.LowRankConfig:
    """Its part on low-rank terms."""
    return _part(self, low_rank.LowRankConfig)

  @property
  def steps(self) -> spec_lib.QuantSpec:
    """Of inputs that arrive in steps: -qmax to qmax."""
    return dataclasses.replace(
      self.inputs, granularity='tensor', group_size=-1, narrow=True, clip=1.0
    )

  @property
  def per_token(self) -> spec_lib.QuantSpec:
    """Of the other inputs."""
    return dataclasses.replace(self.inputs, granularity='token', group_size=-1)

  @property
  def search(self) -> ranges.RangeSearch | None:
    """Of the columns of W'."""
    adaptive = self.clip == 'adaptive'
    return ranges.RangeSearch(kind='mse') if adaptive else None

  @property
  def solver(self) -> gptq.GptqConfig:
    """Of weight='gptq'."""
    return gptq.GptqConfig(weights=self.weights, search=self.search)


def mergequant(config: MergeQuantConfig) -> transform.Transform:
  """The method: a chain of migration, clipping, splitting and rounding."""
  stages = []
  if config.rest == 'dynamic_hadamard':
    stages.append(
      transform.Transform(name='mergequant_rotate', apply=_rotate_rest)
    )
  stages += [
    channel_steps.migrate(config.migration),
    channel_steps.clip(config.migration),
    transform.Transform(
      name='mergequant_split',
      apply=functools.partial(_split, config),
      observe=functools.partial(_observe_importance, config),
      failure=channel_steps.failure,
      check=require_tokens,
    ),
  ]
  if config.weight != 'none':
    solved = functools.partial(gptq.failure, config=config.solver)
    stages.append(
      transform.Transform(
        name='mergequant_round',
        apply=functools.partial(_round, config),
        observe=functools.partial(_observe_hessians, config),
        failure=solved if config.weight == 'gptq' else channel_steps.failure,
        check=require_tokens,
      )
    )
  return transform.chain(*stages)


def require_tokens(where: str, stats: transform.Stats) -> None:
  """Refuses a Hessian of fewer tokens than channels.

  Raises:
    ValueError: there is one.
  """
  preconditions.require_tokens(
    where, stats, 'mergequant', "use weight='rtn', rank=0 and prune='absmax'"
  )


def _part(config: MergeQuantConfig, kind: type) -> Any:
  """A config of those fields that both have."""
  names = [field.name for field in dataclasses.fields(kind)]
  return kind(**{name: getattr(config, name) for name in names})


def _sites(config, block) -> list[channel_steps.Site]:
  return channel_steps.sites(config.rest == 'static', block)


def _rotate_rest(block, params, quant, stats):
  del stats
  for path in block.rotated:
    turned = taps.get_path(quant, f'{path}/hadamard') is not None
    if block.linear(path) is None or turned:
      continue
    preconditions.require_float(params, (path,), 'mergequant')
    kernel = blocks.kernel_of(params, path)
    turn = linear.OnlineHadamard(rotate.block_size(kernel.shape[0]))
    params = taps.set_path(params, f'{path}/kernel', turn(kernel.T).T)
    quant = taps.set_path(quant, f'{path}/hadamard', turn)
  return params, quant


def _observe_importance(config, block) -> transform.Requests:
  obs = config.width == 'constant' and config.prune == 'obs'
  if not (config.reconstruct and obs):
    return {}
  sites = [s for s in _sites(config, block) if s.is_norm]
  return {s.tap: {'hessian': observers.hessian} for s in sites}


def _split(config, block, params, quant, stats):
  """Splits what norms feed, and sets all input quantizers."""
  quantizers: dict[str, Any] = {}
  for s in _sites(config, block):
    quantizers |= dict.fromkeys(s.paths, linear.StepInput(config.steps))
    if not s.is_norm:
      continue
    quant, steps = channel_steps.take_steps(quant, s.site)
    if not config.reconstruct:
      continue
    kernels = [blocks.kernel_of(params, path) for path in s.paths]
    plan, fix = _plan_site(config, s, steps, kernels, stats)
    kept = steps.shape[0] if config.width == 'grow' else 0
    offset = channel_split.offsets(plan, config.splitting)
    split = linear.SplitInput(plan.src[kept:], offset, config.steps)
    for path, kernel in zip(s.paths, kernels, strict=True):
      kernel = kernel if fix is None else fix(kernel)
      kernel = channel_split.split_rows(kernel, plan)
      params = taps.set_path(params, f'{path}/kernel', kernel)
      quant = taps.set_path(quant, f'{path}/split', split)
  per_token = linear.ActQuant(None, None, config.per_token)
  for lin in block.linears:
    act = quantizers.get(lin.path, per_token)
    quant = taps.set_path(quant, f'{lin.path}/input', act)
  return params, quant


def _plan_site(config, s: channel_steps.Site, steps, kernels, stats):
  """The plan of a site, and what makes up for channels that go, if any."""
  how = config.splitting
  if how.width == 'grow':
    return channel_split.plan_split(steps, how), None
  rows = jnp.concatenate(kernels, axis=1)  # Of all consumers, side by side.
  squared = jnp.sum(jnp.square(rows), axis=1)  # (K,)
  if how.prune == 'absmax':  # In steps, all channels have one range.
    return channel_split.plan_split(steps, how, squared), None
  hessian = channel_steps.found(stats, s.tap, 'hessian').mean
  saliency = channel_split.saliency(squared, hessian)
  plan = channel_split.plan_split(steps, how, saliency)
  kept = jnp.zeros(steps.shape, bool).at[plan.src].set(True)
  update = channel_split.make_up(hessian, kept)
  return plan, lambda w: w + jnp.matmul(update, w, precision=_HIGHEST)


def _observe_hessians(config, block) -> transform.Requests:
  def integer(shape):
    return outliertune.IntegerHessian(observers.hessian(shape), config.steps)

  requests: dict[str, dict[str, Any]] = {}
  if config.weight == 'gptq' or config.rank:
    in_steps = {path for s in _sites(config, block) for path in s.paths}
    for lin in block.linears:
      request = integer if lin.path in in_steps else observers.hessian
      requests.setdefault(lin.tap, {})['hessian'] = request
  if config.rank:
    for s in _sites(config, block):
      sample = observers.sample(config.sample_sequences)
      if s.is_norm:
        requests.setdefault(s.tap, {})['sample'] = sample
  return requests


def _round(config, block, params, quant, stats):
  """Rounds, by GPTQ or to nearest, and compensates."""
  rounded: dict[str, qarray.QArray] = {}
  by_tap: dict[str, list[str]] = {}
  for lin in block.linears:
    by_tap.setdefault(lin.tap, []).append(lin.path)
  for tap, paths in by_tap.items():
    preconditions.require_float(params, paths, 'mergequant')
    feedback = None
    if config.weight == 'gptq':
      mean = channel_steps.found(stats, tap, 'hessian').mean
      feedback = gptq.feedback(mean, config.solver)
    for path in paths:
      w = blocks.kernel_of(params, path)
      rounded[path] = (
        qarray.quantize(w, config.weights, search=config.search)
        if feedback is None
        else gptq.quantize_with(w, feedback, config.solver)
      )
  if config.rank:
    terms = _terms(config, block, params, quant, stats, rounded)
    for path, term in terms.items():
      if config.compensate == 'merge':
        w = blocks.kernel_of(params, path)
        rounded[path] = low_rank.merge(w, rounded[path], term)
      else:
        term = jax.tree.map(lambda a: a.astype(jnp.bfloat16), term)
        quant = taps.set_path(quant, f'{path}/low_rank', term)
  for path, q in rounded.items():
    params = taps.set_path(params, f'{path}/kernel', q)
  return params, quant


def _terms(config, block, params, quant, stats, rounded):
  """{path: LowRank} of all linears."""
  branches: list[low_rank.Branch] = []
  taken: set[str] = set()
  for s in _sites(config, block):
    paths = tuple(p for p in _branch_paths(block, s.site) if p not in taken)
    if s.is_norm and paths:
      run = channel_steps.branch(block, s.site, params, quant)
      sample = channel_steps.found(stats, s.tap, 'sample').x
      branches.append(low_rank.Branch(paths, run, sample))
      taken.update(paths)
  hessians = {
    lin.path: channel_steps.found(stats, lin.tap, 'hessian').mean
    for lin in block.linears
  }
  return low_rank.compensate(
    {path: blocks.kernel_of(params, path) for path in rounded},
    rounded,
    hessians,
    branches,
    config.compensation,
  )


def _branch_paths(block, site) -> list[str]:
  """The quantized linears of the branch of a site."""
  paths = list(site.consumers)
  if site.method:
    for following in block.sites:
      if following.producer in site.consumers:
        paths += following.consumers
  return [path for path in paths if block.linear(path) is not None]

"""Steps per channel, folded into what comes before: MergeQuant's migration.

  s_j = c_j max |x_j| / qmax;  producer_j / s_j,  rows s_j W[j]

The float block is unchanged, and its inputs at these sites then only need to be
rounded (nn.linear.StepInput). Two transforms, since the second needs the first:

  migrate  c = 1, from the largest |x_j| on the calibration data
  clip     inputs now span -qmax .. qmax, so that candidates for c are constants
           and their errors are summed over all data, token by token:
             c_j = argmin_c sum_t (x_tj - c clip(round(x_tj / c)))^2
           then, if asked, one more ratio per site, of the least error of what
           the site's branch puts out. A channel that will be split has codes
           enough for all of its range: c = 1

Both leave the steps s of norms in `quant` at '<norm>/steps', for a transform
that follows and that takes them off (`take_steps`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from absl import logging
from jax import lax

from jaxq.calibrate import observers
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import channel_split, equivalence, preconditions, transform

Params = Mapping[str, Any]
CLIP_RATIOS = tuple(1 - i / 100 for i in range(51))
REFINE_RATIOS = tuple(1 - i / 40 for i in range(20))
_LEAST = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsConfig:
  """Attributes.

  weights: what kernels become, for `refine`.
  steps: of the inputs; symmetric integers per tensor.
  clip: 'adaptive' or 'none'.
  refine: sequences on which the sites' ratios are searched; 0 is none.
  skip_tokens: at the start of each sequence that do not count for ranges.
  all_sites: whether linears that feed linears take steps as well as norms.
  split: how what norms feed will be split; None: not at all.
  """

  weights: spec_lib.QuantSpec
  steps: spec_lib.QuantSpec
  clip: str = 'adaptive'
  refine: int = 0
  skip_tokens: int = 1
  all_sites: bool = False
  split: channel_split.SplitConfig | None = None

  def __post_init__(self):
    if self.clip not in ('adaptive', 'none'):
      raise ValueError(
        f'StepsConfig: clip={self.clip!r}; allowed '
        "['adaptive', 'none']. Use one of them."
      )
    for name in ('refine', 'skip_tokens'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'StepsConfig: {name}={getattr(self, name)}; allowed 0 or more. Use '
          '0 for none.'
        )


@flax.struct.dataclass
class Later:
  """state: an observer that does not see the first `skip` tokens of a text."""

  state: Any
  skip: int = flax.struct.field(pytree_node=False)

  def update(self, x: jax.Array) -> 'Later':
    """x (B, T, K)."""
    return dataclasses.replace(self, state=self.state.update(x[:, self.skip :]))


@flax.struct.dataclass
class ClipErrors:
  """errors (51, K): squared error of an input in steps at each of CLIP_RATIOS.

  A row's |W[j]|^2 would weight its channel's errors alike: it changes nothing.
  """

  errors: jax.Array
  spec: spec_lib.QuantSpec = flax.struct.field(pytree_node=False)

  def update(self, x: jax.Array) -> 'ClipErrors':
    """x (..., K) in steps of max |x| / qmax."""
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    def error(ratio):
      codes = jnp.clip(jnp.round(flat / ratio), self.spec.qmin, self.spec.qmax)
      return jnp.sum(jnp.square(flat - codes * ratio), axis=0)  # (K,)

    errors = lax.map(error, jnp.array(CLIP_RATIOS, jnp.float32))
    return dataclasses.replace(self, errors=self.errors + errors)


def fit_scale(absmax: jax.Array, spec: spec_lib.QuantSpec) -> jax.Array:
  """max |x_j| (K,) -> s (K,) float32; 1e-5 / qmax where it is 0."""
  return jnp.maximum(absmax.astype(jnp.float32), _LEAST) / spec.qmax


class Site(NamedTuple):
  """A site that takes steps.

  site: of the block. tap: what its consumers' input passes.
  is_norm: whether its producer is one.
  paths: of the consumers that are quantized.
  """

  site: blocks.Site
  tap: str
  is_norm: bool
  paths: tuple[str, ...]


def sites(all_sites: bool, block: blocks.BlockSpec) -> list[Site]:
  """The sites that take steps, but for those whose consumers all stay float.

  Args:
    all_sites: as in StepsConfig.
    block: its spec.

  Raises:
    ValueError: there is none, or a norm has a reader outside its site.
  """
  feeds = dict(block.norms)
  if block.linears and not any(site.producer in feeds for site in block.sites):
    raise ValueError(
      f'mergequant: the block {type(block.module).__name__} declares no site '
      'whose producer is a norm; scales have nowhere to go. Use rtn or gptq '
      'with this model.'
    )
  chosen = []
  for site in block.sites:
    is_norm, tap = site.producer in feeds, block.tap_of(site)
    if not tap or not (is_norm or all_sites):
      continue
    others = sorted(set(feeds.get(site.producer, ())) - set(site.consumers))
    if others:
      raise ValueError(
        f'mergequant: {others[0]} reads {site.producer} and is not of its site '
        f'{list(site.consumers)}; every reader must take the steps. Add it to '
        'the site.'
      )
    paths = tuple(p for p in site.consumers if block.linear(p) is not None)
    chosen.append(Site(site, tap, is_norm, paths))
  return chosen


def saturation_by_position(
  block: blocks.BlockSpec, variables: Params, carry: blocks.Carry
) -> dict[str, jax.Array]:
  """{path: (T,) share of codes at the end of the range}, of inputs in steps.

  The first position is where massive activations are cut off.
  """
  tapped = block.tapped(variables, carry)
  rates = {}
  for lin in block.linears:
    act = taps.get_path(variables['quant'], f'{lin.path}/input')
    if isinstance(act, linear.StepInput):
      codes = act.codes(taps.get_path(tapped, f'{lin.path}/in'))
      at_end = jnp.abs(codes.astype(jnp.int32)) >= act.spec.qmax
      rates[lin.path] = jnp.mean(at_end.astype(jnp.float32), axis=(0, 2))
  return rates


def migrate(config: StepsConfig) -> transform.Transform:
  """Folds max |x| / qmax."""
  return transform.Transform(
    name='steps_migrate',
    apply=functools.partial(_migrate, config),
    observe=functools.partial(_observe_absmax, config),
    failure=failure,
    check=warn_of_dead_channels,
  )


def clip(config: StepsConfig) -> transform.Transform:
  """Folds the ratios c."""
  return transform.Transform(
    name='steps_clip',
    apply=functools.partial(_clip, config),
    observe=functools.partial(_observe_errors, config),
    failure=failure,
  )


def take_steps(
  quant: Params, site: blocks.Site
) -> tuple[dict[str, Any], jax.Array]:
  """quant without the steps of a norm, and those (K,)."""
  node = dict(taps.get_path(quant, site.producer))
  steps = node.pop('steps')
  quant = taps.set_path(quant, site.producer, node)
  if not node and '/' not in site.producer:
    del quant[site.producer]
  return quant, steps


def failure(name: str) -> str:
  """The error message where a parameter is NaN."""
  return (
    f'mergequant: the scales of {name} are not finite; its calibrated ranges '
    'must be. Look for NaN or Inf in the calibration data and the weights.'
  )


def warn_of_dead_channels(where: str, stats: transform.Stats) -> None:
  """Logs a warning where channels were zero on all calibration data."""
  for tap, named in stats.items():
    dead = named['absmax'].state.absmax == 0
    if count := int(jnp.sum(dead)):
      logging.warning(
        'mergequant: %d of %d channels at %s/%s are zero on all calibration '
        'data; what they carry later is lost. Calibrate with more text.',
        count,
        dead.size,
        where,
        tap,
      )


def branch(
  block: blocks.BlockSpec, site: blocks.Site, params: Params, quant: Params
) -> Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]:
  """({path: kernel}, x) -> what the branch behind a site puts out.

  No input is rounded but x (B, T, K), which passed the site's tap: it is split
  already where that is a linear's own.

  Args:
    block: its spec.
    site: one of its sites.
    params: kernels that are not given are taken from here.
    quant: its online rotations count.
  """
  bare: dict[str, Any] = {}
  for path, leaf in taps.leaves(quant):
    kind = path.rpartition('/')[2]
    if kind == 'hadamard' or (kind == 'split' and site.tap):
      bare = taps.set_path(bare, path, leaf)

  def run(kernels, x):
    tree = params
    for path, kernel in kernels.items():
      tree = taps.set_path(tree, f'{path}/kernel', kernel)
    variables = {'params': tree, 'quant': bare}
    if site.method:
      return block.output(site, variables, x)
    return block.inner_output(site, variables, x)

  return run


def found(stats: transform.Stats, tap: str, name: str) -> Any:
  """A finished statistic.

  Raises:
    ValueError: it was not taken.
  """
  if name not in stats.get(tap, {}):
    raise ValueError(
      f'mergequant: no {name} was observed at {tap} (observed '
      f'{sorted(stats)}); static scales need one. Calibrate with the same '
      'block.linears.'
    )
  return stats[tap][name]


def _to_producer(site: blocks.Site, x, reduce):
  """(..., K) of the consumers -> (..., channels of the producer)."""
  if site.heads is None:
    return x
  heads = x.reshape(*x.shape[:-1], *site.heads)
  return reduce(heads, axis=-2).reshape(*x.shape[:-1], -1)


def _observe_absmax(config, block) -> transform.Requests:
  return {
    s.tap: {'absmax': _later(config, observers.absmax)}
    for s in sites(config.all_sites, block)
  }


def _later(config, request) -> observers.Request:
  def start(shape):
    if shape[-2] <= config.skip_tokens:
      raise ValueError(
        f'mergequant: calibration sequences have {shape[-2]} tokens and '
        f'skip_tokens={config.skip_tokens}; some must be left. Use longer '
        'sequences, or skip_tokens=0.'
      )
    return Later(request(shape), config.skip_tokens)

  return start


def _migrate(config, block, params, quant, stats):
  """Folds s = max |x| / qmax."""
  for site, tap, is_norm, paths in sites(config.all_sites, block):
    touched = (site.producer, *site.consumers)  # A norm has no kernel.
    preconditions.require_float(params, touched, 'mergequant')
    preconditions.require_dynamic_inputs(quant, site.consumers, 'mergequant')
    for path in paths:
      if taps.get_path(quant, f'{path}/hadamard') is not None:
        raise ValueError(
          f'mergequant: the input of {path} is rotated online, which no scale '
          "passes. Use rest='dynamic' behind rotate."
        )
    absmax = found(stats, tap, 'absmax').state.absmax
    preconditions.require_exact_sums(
      config.weights,
      config.steps,
      site.consumers[0],
      len(absmax),
      'mergequant',
    )
    s = fit_scale(_to_producer(site, absmax, jnp.max), config.steps)
    params = equivalence.divide_producer(params, site, s)
    if is_norm:
      quant = taps.set_path(quant, f'{site.producer}/steps', s)
  return params, quant


def _observe_errors(config, block) -> transform.Requests:
  def errors(shape):
    zeros = jnp.zeros((len(CLIP_RATIOS), shape[-1]), jnp.float32)
    return ClipErrors(zeros, config.steps)

  requests: dict[str, dict[str, Any]] = {}
  for s in sites(config.all_sites, block):
    if config.clip == 'adaptive':
      requests.setdefault(s.tap, {})['errors'] = _later(config, errors)
    if config.refine:
      sample = observers.sample(config.refine)
      requests.setdefault(s.tap, {})['sample'] = sample
  return requests


def _clip(config, block, params, quant, stats):
  """Folds the ratios c; the input of every site is then in its final steps."""
  for s in sites(config.all_sites, block):
    if config.clip == 'adaptive':
      errors = found(stats, s.tap, 'errors').state.errors  # (51, K)
      best = jnp.argmin(_to_producer(s.site, errors, jnp.sum), axis=0)
      c = jnp.array(CLIP_RATIOS, jnp.float32)[best]
      c = jnp.where(_will_split(config, s, quant), 1.0, c)
      params, quant = _fold(params, quant, s.site, c)
    if config.refine:
      x = found(stats, s.tap, 'sample').x
      if config.clip == 'adaptive':
        x = x / s.site.expand(c)[None, None]
      ratio = _refined(config, block, s, params, quant, x)
      channels = _to_producer(s.site, x[0, 0], jnp.max).shape[0]
      params, quant = _fold(params, quant, s.site, jnp.full(channels, ratio))
  return params, quant


def _will_split(config, s: Site, quant) -> jax.Array:
  """(channels of the producer,) or () bool: those that get finer codes."""
  how = config.split
  if how is None or how.split == 'copy' or not s.is_norm:
    return jnp.bool_(False)
  steps = taps.get_path(quant, f'{s.site.producer}/steps')
  return channel_split.copies(steps, how)[0] > 1


def _fold(params, quant, site, c):
  """Multiplies a site's steps by c."""
  params = equivalence.divide_producer(params, site, c)
  path = f'{site.producer}/steps'
  s = taps.get_path(quant, path)
  return params, quant if s is None else taps.set_path(quant, path, s * c)


def _refined(config, block, s: Site, params, quant, x):
  """The ratio for all channels of a site with the least error of its output."""
  kernels = {path: blocks.kernel_of(params, path) for path in s.paths}
  run = branch(block, s.site, params, quant)
  target = run(kernels, x)
  rounded = {
    path: qarray.fake_quant(kernel, config.weights)
    for path, kernel in kernels.items()
  }  # At any ratio: a column's scale takes it on.
  low, high = config.steps.qmin, config.steps.qmax

  def loss(ratio):
    codes = jnp.clip(jnp.round(x / ratio), low, high)
    return jnp.mean(jnp.square(run(rounded, codes * ratio) - target))

  grid = jnp.array(REFINE_RATIOS, jnp.float32)
  return grid[jnp.argmin(lax.map(loss, grid))]

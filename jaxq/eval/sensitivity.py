"""What quantizing one linear alone does to the model's predictions.

  kl[u, c] = mean over tokens of KL(float || float but for unit u at choice c)

A unit is one linear or one block. Its kernels are quantized by a method (a
Transform) on the float model's own activations and put back dequantized, so
that one compiled forward function serves all. The blocks in front of the unit
compute what they did before: their output is kept, and only the blocks behind
it run again. So a unit in block i of L costs (L - i) / L of a forward pass, and
the head.

All units at all choices would be many passes. KL is quadratic in a small
change, and so is the error of the block's own output, which takes one block to
measure. So KL is measured at a few choices, the probes, and carried over:

  log kl(c) is linear in log error(c) through the probes around it, and of
  slope 1 beyond them

Costs the float model in memory, the input of every block, and the log
probabilities of all sampled tokens (tokens x V x 4 bytes).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxq.calibrate import driver
from jaxq.calibrate import steps as steps_lib
from jaxq.eval import perplexity
from jaxq.nn import blocks, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import transform as transform_lib

Params = Mapping[str, Any]
Head = Callable[[Params, jax.Array], jax.Array]
UNITS = ('linear', 'block')

_TINY = 1e-12  # Below it a KL or an error is the noise of float32.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
  """How it is measured.

  unit: 'linear' or 'block': what is quantized alone.
  probes: the choices at which KL is measured.
  batch_size: sequences per jitted call; divides the number of sequences.
  ignore: linears that stay float (BlockSpec.without).
  """

  probes: tuple[str, ...]
  unit: str = 'linear'
  batch_size: int = 4
  ignore: tuple[str, ...] = ()

  def __post_init__(self):
    if self.unit not in UNITS:
      raise ValueError(
        f'SensitivityConfig: unit={self.unit!r}; allowed {sorted(UNITS)}.'
      )
    if not self.probes:
      raise ValueError(
        'SensitivityConfig: probes=(); KL must be measured at one choice at '
        'least. Name the one nearest to the bits you want.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
  """What was measured of one unit.

  Attributes:
    name: 'blocks.3.mlp.down_proj', or 'blocks.3'.
    linears: names of its linears.
    size: its number of weights.
    bits: choice -> bits per weight, all metadata counted; a choice whose
      groups do not fit is left out, here and below.
    error: choice -> squared error of its block's output, relative.
    kl: probe -> nats per token.
  """

  name: str
  linears: tuple[str, ...]
  size: int
  bits: Mapping[str, float]
  error: Mapping[str, float]
  kl: Mapping[str, float]

  def predicted(self, choice: str) -> float:
    """KL at any choice, carried over from the probes; inf if not allowed."""
    if choice in self.kl:
      return self.kl[choice]
    if choice not in self.error:
      return float('inf')
    points = sorted(
      (np.log(max(self.error[p], _TINY)), np.log(max(kl, _TINY)))
      for p, kl in self.kl.items()
    )
    x = np.log(max(self.error[choice], _TINY))
    xs, ys = np.array(points).T
    if x <= xs[0]:
      return float(np.exp(ys[0] + (x - xs[0])))
    if x >= xs[-1]:
      return float(np.exp(ys[-1] + (x - xs[-1])))
    return float(np.exp(np.interp(x, xs, ys)))


def measure(
  model: driver.CalibrationModel,
  head: Head,
  specs: Mapping[str, spec_lib.QuantSpec],
  method: Callable[[spec_lib.QuantSpec], transform_lib.Transform],
  data: Any,
  config: SensitivityConfig,
  *,
  mask: np.ndarray | None = None,
  mesh: Mesh | None = None,
  on_unit: Callable[[Unit], None] = lambda unit: None,
) -> list[Unit]:
  """Measures every unit of a model.

  Args:
    model: float; from models.open_model.
    head: (params outside the blocks, stream (B, T, C)) -> logits (B, T, V).
    specs: choice -> what kernels become.
    method: the Transform, of one stage, that makes them so.
    data: what the model's `embed` takes, all samples.
    config: how.
    mask: (samples, T), True where a prediction counts; None: all do.
    mesh: None is the default device.
    on_unit: called with each unit.

  Raises:
    ValueError: indivisible sequences, or a probe that is no choice.
  """
  run = _Run(model, head, specs, method, config, mesh)
  return run.measure(data, mask, on_unit)


class _Run:
  """One measurement: the compiled functions and the float model's results."""

  def __init__(self, model, head, specs, method, config, mesh):
    unknown = sorted(set(config.probes) - set(specs))
    if unknown:
      raise ValueError(
        f'--probes={",".join(unknown)}: KL is measured at choices; allowed are '
        f'{sorted(specs)}. Add them to --choices, or leave them out.'
      )
    self._model, self._config, self._choices = model, config, specs
    self._transforms = {name: method(spec) for name, spec in specs.items()}
    stages = list(self._transforms.values())
    rules = () if mesh is None else model.rules(mesh)
    self._steps = steps_lib.Steps(
      stages, model.embed, model.bridge, rules, mesh
    )
    self._apply = dict(zip(specs, self._steps.apply, strict=True))
    self._log_p = jax.jit(
      lambda outside, x: perplexity.log_probs(head(outside, x))
    )
    self._kl = jax.jit(functools.partial(_kl, head))

  def measure(self, data, mask, on_unit) -> list[Unit]:
    size, count = self._config.batch_size, len(jax.tree.leaves(data)[0])
    if count % size:
      raise ValueError(
        f'{count} sequences do not make whole batches of batch_size={size}; '
        f'choose a batch_size that divides {count}.'
      )
    steps, model = self._steps, self._model
    self._outside = steps.place(model.outside())
    self._specs = [
      model.block_at(i).without(self._config.ignore, i)
      for i in range(model.num_blocks)
    ]
    self._params = [
      steps.place({'params': model.block_params(i), 'quant': {}})
      for i in range(model.num_blocks)
    ]
    xs = [
      steps.embed(
        self._outside,
        steps.place_batch(jax.tree.map(lambda a, i=i: a[i : i + size], data)),
      )
      for i in range(0, count, size)
    ]
    inputs = []  # inputs[i]: the batches in front of block i, bridged.
    for i in range(model.num_blocks):
      xs = self._bridged(i, xs)
      inputs.append(xs)
      xs = self._forward(i, self._params[i], xs)
    self._reference = [self._log_p(self._outside, blocks.stream(x)) for x in xs]
    if mask is None:
      mask = np.ones((count, blocks.stream(xs[0]).shape[1]), bool)
    self._masks = [
      steps.place_batch(mask[i : i + size]) for i in range(0, count, size)
    ]
    self._counted = int(np.sum(mask))
    inputs.append(xs)
    units = []
    for i in range(model.num_blocks):
      for unit in self._block(i, inputs[i]):
        on_unit(unit)
        units.append(unit)
    return units

  def _block(self, i, xs):
    """Yields the units of block i."""
    spec, variables = self._specs[i], self._params[i]
    by_linear = self._config.unit == 'linear'
    groups = [(lin,) for lin in spec.linears] if by_linear else [spec.linears]
    stats = self._statistics(spec, variables, xs)
    ys = self._forward(i, variables, xs)
    for linears in groups:
      part = dataclasses.replace(spec, linears=tuple(linears))
      kernels = [blocks.kernel_of(variables['params'], n.path) for n in linears]
      names = tuple(blocks.name_of(i, n.path) for n in linears)
      bits, error, kl = {}, {}, {}
      for choice in self._transforms:
        if not self._fits(choice, kernels):
          continue
        made, bits[choice] = self._quantized(choice, part, variables, stats)
        outputs = self._forward(i, made, xs)
        error[choice] = _relative_error(ys, outputs)
        if choice in self._config.probes:
          kl[choice] = self._divergence(i + 1, outputs)
      yield Unit(
        name=names[0] if by_linear else f'blocks.{i}',
        linears=names,
        size=sum(kernel.size for kernel in kernels),
        bits=bits,
        error=error,
        kl=kl,
      )

  def _fits(self, choice, kernels) -> bool:
    """Whether the groups of a choice divide all kernels."""
    spec = self._choices[choice]
    if spec.granularity != 'group':
      return True
    return all(kernel.shape[-2] % spec.group_size == 0 for kernel in kernels)

  def _statistics(self, spec, variables, xs):
    """What the methods observe, taken once for all choices."""
    requests: dict[str, dict[str, Any]] = {}
    for transform in self._transforms.values():
      for tap, named in transform.observe(spec).items():
        requests.setdefault(tap, {}).update(named)
    if not requests:
      return {}
    states = self._steps.place_states(
      steps_lib.initial_states(spec, requests, variables, xs[0])
    )
    for x in xs:
      states = self._steps.observe[0](spec, variables, x, states)
    return {path: taps.get_path(states, path) for path in requests}

  def _quantized(self, choice, part, variables, stats):
    """Variables with the part's kernels rounded, float; bits per weight."""
    wanted = self._transforms[choice].observe(part)
    params, _ = self._apply[choice](
      part, variables['params'], {}, {tap: stats[tap] for tap in wanted}
    )
    nbytes = size = 0
    for lin in part.linears:
      q: Any = blocks.kernel_of(params, lin.path)
      old = blocks.kernel_of(variables['params'], lin.path)
      nbytes, size = nbytes + qarray.nbytes(q), size + old.size
      params = taps.set_path(params, f'{lin.path}/kernel', qarray.dequantize(q))
    made = self._steps.place({'params': params, 'quant': {}})
    return made, 8 * nbytes / size

  def _forward(self, i, variables, xs):
    return [
      self._steps.forward_float(self._specs[i], variables, x)[0] for x in xs
    ]

  def _bridged(self, i, xs):
    if i not in self._model.bridges:
      return xs
    return [self._steps.bridge(i, self._outside, x) for x in xs]

  def _divergence(self, first, xs) -> float:
    """Mean KL when the blocks from `first` on see xs."""
    for i in range(first, self._model.num_blocks):
      xs = self._forward(i, self._params[i], self._bridged(i, xs))
    sums = [
      self._kl(self._outside, log_p, blocks.stream(x), mask)
      for log_p, x, mask in zip(self._reference, xs, self._masks, strict=True)
    ]
    return float(np.sum([np.asarray(s) for s in sums]) / self._counted)


def _kl(head, outside, log_p, x, mask):
  """Reference log_p (B, T, V), stream (B, T, C), mask (B, T) -> summed KL."""

  def row(pair):  # (T, V) at a time.
    log_p, x = pair
    log_q = perplexity.log_probs(head(outside, x))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

  return jnp.sum(jax.lax.map(row, (log_p, x)), where=mask)


@jax.jit
def _squares(y, other):
  y, other = blocks.stream(y), blocks.stream(other)
  y, other = y.astype(jnp.float32), other.astype(jnp.float32)
  return jnp.sum((y - other) ** 2), jnp.sum(y**2)


def _relative_error(ys, outputs) -> float:
  """Squared error of the outputs, relative to the float ones."""
  sums = [_squares(y, o) for y, o in zip(ys, outputs, strict=True)]
  noise, power = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
  return float(noise / max(power, _TINY))

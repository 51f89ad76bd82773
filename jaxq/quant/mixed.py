"""Mixed precision: each linear quantized to its own spec.

An `Allocation` says which choice of spec each linear takes. `allocate` finds
the one of least loss under a budget of bits:

  min sum_u loss[u, c_u]   with   sum_u bits[u, c_u] <= budget

by its Lagrangian: for a price per bit every unit takes the choice of least
loss + price * bits by itself, and a higher price takes fewer bits (Shoham and
Gersho, 1988). The price is bisected, and what is left of the budget, less than
one unit's step, is spent greedily. Only choices off the lower convex hull can
be missed.

`mixed` is a Transform over Transforms, one per choice: a block is split into
the linears of each choice, and each part is quantized by the method as if the
others were left float. So methods know nothing of it. A linear carries its
choice in the block's spec (`Labelled`), which makes blocks with other choices
other specs: the functions of a block step are compiled once per distinct one.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxq.nn import blocks
from jaxq.numerics import spec as spec_lib
from jaxq.quant import transform as transform_lib

Params = Mapping[str, Any]
DEFAULT = ''  # The choice of linears that no allocation names.

_BISECTIONS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
  """Which spec each linear takes.

  specs: name of a choice -> what kernels become.
  linears: public name of a linear ('blocks.3.mlp.down_proj') -> its choice.
  bits: average per weight over these linears, all metadata counted.
  """

  specs: Mapping[str, spec_lib.QuantSpec]
  linears: Mapping[str, str]
  bits: float

  def __post_init__(self):
    unknown = sorted(set(self.linears.values()) - set(self.specs))
    if unknown or DEFAULT in self.specs:
      raise ValueError(
        f'Allocation: linears take choices {unknown}; allowed are '
        f'{sorted(self.specs)}, none of them empty. Give each a spec.'
      )

  def to_dict(self) -> dict[str, Any]:
    """As JSON data."""
    return {
      'bits': self.bits,
      'specs': {name: spec.to_dict() for name, spec in self.specs.items()},
      'linears': dict(self.linears),
    }

  @classmethod
  def from_dict(cls, data: Any) -> 'Allocation':
    """Inverse of to_dict.

    Raises:
      ValueError: not what to_dict gives.
    """
    keys = sorted(field.name for field in dataclasses.fields(cls))
    if not isinstance(data, dict) or sorted(data) != keys:
      found = sorted(data) if isinstance(data, dict) else type(data).__name__
      raise ValueError(
        f'allocation: {found}; allowed is an object with the keys {keys}. '
        'Write it with experiments.sensitivity.'
      )
    specs = {
      name: spec_lib.QuantSpec.from_dict(fields)
      for name, fields in data['specs'].items()
    }
    return cls(specs=specs, linears=data['linears'], bits=data['bits'])


def load(path: str | os.PathLike) -> Allocation:
  """Reads an allocation from a JSON file.

  Raises:
    OSError: it cannot be read.
    ValueError: it is no allocation.
  """
  text = pathlib.Path(path).read_text(encoding='utf-8')
  try:
    return Allocation.from_dict(json.loads(text))
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e


def choice(text: str, *, symmetric: bool = True) -> spec_lib.QuantSpec:
  """'4' -> int4 with a scale per channel, '4g64' -> in groups of 64.

  Raises:
    ValueError: unreadable.
  """
  bits, g, size = text.partition('g')
  if not (bits.isdecimal() and 2 <= int(bits) <= 8) or (
    g and not (size.isdecimal() and int(size) >= 1)
  ):
    raise ValueError(
      f'--choices={text}; allowed are <bits> and <bits>g<group size> with 2 to '
      "8 bits, as in '4' (a scale per channel) or '4g64'."
    )
  return spec_lib.QuantSpec(
    dtype=f'int{bits}',
    granularity='group' if g else 'channel',
    group_size=int(size) if g else -1,
    symmetric=symmetric,
  )


def allocate(losses: np.ndarray, bits: np.ndarray, budget: float) -> np.ndarray:
  """The choices of least loss whose bits keep within the budget.

  Args:
    losses: (U, C), loss of unit u under choice c; inf where it is not allowed.
    bits: (U, C), what that choice costs, above 0.
    budget: sum of bits over the units, at most.

  Returns:
    (U,) int, a choice per unit.

  Raises:
    ValueError: even the cheapest choices exceed the budget.
  """
  losses = np.asarray(losses, np.float64)
  bits = np.where(np.isfinite(losses), np.asarray(bits, np.float64), np.inf)
  units = np.arange(len(losses))
  least = bits.min(axis=1).sum()
  if not least <= budget:
    raise ValueError(
      f'allocate: a budget of {budget:.6g} bits; the cheapest choices take '
      f'{least:.6g}. Raise --target_bits, or offer cheaper --choices.'
    )

  def chosen(price):
    with np.errstate(invalid='ignore'):
      total = losses + price * bits
    return np.argmin(np.where(np.isfinite(bits), total, np.inf), axis=1)

  def spent(picks):
    return bits[units, picks].sum()

  free = chosen(0.0)
  if spent(free) <= budget:
    return free
  low, high = 0.0, 1.0 / bits[np.isfinite(bits)].mean()
  while spent(chosen(high)) > budget:
    high *= 2
    if not np.isfinite(high):  # Equal bits and other losses: take the least.
      return bits.argmin(axis=1)
  for _ in range(_BISECTIONS):
    middle = (low + high) / 2
    if spent(chosen(middle)) > budget:
      low = middle
    else:
      high = middle
  return _spend(losses, bits, chosen(high), budget)


def _spend(losses, bits, picks, budget) -> np.ndarray:
  """Raises choices, best gain per bit first, while the budget lasts."""
  units, picks = np.arange(len(picks)), picks.copy()
  while True:
    gain = losses[units, picks][:, None] - losses  # (U, C)
    extra = bits - bits[units, picks][:, None]
    left = budget - bits[units, picks].sum()
    useful = np.isfinite(bits) & (gain > 0) & (extra <= left)
    if not useful.any():
      return picks
    with np.errstate(invalid='ignore'):
      rate = np.where(useful, gain / np.maximum(extra, 1e-9), -np.inf)
    unit, pick = np.unravel_index(np.argmax(rate), rate.shape)
    picks[unit] = pick


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled(blocks.Linear):
  """A linear and the name of its choice."""

  choice: str = DEFAULT


def label(
  block: blocks.BlockSpec, index: int, allocation: Allocation
) -> blocks.BlockSpec:
  """The spec of block `index`, its linears labelled with their choices."""
  return dataclasses.replace(
    block,
    linears=tuple(
      Labelled(
        **{f.name: getattr(lin, f.name) for f in dataclasses.fields(lin)},
        choice=allocation.linears.get(blocks.name_of(index, lin.path), DEFAULT),
      )
      for lin in block.linears
    ),
  )


class LabelledModel:
  """A model for the calibration whose blocks carry an allocation's choices.

  All else is the model's own.
  """

  def __init__(self, model: Any, allocation: Allocation):
    """Wraps a model.

    Raises:
      ValueError: the allocation names linears that the model does not have.
    """
    self._model = model
    self._allocation = allocation
    names = {
      blocks.name_of(i, lin.path)
      for i in range(model.num_blocks)
      for lin in model.block_at(i).linears
    }
    unknown = sorted(set(allocation.linears) - names)
    if unknown:
      raise ValueError(
        f'--bits_from: {unknown[0]} and {len(unknown) - 1} more are no linears '
        f'of this model; allowed are names such as {min(names)!r}. Give the '
        'allocation that was made for it.'
      )

  def block_at(self, i: int) -> blocks.BlockSpec:
    """The labelled spec of block i."""
    return label(self._model.block_at(i), i, self._allocation)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._model, name)


def mixed(
  transforms: Mapping[str, transform_lib.Transform],
) -> transform_lib.Transform:
  """A Transform that gives the linears of each choice to its own method.

  Args:
    transforms: choice -> a single method; DEFAULT for linears without one.

  Raises:
    NotImplementedError: a method of several stages.
  """
  for name, transform in transforms.items():
    if transform.rest:
      raise NotImplementedError(
        f'mixed: the method of choice {name!r} has several stages; each part '
        'of a block would go through them at another time. Use a method of '
        'one stage (gptq without true_sequential).'
      )

  def observe(block: blocks.BlockSpec) -> transform_lib.Requests:
    requests: dict[str, dict[str, Any]] = {}
    for name, part in _parts(block):
      for tap, named in transforms[name].observe(part).items():
        requests.setdefault(tap, {}).update(named)
    return requests

  def apply(
    block: blocks.BlockSpec,
    params: Params,
    quant: Params,
    stats: transform_lib.Stats,
  ) -> tuple[Params, Params]:
    for name, part in _parts(block):
      params, quant = transforms[name].apply(part, params, quant, stats)
    return params, quant

  first = next(iter(transforms.values()))
  return first._replace(
    name=f'mixed_{first.name}', apply=apply, observe=observe
  )


def _parts(
  block: blocks.BlockSpec,
) -> Iterable[tuple[str, blocks.BlockSpec]]:
  """The block once per choice, with that choice's linears only."""
  by_choice: dict[str, list[blocks.Linear]] = {}
  for lin in block.linears:
    by_choice.setdefault(getattr(lin, 'choice', DEFAULT), []).append(lin)
  for name in sorted(by_choice):
    part = dataclasses.replace(block, linears=tuple(by_choice[name]))
    yield name, part

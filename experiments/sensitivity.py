r"""Measures how much each linear hurts, and gives bits where they help most.

  python -m experiments.sensitivity \
      --flagfile=experiments/flags/smollm2_sensitivity.flags

quantizes one linear (or block) at a time, measures the KL divergence to the
float model, and searches the choice of bits per linear that has the least sum
of them at --target_bits. OUTPUT/sensitivity.json has what was measured,
OUTPUT/allocation.json what was chosen, for

  python -m experiments.calibrate --bits_from=OUTPUT/allocation.json ...

--measured=OUTPUT/sensitivity.json searches again, at another --target_bits,
without measuring.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags

import models
from experiments import cli, families, recipe, results
from jaxq.eval import sensitivity
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import mixed, schemes

_METHODS = ('gptq', 'rtn')
_SHOWN = 8  # Units in the printed table.

_MODEL = flags.DEFINE_string(
  'model', None, 'Packaged name, .gguf file or Hugging Face directory.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Directory for the two files.', required=True
)
_TARGET = flags.DEFINE_float(
  'target_bits', 4.5, 'Average bits per weight, all metadata counted.'
)
_CHOICES = flags.DEFINE_list(
  'choices',
  ['3g64', '4', '4g64', '5', '6', '8'],
  'What a linear may become: <bits>, a scale per channel, or <bits>g<group>.',
)
_PROBES = flags.DEFINE_list(
  'probes', ['4'], 'The choices at which KL is measured, not inferred.'
)
_SYMMETRIC = flags.DEFINE_bool('symmetric', True, 'Symmetric weights.')
_METHOD = flags.DEFINE_enum('method', 'rtn', _METHODS, 'How it is quantized.')
_SET = flags.DEFINE_multi_string(
  'set', [], 'A field of the method, as in rtn.search=mse.'
)
_UNIT = flags.DEFINE_enum(
  'unit', 'linear', sensitivity.UNITS, 'What is quantized alone.'
)
_IGNORE = flags.DEFINE_multi_string(
  'ignore', [], 'Linears kept float: a name (down_proj) or re:PATTERN.'
)
_DATA = flags.DEFINE_string(
  'data', '', 'As of experiments.calibrate; default: what fits the model.'
)
_SEQUENCES = flags.DEFINE_integer('sequences', 4, 'Of --data.', lower_bound=1)
_LENGTH = flags.DEFINE_integer(
  'sequence_length', 256, 'Tokens of a sequence.', lower_bound=2
)
_BATCH = flags.DEFINE_integer(
  'batch_size', 4, 'Sequences per step.', lower_bound=1
)
_MESH = flags.DEFINE_string(
  'mesh', '', 'Device mesh, as in data:2,model:4. Default: one device.'
)
_MEASURED = flags.DEFINE_string(
  'measured', None, 'A sensitivity.json: search only.'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What sensitivity.json holds.

  settings: how it was measured.
  specs: choice -> what kernels become.
  units: what was measured.
  """

  settings: Mapping[str, Any]
  specs: Mapping[str, spec_lib.QuantSpec]
  units: tuple[sensitivity.Unit, ...]

  def save(self, path: pathlib.Path) -> None:
    """Writes the file."""
    data = {
      'settings': dict(self.settings),
      'specs': {name: spec.to_dict() for name, spec in self.specs.items()},
      'units': [dataclasses.asdict(unit) for unit in self.units],
      # One line per unit and probe, for whoever only wants to look.
      'layers': [
        {'name': unit.name, 'scheme': probe, 'kl': kl}
        for unit in self.units
        for probe, kl in unit.kl.items()
      ],
    }
    results.write_text(path, json.dumps(data, indent=1) + '\n')


def load(path: str) -> Report:
  """Reads a sensitivity.json.

  Raises:
    OSError: it cannot be read.
    ValueError: it is another file.
  """
  try:
    data = json.loads(pathlib.Path(path).read_text('utf-8'))
    return Report(
      settings=data['settings'],
      specs={
        name: spec_lib.QuantSpec.from_dict(fields)
        for name, fields in data['specs'].items()
      },
      units=tuple(
        sensitivity.Unit(**{**unit, 'linears': tuple(unit['linears'])})
        for unit in data['units']
      ),
    )
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f'--measured={path}: {type(e).__name__} {e}; a sensitivity.json of this '
      'program is needed. Measure again.'
    ) from e


def main(argv: Sequence[str]) -> None:
  """Measures, searches, prints and writes."""
  del argv
  report = load(_MEASURED.value) if _MEASURED.value else _measure()
  folder = pathlib.Path(_OUTPUT.value)
  if jax.process_index() == 0:
    report.save(folder / 'sensitivity.json')
  allocation, picks = search(report, _TARGET.value)
  print_report(report, picks)
  if jax.process_index() == 0:
    text = json.dumps(allocation.to_dict(), indent=1) + '\n'
    results.write_text(folder / 'allocation.json', text)
    print(
      f'{allocation.bits:.3f} bits per weight; for experiments.calibrate: '
      f'--bits_from={folder / "allocation.json"}'
    )


def search(
  report: Report, target_bits: float
) -> tuple[mixed.Allocation, dict[str, str]]:
  """The allocation of least summed KL, and {unit name: choice}."""
  names, units = list(report.specs), report.units
  losses = np.array([[u.predicted(c) for c in names] for u in units])
  bits = np.array([[u.size * u.bits.get(c, 0.0) for c in names] for u in units])
  total = sum(u.size for u in units)
  chosen = mixed.allocate(losses, bits, target_bits * total)
  picks = {u.name: names[c] for u, c in zip(units, chosen, strict=True)}
  allocation = mixed.Allocation(
    specs={name: report.specs[name] for name in names},
    linears={name: picks[u.name] for u in units for name in u.linears},
    bits=average_bits(units, picks),
  )
  return allocation, picks


def average_bits(
  units: Sequence[sensitivity.Unit], picks: Mapping[str, str]
) -> float:
  """Bits per weight when each unit takes its choice."""
  bits = sum(u.size * u.bits[picks[u.name]] for u in units)
  return bits / sum(u.size for u in units)


def print_report(report: Report, picks: Mapping[str, str]) -> None:
  """The search beside uniform choices, then the units that hurt most."""
  units = report.units
  uniform = {
    f'all {c}': {u.name: c for u in units}
    for c in report.specs
    if all(c in u.bits for u in units)
  }
  rows = [
    results.Row(
      name=name,
      metrics=(
        results.Metric(name='bits per weight', value=average_bits(units, of)),
        results.Metric(
          name='summed KL',
          value=float(sum(u.predicted(of[u.name]) for u in units)),
          unit='nats/token',
          conventions={'one at a time': True, **report.settings},
        ),
      ),
    )
    for name, of in {**uniform, 'searched': dict(picks)}.items()
  ]
  results.print_table(rows)
  if jax.process_index() == 0:
    probe = report.settings['probes'][0]
    print(f'Most sensitive of {len(units)} at {probe}, and what they take:')
    for u in sorted(units, key=lambda u: -u.predicted(probe))[:_SHOWN]:
      print(f'  {u.name:<36} {u.predicted(probe):.5f}  {picks[u.name]}')


def _measure() -> Report:
  if _MODEL.value is None:
    raise ValueError(
      '--model=None without --measured; give the model to measure, or the '
      'file of an earlier measurement.'
    )
  mesh = mesh_lib.make_mesh(_MESH.value) if _MESH.value else None
  specs = {
    name: mixed.choice(name, symmetric=_SYMMETRIC.value)
    for name in dict.fromkeys(_CHOICES.value)
  }
  config = sensitivity.SensitivityConfig(
    probes=tuple(_PROBES.value),
    unit=_UNIT.value,
    batch_size=min(_BATCH.value, _SEQUENCES.value),
    ignore=tuple(_IGNORE.value),
  )

  def method(weights: spec_lib.QuantSpec):
    scheme = schemes.Scheme(name='sensitivity', weights=weights, inputs=None)
    return recipe.build([_METHOD.value], scheme, _SET.value).transform

  model = models.open_model(_MODEL.value)
  logits = families.of(model).logits
  if logits is None:
    raise NotImplementedError(
      f'--model={_MODEL.value}: sensitivity compares next-token predictions; '
      f'of the family {model.family} there are none. Give a language model or '
      'a Whisper model.'
    )
  choice = families.Choice(
    source=_DATA.value, samples=_SEQUENCES.value, length=_LENGTH.value
  )
  data, description = families.calibration_data(model, choice)
  # Speech comes with the mask of its transcripts; text has no padding.
  mask = data['mask'] if isinstance(data, dict) else None

  def head(outside, x):
    return logits(model.config_of(outside), outside, x)

  num = model.num_blocks
  if config.unit == 'linear':
    num = sum(
      len(model.block_at(i).without(config.ignore, i).linears)
      for i in range(model.num_blocks)
    )
  with tqdm.tqdm(
    total=num, unit=config.unit, disable=jax.process_index() != 0
  ) as bar:

    def on_unit(unit):
      kl = ', '.join(f'{c}: {value:.4f}' for c, value in unit.kl.items())
      bar.set_postfix_str(f'{unit.name} KL {kl}')
      bar.update()

    units = sensitivity.measure(
      model,
      head,
      specs,
      method,
      data,
      config,
      mask=mask,
      mesh=mesh,
      on_unit=on_unit,
    )
  settings = {
    'model': _MODEL.value,
    'data': description,
    'method': _METHOD.value,
    'unit': config.unit,
    'probes': list(config.probes),
  }
  return Report(settings=settings, specs=specs, units=tuple(units))


if __name__ == '__main__':
  cli.run(main)

"""The quality table of the other families, as benchmarks.quality makes it.

  python -m benchmarks.quality_families --work=/tmp/jaxq_quality

minilm-l6 is measured by how far its sentence embeddings move from the float
model's and by what they still find, vit-s14 by its image features and their
nearest neighbours, whisper-base by its transcripts. Writes
docs/quality_families.json and, from it, docs/quality_families.md; rows that are
stored with the same flags are kept.
"""

import json
from collections.abc import Sequence

from absl import flags

from benchmarks import quality
from experiments import cli, results

FLAGS = flags.FLAGS

MODELS = {
  'minilm-l6': ('--model=minilm-l6', '--eval_samples=256'),
  'vit-s14': ('--model=vit-s14', '--eval_samples=256'),
  'whisper-base': (
    '--model=whisper-base',
    '--sequences=8',
    '--batch_size=2',
  ),
}
SETTINGS = {name: quality.SETTINGS[name] for name in ('W8A8', 'W4', 'W3g64')}
METHODS = {
  'RTN': quality.DATA_FREE,
  'GPTQ': quality.GPTQ,
  'AWQ': quality.AWQ,
}
# With searched ranges GPTQ does worse than RTN on Whisper's decoder.
OWN = {('whisper-base', 'GPTQ'): ('--method=gptq',)}
ROWS = tuple(
  (model, setting, method, flags_)
  for model in MODELS
  for setting, method, flags_ in (
    ('W8A8', 'RTN', METHODS['RTN']),
    ('W8A8', 'SmoothQuant', ('--method=smoothquant',)),
    *(
      (setting, method, OWN.get((model, method), flags_))
      for setting in ('W4', 'W3g64')
      for method, flags_ in METHODS.items()
    ),
  )
)
COLUMNS = (
  'cosine to float',
  'retrieval top-1',
  'same best match',
  'rank correlation',
  '1-NN agreement',
  '1-NN same photo',
  'transcript NLL',
  'KL',
  'top-1 agreement',
  'WER',
  'bits per weight',
  'calibration',
  'peak memory',
)


def main(argv: Sequence[str]) -> None:
  """Runs what is missing and writes the page."""
  del argv
  stored = quality.load(FLAGS.store)
  for model, setting, method, extra in ROWS:
    name = f'{model}, {setting}, {method}'
    arguments = [*MODELS[model], *SETTINGS[setting], *extra]
    if FLAGS.only and setting not in FLAGS.only and model not in FLAGS.only:
      continue
    if stored.get(name, {}).get('flags') == arguments and not FLAGS.rerun:
      continue
    stored[name] = {
      'flags': arguments,
      **quality.measure(name, arguments),
    }
    text = json.dumps(stored, indent=1, ensure_ascii=False)
    results.write_text(FLAGS.store, text + '\n')
  results.write_text(FLAGS.page, page(stored))


def page(stored: dict[str, dict]) -> str:
  """docs/quality_families.md from the stored rows: a table per model."""
  parts = [
    '# Quality of encoders and vision transformers\n\n'
    'Made by `python -m benchmarks.quality_families`; do not edit. '
    '"float" is the packaged\nmodel in float32. In brackets: 95 % bootstrap '
    'intervals over samples. Calibration:\n64 passages of 128 tokens or 64 '
    'crops of 224 x 224 pixels, 16 for AWQ; RTN learns\nnothing from data; '
    '16 stretches of speech for Whisper, NLL and KL over the words spoken. '
    'Evaluation text and photos are others than those of the\ncalibration.\n'
  ]
  for model in MODELS:
    names = [
      f'{model}, {setting}, {method}'
      for owner, setting, method, _ in ROWS
      if owner == model
    ]
    found = [name for name in names if name in stored]
    if not found:
      continue
    rows = [stored[found[0]]['float'], *(stored[n]['row'] for n in found)]
    table = results.to_markdown([_row(data, model) for data in rows])
    commands = '\n'.join(
      f'| {name} | `{" ".join(stored[name]["flags"])}` |' for name in found
    )
    runs = ''.join(
      f'- {run}\n' for run in sorted({stored[n]['run'] for n in found})
    )
    parts.append(
      f'## {model}\n\n{table}\n{runs}\n| row | flags |\n|---|---|\n{commands}\n'
    )
  return '\n'.join(parts)


def _row(data: dict, model: str) -> results.Row:
  metrics = {m['name']: results.Metric(**m) for m in data['metrics']}
  return results.Row(
    name=data['name'].removeprefix(f'{model}, '),
    metrics=tuple(metrics[name] for name in COLUMNS if name in metrics),
  )


if __name__ == '__main__':
  FLAGS.set_default('store', 'docs/quality_families.json')
  FLAGS.set_default('page', 'docs/quality_families.md')
  cli.run(main)

"""Local lm-eval tasks made from a text: no network, no hub.

jaxq_choice    which of four passages follows?  (multiple_choice)
jaxq_rolling   log-likelihood of passages       (loglikelihood_rolling)
jaxq_generate  a passage continued greedily     (generate_until)
"""

import json
import pathlib
import unittest
from typing import Any

TASKS = ('jaxq_choice', 'jaxq_generate', 'jaxq_rolling')

_COMMON: dict[str, Any] = {'dataset_path': 'json', 'test_split': 'test'}
_CONFIGS: dict[str, dict[str, Any]] = {
  'jaxq_choice': {
    'output_type': 'multiple_choice',
    'doc_to_text': '{{context}}',
    'doc_to_choice': '{{choices}}',
    'doc_to_target': 'label',
    'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
  },
  'jaxq_rolling': {
    'output_type': 'loglikelihood_rolling',
    'doc_to_text': '',
    'doc_to_target': '{{text}}',
    'metric_list': [
      {'metric': 'word_perplexity'},
      {'metric': 'bits_per_byte'},
    ],
  },
  'jaxq_generate': {
    'output_type': 'generate_until',
    'doc_to_text': '{{context}}',
    'doc_to_target': '{{answer}}',
    'generation_kwargs': {
      'until': ['\n\n', '. '],
      'max_gen_toks': 16,
      'do_sample': False,
    },
    'metric_list': [{'metric': 'exact_match'}],
  },
}


def require() -> None:
  """Skips the tests of a module when lm-eval is not installed."""
  try:
    import lm_eval  # noqa: F401
  except ImportError as e:
    raise unittest.SkipTest(f'lm-eval is not installed: {e}') from e


def write(folder: pathlib.Path, text: str, *, num: int, words: int) -> None:
  """Writes the three tasks and their documents.

  Args:
    folder: where to.
    text: cut into passages of `words` words and the half as many behind them.
    num: documents of the first task; the others have half as many.
    words: of a context.
  """
  parts, each = text.split(), words + words // 2
  passages = [
    (' '.join(a[:words]), ' ' + ' '.join(a[words:]))
    for a in (parts[i * each : (i + 1) * each] for i in range(num))
  ]
  choices = []
  for i, (context, _) in enumerate(passages):
    others = [passages[(i + k) % num][1] for k in range(4)]
    label = i % 4
    others[0], others[label] = others[label], others[0]
    choices.append({'context': context, 'choices': others, 'label': label})
  half = passages[: num // 2]
  documents = {
    'jaxq_choice': choices,
    'jaxq_rolling': [{'text': a + b} for a, b in half],
    'jaxq_generate': [{'context': a, 'answer': b} for a, b in half],
  }
  for task, rows in documents.items():
    data = folder / f'{task}.jsonl'
    data.write_text('\n'.join(map(json.dumps, rows)) + '\n', 'utf-8')
    config = {
      'task': task,
      **_COMMON,
      **_CONFIGS[task],
      'dataset_kwargs': {'data_files': {'test': str(data)}},
      'metadata': {'version': 1.0},
    }
    # JSON is YAML.
    (folder / f'{task}.yaml').write_text(json.dumps(config), 'utf-8')


def evaluate(model: Any, folder: pathlib.Path) -> dict[str, Any]:
  """lm-eval's results and samples of the three tasks."""
  from lm_eval import evaluator, tasks

  out = evaluator.simple_evaluate(
    model=model,
    tasks=list(TASKS),
    task_manager=tasks.TaskManager(
      include_path=str(folder), include_defaults=False
    ),
    log_samples=True,
    bootstrap_iters=0,
  )
  return {'results': out['results'], 'samples': out['samples']}

"""GPTQ W4 g64 on SmolLM2-135M: ours beside llm-compressor's, on one CPU.

Both calibrate on the same 64 x 512 tokens and are evaluated on the same
windows, one after the other, each in a fresh process with its own environment
(benchmarks/README.md says how to make the peer's):

  python -m benchmarks.gptq_speed --peer_python=.venv-peer/bin/python

Prints seconds, peak memory and perplexity of both. "calibration" is the peer's
`oneshot` and the sum of our blocks, each from its observers to its checkpoint
on disk; "process" adds imports and loading, and on our side the first and last
steps of saving, where the peer saves nothing.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from experiments import cli, results

FLAGS = flags.FLAGS
flags.DEFINE_string('peer_python', None, "Interpreter of the peer's venv.")
flags.DEFINE_string('work', '/tmp/jaxq_gptq_speed', 'Where both sides write.')
flags.DEFINE_string('peer_scheme', 'gptq_w4g64', "The peer's scheme.")
flags.DEFINE_list('peer_flags', [], 'More flags for the peer.')
flags.DEFINE_string(
  'flagfile_ours',
  'experiments/flags/smollm2_w4a16_gptq.flags',
  'Flagfile of our run.',
)
flags.DEFINE_string('output_json', None, 'Where to write the results.')
flags.mark_flag_as_required('peer_python')


def main(argv: Sequence[str]) -> None:
  """Runs both sides and prints the table."""
  del argv
  work = pathlib.Path(FLAGS.work)
  inputs = work / 'inputs'
  if not (inputs / 'tokens.npz').exists():
    _run([sys.executable, '-m', 'benchmarks.export_peer_inputs',
          f'--output_dir={inputs}'])  # fmt: skip
  peer_json = work / f'{FLAGS.peer_scheme}.json'
  _run([FLAGS.peer_python, 'benchmarks/peer_llmcompressor.py',
        f'--model_dir={inputs / "model"}', f'--tokens={inputs / "tokens.npz"}',
        f'--scheme={FLAGS.peer_scheme}', f'--output={peer_json}',
        *FLAGS.peer_flags])  # fmt: skip
  peer = json.loads(peer_json.read_text())
  output = work / 'ours'
  _run(['rm', '-rf', str(output), f'{output}.run'])
  calibrate = [sys.executable, '-m', 'experiments.calibrate']
  shared = [f'--flagfile={FLAGS.flagfile_ours}', f'--output={output}']
  start = time.perf_counter()
  child = subprocess.Popen([*calibrate, *shared, '--noevaluate'])
  _, status, usage = os.wait4(child.pid, 0)
  seconds = time.perf_counter() - start
  if status:
    raise ValueError('our run failed; its own message is above.')
  peak = usage.ru_maxrss * 1024 / 1e6
  _run([*calibrate, *shared])  # Complete already: only evaluates.
  measured = results.load(f'{output}.run/results.json').rows[-1]
  conventions = measured['token perplexity'].conventions
  metric = results.Metric
  log = pathlib.Path(f'{output}.run/blocks.jsonl').read_text()
  calibration = sum(json.loads(line)['seconds'] for line in log.splitlines())

  def seconds_of(calibration, process):
    return (
      metric(name='calibration', value=calibration, unit='s'),
      metric(name='process', value=process, unit='s'),
    )

  rows = (
    results.Row(
      name='llm-compressor ' + peer['versions'].get('llmcompressor', ''),
      metrics=(
        *seconds_of(peer['seconds'], peer['process_seconds']),
        metric(name='peak RSS', value=peer['peak_rss_mb'], unit='MB'),
        metric(name='token perplexity', value=peer['perplexity']),
      ),
    ),
    results.Row(
      name='jaxq',
      metrics=(
        *seconds_of(calibration, seconds),
        metric(name='peak RSS', value=peak, unit='MB'),
        metric(
          name='token perplexity',
          value=measured['token perplexity'].value,
          conventions=conventions,
        ),
        metric(name='calibration ratio', value=calibration / peer['seconds']),
        metric(name='process ratio', value=seconds / peer['process_seconds']),
      ),
    ),
  )
  results.print_table(rows)
  run = results.run_info(cli.resolved_flags())
  path = FLAGS.output_json or str(work / 'gptq_speed.json')
  results.save(path, results.Result(run=run, rows=rows))


def _run(command: Sequence[str]) -> None:
  print('$', ' '.join(map(str, command)), file=sys.stderr, flush=True)
  subprocess.run(list(map(str, command)), check=True, env=os.environ)


if __name__ == '__main__':
  cli.run(main)

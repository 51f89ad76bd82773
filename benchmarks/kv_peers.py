r"""Our caches beside transformers' QuantizedCache: the same text and windows.

  python -m benchmarks.export_peer_inputs --output_dir=/tmp/peer
  python -m benchmarks.kv_peers --model_dir=/tmp/peer/model \
      --peer_tokens=/tmp/peer/tokens.npz --root=/tmp/peer \
      --peer_python=.venv-peer/bin/python

The peer runs in its own interpreter (benchmarks/kv_peer.py), which needs torch,
transformers and optimum-quanto. Both sides read the same weights and windows in
float32, in chunks of 128 tokens, and time a decoding step behind a window, one
after the other on the same machine. Settings with about as many bits stand
together. What either side has measured already is kept (--rerun).
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import models
from benchmarks import kv_quality
from experiments import adapters, cli, generation, results
from jaxq.eval import perplexity
from jaxq.kvcache import interface, registry
from models import decoder

FLAGS = flags.FLAGS
flags.DEFINE_string('model_dir', None, 'Float Hugging Face directory.')
flags.DEFINE_string('root', None, 'Where results go.')
flags.DEFINE_string(
  'peer_tokens', None, '.npz with `evaluation`, or .npy, (windows, T).'
)
flags.DEFINE_string(
  'peer_python', None, 'Interpreter of the peer; none: ours alone.'
)
flags.mark_flags_as_required(['model_dir', 'root', 'peer_tokens'])

# (ours, the peer's nbits,axis_key,axis_value,group_size), about equal bits.
PAIRS = (
  (('contiguous',), ('float',)),
  (
    ('int4:group_size=32', 'kivi:bits=4', 'oscar:bits=4'),
    ('4,0,0,32',),
  ),
  (
    ('int4', 'kivi:bits=4,group_size=64', 'oscar:bits=4,group_size=64'),
    ('4,0,0,64',),
  ),
  (
    ('int2:group_size=32', 'kivi', 'oscar'),
    ('2,0,0,32', '2,-1,0,32'),
  ),
  (
    ('int2', 'kivi:group_size=64', 'oscar:group_size=64'),
    ('2,0,0,64', '2,-1,0,64'),
  ),
)


def main(argv: Sequence[str]) -> None:
  """Measures both sides and prints the table."""
  del argv
  tokens = np.load(FLAGS.peer_tokens)
  if not isinstance(tokens, np.ndarray):
    tokens = tokens['evaluation']
  root = pathlib.Path(FLAGS.root)
  theirs = _peer(root, tokens)
  ours = _ours(root, tokens)
  print('| | bits | perplexity | ms a step |\n|---|---:|---:|---:|')
  for mine, peers in PAIRS:
    for text in peers:
      if text in theirs:
        _print(f'transformers {text}', theirs[text])
    for text in mine:
      _print(f'jaxq {text}', ours[text])


def _print(name: str, row: dict[str, Any]) -> None:
  print(
    f'| {name} | {row["bits"]:.2f} | {row["perplexity"]:.2f} | '
    f'{row["ms"]:.0f} |',
    flush=True,
  )


def _peer(root: pathlib.Path, tokens: np.ndarray) -> dict[str, Any]:
  """The peer's rows; those of an earlier run where there is no interpreter."""
  output = root / 'kv_peer.json'
  if FLAGS.peer_python and (FLAGS.rerun or not output.exists()):
    plain = root / 'kv_tokens.npy'
    np.save(plain, tokens)
    settings = dict.fromkeys(text for _, peers in PAIRS for text in peers)
    subprocess.run(
      [
        FLAGS.peer_python,
        str(pathlib.Path(__file__).with_name('kv_peer.py')),
        f'--model_dir={FLAGS.model_dir}',
        f'--tokens={plain}',
        f'--output={output}',
        f'--settings={";".join(settings)}',
        f'--chunk={FLAGS.chunk}',
      ],
      check=True,
      stdout=sys.stderr,
    )
  return json.loads(output.read_text())['rows'] if output.exists() else {}


def _ours(root: pathlib.Path, tokens: np.ndarray) -> dict[str, Any]:
  """Our rows, stored as each is done."""
  output = root / 'kv_ours.json'
  rows = {}
  if output.exists() and not FLAGS.rerun:
    rows = json.loads(output.read_text())
  model = models.load(FLAGS.model_dir)
  for text in dict.fromkeys(text for mine, _ in PAIRS for text in mine):
    if text in rows:
      continue
    config = registry.parse(text)
    variables = generation.prepared(model, config)
    nll = perplexity.token_nll(
      adapters.cached_scorer(model.module, config, FLAGS.chunk),
      variables,
      tokens.astype(np.int32),
    )
    mean = float(nll.mean(dtype=np.float64))
    rows[text] = {
      'nll': mean,
      'perplexity': float(np.exp(mean)),
      'bits': _bits(model, config, tokens.shape[1]),
      'ms': kv_quality.step_ms(model, variables, config, tokens),
    }
    results.write_text(output, json.dumps(rows, indent=1) + '\n')
  return rows


def _bits(
  model: models.Model, config: interface.CacheConfig, window: int
) -> float:
  """Stored bits per element, less the newest tokens, as the peer's are."""
  caches = jax.eval_shape(
    lambda: decoder.init_caches(
      model.config, model.module.runs, 1, window, jnp.float32, config
    )
  )
  layers = sum(cache.length.size for cache in caches)
  total = sum(
    interface.stored_bits_per_element(cache) * cache.length.size
    for cache in caches
  )
  return total / layers


if __name__ == '__main__':
  cli.run(main)

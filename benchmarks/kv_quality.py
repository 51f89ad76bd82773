"""The table of caches on SmolLM2-135M, by one command.

  python -m benchmarks.kv_quality

Every cache reads the same windows of the evaluation articles in chunks of 128
tokens, which is what the block caches do token by token when they generate
(experiments.adapters.cached_scorer): a token sees its own chunk in full
precision and all before as it is stored. One pass without a cache is the
reference. Beside the perplexity stand the bits that were really spent, and how
unlike the norms of the keys are that share a group, which is what OScaR mends.

Rows stored with the same settings are not run again (`--rerun` does), so the
command can be interrupted. Writes docs/kv_cache.json and, from it,
docs/kv_cache.md.
"""

import dataclasses
import json
import pathlib
import statistics
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import models
from experiments import adapters, cli, evaluation, generation, results
from jaxq.eval import bootstrap, perplexity
from jaxq.kvcache import interface, oscar, registry
from models import decoder

FLAGS = flags.FLAGS
flags.DEFINE_string('model', 'smollm2-135m', 'What reads.')
flags.DEFINE_string('data', 'wiki-sample:evaluation', 'What is read.')
flags.DEFINE_integer('window', 2048, 'Tokens of a window.', lower_bound=2)
flags.DEFINE_integer('tokens', 8192, 'Tokens in all.', lower_bound=2)
flags.DEFINE_integer('chunk', 128, 'Tokens read at a time.', lower_bound=1)
flags.DEFINE_integer(
  'steps', 16, 'Decoding steps to time behind a full window; 0: none.'
)
flags.DEFINE_string('store', 'docs/kv_cache.json', 'The stored results.')
flags.DEFINE_string('page', 'docs/kv_cache.md', 'The page made from them.')
flags.DEFINE_list('only', [], 'Groups to run, such as "2 bits"; default all.')
flags.DEFINE_bool('rerun', False, 'Run rows that are stored already.')

# Groups of about equal bits: compare within them, by the column of bits.
ROWS = {
  '16 bits': ('contiguous', 'paged'),
  '8 bits': ('int8', 'fp8', 'fp8:k_dtype=e5m2,v_dtype=e5m2'),
  '4 bits': (
    'int4',
    'int4:group_size=32',
    'turboquant',
    'kivi:bits=4',
    'kivi:bits=4,group_size=64',
    'oscar:bits=4',
    'zipcache:bits=8,low_bits=2',
    'zipcache:bits=4,low_bits=4',
  ),
  '3 bits': (
    'turboquant:bits=3',
    'turboquant:bits=3,seed=1',
    'turboquant:bits=3,seed=2',
    'zipcache',
    'zipcache:denominator=none',
    'zipcache:split=random',
    'zipcache:split=random,seed=1',
    'zipcache:split=random,seed=2',
    'zipcache:separate=false',
  ),
  '2 bits': (
    'int2',
    'int2:group_size=32',
    'turboquant:bits=2',
    'turboquant:bits=2,seed=1',
    'turboquant:bits=2,seed=2',
    'zipcache:bits=2',
    'kivi',
    'kivi:group_size=64',
    'kivi:mode=integer',
    'kivi:mode=integer,rotate=true',
    'kivi:mode=integer,token_scale=true',
    'kivi:mode=integer,rotate=true,token_scale=true',
    'oscar',
    'oscar:norm_scope=head',
    'oscar:mode=minimum',
    'oscar:group_size=64',
  ),
}
_SETTINGS = ('model', 'data', 'window', 'tokens', 'chunk')


def main(argv: Sequence[str]) -> None:
  """Runs what is missing and writes the page."""
  del argv
  stored = load(FLAGS.store)
  settings = {name: FLAGS[name].value for name in _SETTINGS}
  if stored.get('settings') != settings:
    stored = {'settings': settings, 'rows': {}}
  unknown = sorted(set(FLAGS.only) - set(ROWS))
  if unknown:
    raise ValueError(f'--only={unknown}; allowed {sorted(ROWS)}.')
  missing = [
    text
    for group, texts in ROWS.items()
    for text in texts
    if (not FLAGS.only or group in FLAGS.only)
    and (FLAGS.rerun or text not in stored['rows'])
  ]
  if missing:
    run(stored, missing)
  results.write_text(FLAGS.page, page(stored))


def run(stored: dict[str, Any], texts: Sequence[str]) -> None:
  """Measures caches and stores each as it is done."""
  model = models.load(FLAGS.model)
  windows = evaluation.load_windows(
    model, source=FLAGS.data, window=FLAGS.window, tokens=FLAGS.tokens
  )
  scorer = adapters.scorer(model.module)
  reference = perplexity.token_nll(scorer, model.variables, windows.tokens)
  stored['float'] = float(np.exp(reference.mean(dtype=np.float64)))
  stored['run'] = f'JAX {jax.__version__}, {jax.devices()[0].device_kind}'
  stored['text'] = windows.description
  stored['imbalance'] = imbalance(model, windows.tokens[:1])
  print(f'float: {stored["float"]:.3f}', flush=True)
  for text in texts:
    stored['rows'][text] = row = measure(model, windows, reference, text)
    summary = ', '.join(f'{name} {value}' for name, value in row.items())
    print(f'{text}: {summary}', flush=True)
    body = json.dumps(stored, indent=1, ensure_ascii=False)
    results.write_text(FLAGS.store, body + '\n')


def measure(
  model: models.Model, windows: Any, reference: np.ndarray, text: str
) -> dict[str, Any]:
  """What is stored of one cache."""
  config = registry.parse(text)
  variables = generation.prepared(model, config)
  scorer = adapters.cached_scorer(model.module, config, FLAGS.chunk)
  start = time.monotonic()
  nll = perplexity.token_nll(scorer, variables, windows.tokens)
  seconds = time.monotonic() - start
  ratio = bootstrap.interval(
    lambda a, b: np.exp(b - a),
    reference,
    nll,
    config=bootstrap.BootstrapConfig(),
  )
  cache = jax.eval_shape(lambda: config.init(_shape(model)))
  row = {
    'nll': round(float(nll.mean(dtype=np.float64)), 5),
    'perplexity': round(float(np.exp(nll.mean(dtype=np.float64))), 3),
    'ratio': [round(x, 4) for x in (ratio.value, ratio.low, ratio.high)],
    'stored bits': round(interface.stored_bits_per_element(cache), 3),
    'all bits': round(interface.bits_per_element(cache), 3),
    'seconds': round(seconds, 1),
  }
  if FLAGS.steps:
    row['ms'] = round(step_ms(model, variables, config, windows.tokens), 1)
  return row


def imbalance(model: models.Model, tokens: np.ndarray) -> list[dict]:
  """Of each layer, how unlike the norms of the keys of a group of 32 are."""
  T = tokens.shape[1] // 32 * 32
  config = model.config
  caches = decoder.init_caches(config, model.module.runs, 1, T)
  _, caches = jax.jit(model.module.apply, static_argnames='method')(
    model.variables,
    jnp.asarray(tokens[:, :T]),
    jnp.arange(T, dtype=jnp.int32)[None],
    caches,
    method='hidden',
  )
  rows = []
  for cache in caches:
    for k in cache.k:  # (B, T, Hkv, D)
      found = [np.asarray(a) for a in oscar.norm_imbalance(k)]
      heads = [
        np.asarray(oscar.norm_imbalance(k[:, :, h : h + 1])[0])
        for h in range(k.shape[2])
      ]
      rows.append(
        {
          'median': round(float(np.median(found[0])), 3),
          'largest': round(float(found[0].max()), 3),
          'above median': round(float(found[1].max()), 3),
          'one head, median': round(float(np.median(heads)), 3),
          'one head, largest': round(float(np.max(heads)), 3),
        }
      )
  return rows


def step_ms(
  model: models.Model, variables: Any, config: Any, tokens: np.ndarray
) -> float:
  """Median milliseconds of a decoding step behind a window, batch 1."""
  lm = adapters.language_model(model.module, config)
  steps = FLAGS.steps
  room = FLAGS.window - steps - 1
  chunk = FLAGS.chunk
  caches = lm.init_caches(1, FLAGS.window)

  def forward(variables, own, positions, caches):
    x, caches = lm.forward(variables, own, positions, caches)
    return lm.head(variables, x[:, -1]), caches

  run = jax.jit(forward, donate_argnums=3)
  own = jnp.asarray(tokens[:1], jnp.int32)
  for start in range(0, room // chunk * chunk, chunk):
    positions = start + jnp.arange(chunk, dtype=jnp.int32)[None]
    _, caches = run(variables, own[:, start : start + chunk], positions, caches)
  times = []
  for i in range(steps):
    at = jnp.full((1, 1), room // chunk * chunk + i, jnp.int32)
    begin = time.monotonic()
    logits, caches = run(variables, own[:, i : i + 1], at, caches)
    jax.block_until_ready(logits)
    times.append(1e3 * (time.monotonic() - begin))
  return statistics.median(times[1:])  # The first one compiles.


def page(stored: dict[str, Any]) -> str:
  """docs/kv_cache.md from the stored rows."""
  settings = stored['settings']
  quality = (
    f'{settings["model"]}, {stored.get("text", "")}, float32 activations, '
    f'read in chunks of {settings["chunk"]} tokens: a token sees its own chunk '
    'as it is and all before as the cache holds it. Without a cache: '
    f'{stored.get("float", 0):.2f}. In brackets: paired 95 % bootstrap '
    'intervals over blocks of 128 tokens, which hold for these articles. '
    '"Stored" are the bits of a key or value element with scales, norms and '
    'all else; "all" adds the newest tokens that are kept in full precision, '
    f'in bfloat16, in a cache of {settings["window"]} tokens. Compare at equal '
    'bits. Milliseconds are of a decoding step of the plain JAX form behind a '
    'window, batch 1, on a machine that did other work as well.'
  )
  norms = (
    'Largest / smallest norm of the 32 consecutive keys that share a scale, in '
    'the first window: of all heads together, and of one head.'
  )
  lines = [
    '# Key/value caches',
    '',
    'Made by `python -m benchmarks.kv_quality`; do not edit.',
    '',
    '`--kv_cache=NAME` or `--kv_cache=NAME:field=value,field=value` chooses',
    'the cache of `experiments.generate` and `experiments.evaluate`:',
    '',
    *_members(),
    '',
  ]
  if not stored['rows']:
    return '\n'.join([*lines, 'Quality: not measured yet.', ''])
  lines += [
    '## Quality',
    '',
    textwrap.fill(quality, 80),
    '',
    '| | stored bits | all bits | token perplexity | ratio to float | ms |',
    '|---|---:|---:|---:|---:|---:|',
  ]
  for group, texts in ROWS.items():
    found = [text for text in texts if text in stored['rows']]
    if found:
      lines.append(f'| **{group}** | | | | | |')
    lines += [_line(text, stored['rows'][text]) for text in found]
  lines += [
    '',
    '## Token norm imbalance',
    '',
    textwrap.fill(norms, 80),
    '',
    '| layer | median | largest | largest / median norm | one head, median | '
    'one head, largest |',
    '|---:|---:|---:|---:|---:|---:|',
  ]
  for i, row in enumerate(stored.get('imbalance', [])):
    lines.append(
      f'| {i} | ' + ' | '.join(f'{value:.2f}' for value in row.values()) + ' |'
    )
  lines += ['', f'- {stored.get("run", "")}', '']
  return '\n'.join(lines)


def _line(text: str, row: dict[str, Any]) -> str:
  value, low, high = row['ratio']
  ratio = f'{value:.3f} [{low:.3f}, {high:.3f}]'
  return (
    f'| `{text}` | {row["stored bits"]:.2f} | {row["all bits"]:.2f} | '
    f'{row["perplexity"]:.2f} | {ratio} | {row.get("ms", "")} |'
  )


def _members() -> list[str]:
  """A table of the caches and their fields."""
  lines = ['| name | fields and defaults |', '|---|---|']
  for name, config in registry.CACHES.items():
    made: Any = config
    fields = ', '.join(
      f'`{field.name}={getattr(made, field.name)}`'
      for field in dataclasses.fields(made)
    )
    lines.append(f'| `{name}` | {fields} |')
  return lines


def _shape(model: models.Model) -> interface.CacheShape:
  config = model.config
  return interface.CacheShape(
    batch=1,
    capacity=FLAGS.window,
    kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    dtype=jnp.bfloat16,
  )


def load(path: str) -> dict[str, Any]:
  """What is stored; nothing where there is no file yet."""
  file = pathlib.Path(path)
  return json.loads(file.read_text()) if file.exists() else {}


if __name__ == '__main__':
  cli.run(main)

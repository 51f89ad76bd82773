"""The tables of caches on SmolLM2-135M, by one command, in pieces.

  python -m benchmarks.kv_quality
  python -m benchmarks.kv_quality --window=4096 --only='16 bits,4 bits'

A piece is one measurement of one cache, at most a few minutes of one core; what
is stored with the same settings is not run again (`--rerun` does), so that the
command can be stopped at any time, or stops by itself after `--minutes`.

  nll      perplexity of the evaluation articles, read in chunks of 128 tokens
           (experiments.adapters.cached_scorer): a token sees its own chunk in
           full precision and all before as the cache holds it. One pass
           without a cache is the reference.
  passkey  a five-digit number in a text that says nothing (jaxq.eval.passkey),
           asked for behind a context that was read, and compressed, without
           the question, as kvpress does it; unlike there, the question ends
           with the space before the number (docs/notes.md).
  asked    the same with the question in sight.
  beyond   the same in a text longer than the model was trained for.
  step     milliseconds of a decoding step behind a full window; on a machine
           that does nothing else.

Beside stand the bytes that the caches of all layers really take. Groups are of
about equal bytes; controls (random selection, random splits, random channels)
stand in the group of what they are compared with, with three seeds. Writes
docs/kv_cache.json and, from it, docs/kv_cache.md; several processes with groups
of their own (`--only`) may write to one store.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import models
from benchmarks import kv_page, kv_retrieval
from experiments import (
  adapters,
  cli,
  evaluation,
  generation,
  label_statistics,
  results,
)
from jaxq.data import pipeline
from jaxq.eval import bootstrap, perplexity
from jaxq.kvcache import interface, label_channels, oscar, registry
from models import decoder

FLAGS = flags.FLAGS
flags.DEFINE_string('model', 'smollm2-135m', 'What reads.')
flags.DEFINE_string('data', 'wiki-sample:evaluation', 'What is read.')
flags.DEFINE_integer('window', 2048, 'Tokens of a window.', lower_bound=2)
flags.DEFINE_integer('tokens', 8192, 'Tokens in all.', lower_bound=2)
flags.DEFINE_integer('chunk', 128, 'Tokens read at a time.', lower_bound=1)
flags.DEFINE_integer(
  'steps', 16, 'Decoding steps that the piece step times.', lower_bound=2
)
flags.DEFINE_integer(
  'passkey', 1024, 'Tokens of a text with a number in it.', lower_bound=128
)
flags.DEFINE_integer('trials', 2, 'Numbers per depth.', lower_bound=1)
flags.DEFINE_integer(
  'beyond', 12288, 'Tokens of a text that is too long.', lower_bound=128
)
flags.DEFINE_string('store', 'docs/kv_cache.json', 'The stored results.')
flags.DEFINE_string('page', 'docs/kv_cache.md', 'The page made from them.')
flags.DEFINE_string(
  'channels',
  'docs/kv_label_channels.json',
  'Label channels of the model; made where they are not there.',
)
flags.DEFINE_list('only', [], 'Groups to run, such as "2 bits"; default all.')
flags.DEFINE_list('pieces', ['nll', 'passkey'], 'What to measure.')
flags.DEFINE_float('minutes', 1e9, 'After so many no piece is begun.')
flags.DEFINE_bool('rerun', False, 'Run pieces that are stored already.')

_TABLES = ('windows', 'passkey', 'asked', 'beyond')
PIECES = ('asked', 'beyond', 'nll', 'passkey', 'step')


def _evicting(ratio: float, *more: str) -> tuple[str, ...]:
  """Every policy at one ratio, with the controls."""
  return (
    *(
      f'evict:policy={policy},ratio={ratio}'
      for policy in ('streaming', 'knorm', 'h2o', 'snapkv', 'expected')
    ),
    f'evict:policy=snapkv,ratio={ratio},head_budgets=true',
    *(
      f'evict:policy=random,ratio={ratio}' + f',seed={seed}' * bool(seed)
      for seed in range(3)
    ),
    *more,
  )


def _sparse(budget: int) -> tuple[str, ...]:
  """What reads so many tokens of a step's past and keeps all."""
  labels = f'double_sparsity:heavy_tokens={budget},dense_prefill=false'
  local = budget // 2
  return (
    f'quest:budget={budget},dense_prefill=false',
    f'{labels},channels=CALIBRATED',
    *(f'{labels},channels=random,seed={seed}' for seed in range(3)),
    f'tokenselect:budget={budget},sinks=4,local=128,chunk=128',
    f'evict:policy=streaming,budget={local + budget}',
    f'evict:policy=h2o,budget={local + budget}',
  )


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
ROWS['half of the tokens (8 bits)'] = _evicting(0.5, 'int8')
ROWS['a quarter (4 bits)'] = _evicting(
  0.25, 'int4', 'evict:policy=snapkv,ratio=0.5,inner=int8'
)
ROWS['an eighth (2 bits)'] = _evicting(
  0.125, 'oscar', 'evict:policy=snapkv,ratio=0.5,inner=int4'
)
ROWS['reads 256 tokens'] = _sparse(256)
ROWS['reads 128 tokens'] = _sparse(128)
ROWS['beyond'] = (
  'contiguous',
  'tokenselect:budget=512,sinks=4,local=256,chunk=256',
  'evict:policy=streaming,budget=1024,reposition=true',
)


def _deciding(shares: str, *more: str) -> tuple[str, ...]:
  """Don't Waste Bits at these shares of classes, with the controls."""
  name = f'dont_waste_bits:shares={shares}'
  return (
    name,
    f'{name},variance=false',
    f'{name},controller=position',
    *(f'{name},controller=random,seed={seed}' for seed in range(3)),
    *more,
  )


ROWS['bits by token (5.3 and scales)'] = _deciding(
  '0.35/0.35/0.2/0.1', 'int4:group_size=32', 'zipcache:bits=8,low_bits=2'
)
ROWS['bits by token (2.6 and scales)'] = _deciding(
  '0.7/0.3/0/0', 'zipcache', 'turboquant:bits=3', 'int2'
)
_SETTINGS = ('model', 'data', 'tokens', 'chunk', 'passkey', 'trials')


def main(argv: Sequence[str]) -> None:
  """Runs what is missing and writes the page."""
  del argv
  for name, given, allowed in (
    ('only', FLAGS.only, ROWS),
    ('pieces', FLAGS.pieces, PIECES),
  ):
    unknown = sorted(set(given) - set(allowed))
    if unknown:
      raise ValueError(f'--{name}={unknown}; allowed {sorted(allowed)}.')
  stored = load(FLAGS.store)
  settings = {name: FLAGS[name].value for name in _SETTINGS}
  if stored and stored['settings'] != settings and not FLAGS.rerun:
    raise ValueError(
      f'--store={FLAGS.store} was measured with {stored["settings"]}; asked '
      f'for are {settings}. Give another --store, or --rerun to replace it.'
    )
  if not stored or stored['settings'] != settings:
    _write({'settings': settings, **{kind: {} for kind in _TABLES}})
  wanted = list(_wanted())
  if FLAGS.rerun or any(not _has(load(FLAGS.store), *one) for one in wanted):
    run(wanted)
  results.write_text(FLAGS.page, kv_page.page(load(FLAGS.store), ROWS))


def _wanted() -> Iterator[tuple[str, str]]:
  """The pieces (kind, cache) that were asked for, in order, each once."""
  seen = set()
  for group, texts in ROWS.items():
    if FLAGS.only and group not in FLAGS.only:
      continue
    for kind in FLAGS.pieces:
      if (group == 'beyond') != (kind == 'beyond'):
        continue
      for text in texts:
        if (kind, text) not in seen:  # A cache may stand in several groups.
          seen.add((kind, text))
          yield kind, text


def _rows(stored: dict[str, Any], kind: str) -> dict[str, Any]:
  """{cache: row} of a kind; those of two kinds are kept by window."""
  if kind not in ('nll', 'step'):
    return stored[kind]
  rows = 'rows' if kind == 'nll' else 'steps'
  table = stored['windows'].setdefault(str(FLAGS.window), {})
  return table.setdefault(rows, {})


def _has(stored: dict[str, Any], kind: str, text: str) -> bool:
  return text in _rows(stored, kind)


def _write(stored: dict[str, Any]) -> None:
  body = json.dumps(stored, indent=1, ensure_ascii=False)
  results.write_text(FLAGS.store, body + '\n')


def run(wanted: Sequence[tuple[str, str]]) -> None:
  """Measures what is missing and stores each piece as it is done."""
  begin = time.monotonic()
  model = models.load(FLAGS.model)
  windows, reference = _reference(model)
  for kind, text in wanted:
    if not FLAGS.rerun and _has(load(FLAGS.store), kind, text):
      continue
    if time.monotonic() - begin > 60 * FLAGS.minutes:
      print('out of time; the same command goes on', flush=True)
      break
    start = time.monotonic()
    config = _config(text, model)
    if kind == 'nll':
      row = measure(model, windows, reference, config)
    elif kind == 'step':
      row = {'ms': round(step_ms(model, config, windows.tokens), 1)}
    elif kind == 'beyond':
      row = _beyond(model, config)
    else:
      row = kv_retrieval.retrieval(
        model,
        config,
        FLAGS.passkey,
        asked=kind == 'asked',
        trials=FLAGS.trials,
      )
    row['seconds'] = round(time.monotonic() - start, 1)
    summary = ', '.join(f'{name} {value}' for name, value in row.items())
    print(f'{kind} {text}: {summary}', flush=True)
    stored = load(FLAGS.store)  # Another process may have written meanwhile.
    _rows(stored, kind)[text] = row
    _write(stored)


def _config(text: str, model: models.Model) -> interface.CacheConfig:
  """The cache; its label channels are calibrated where they are missing."""
  if 'CALIBRATED' not in text:
    return registry.parse(text)
  if not pathlib.Path(FLAGS.channels).exists():
    config = pipeline.DataConfig(num_sequences=16, sequence_length=512)
    tokens = pipeline.calibration_tokens(config, model.tokenizer)
    found = label_statistics.statistics(
      models.open_model(FLAGS.model), tokens, stat='qk', batch_size=4
    )
    settings = {'model': FLAGS.model, 'stat': 'qk', 'tokens': int(tokens.size)}
    label_channels.save(FLAGS.channels, found, settings)
  return registry.parse(text.replace('CALIBRATED', FLAGS.channels))


def _reference(model: models.Model) -> tuple[Any, np.ndarray]:
  """The windows and what the model makes of them without a cache."""
  windows = evaluation.load_windows(
    model, source=FLAGS.data, window=FLAGS.window, tokens=FLAGS.tokens
  )
  scorer = adapters.scorer(model.module)
  reference = perplexity.token_nll(scorer, model.variables, windows.tokens)
  found = imbalance(model, windows.tokens[:1])
  stored = load(FLAGS.store)
  stored['run'] = f'JAX {jax.__version__}, {jax.devices()[0].device_kind}'
  stored['imbalance'] = found
  table = stored['windows'].setdefault(str(FLAGS.window), {})
  table['float'] = float(np.exp(reference.mean(dtype=np.float64)))
  table['text'] = windows.description
  _write(stored)
  worst = max(row['largest'] for row in found)
  print(f'float: {table["float"]:.3f}; norms apart: {worst}', flush=True)
  return windows, reference


def measure(
  model: models.Model,
  windows: Any,
  reference: np.ndarray,
  config: interface.CacheConfig,
) -> dict[str, Any]:
  """Perplexity and bytes of one cache."""
  variables = generation.prepared(model, config)
  scorer = adapters.cached_scorer(model.module, config, FLAGS.chunk)
  nll = perplexity.token_nll(scorer, variables, windows.tokens)
  ratio = bootstrap.interval(
    lambda a, b: np.exp(b - a),
    reference,
    nll,
    config=bootstrap.BootstrapConfig(),
  )
  return {
    'nll': round(float(nll.mean(dtype=np.float64)), 5),
    'perplexity': round(float(np.exp(nll.mean(dtype=np.float64))), 3),
    'ratio': [round(x, 4) for x in (ratio.value, ratio.low, ratio.high)],
    **_bytes(model, config),
  }


def _bytes(
  model: models.Model, config: interface.CacheConfig
) -> dict[str, Any]:
  """Of the caches of all layers, one row of a window, floats in bfloat16."""
  caches = jax.eval_shape(
    lambda: decoder.init_caches(
      model.config, model.module.runs, 1, FLAGS.window, jnp.bfloat16, config
    )
  )
  leaves = jax.tree.leaves(caches)
  total = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in leaves)
  c = model.config
  elements = 2 * c.num_layers * FLAGS.window * c.num_kv_heads * c.head_dim
  stored = sum(
    interface.stored_bits_per_element(cache) * cache.length.size
    for cache in caches
  )
  return {
    'stored bits': round(stored / c.num_layers, 3),
    'all bits': round(8 * total / elements, 3),
    'bytes': total,
  }


def _beyond(
  model: models.Model, config: interface.CacheConfig
) -> dict[str, Any]:
  """Of one number in the middle of a text that is too long."""
  return kv_retrieval.retrieval(
    model, config, FLAGS.beyond, asked=True, depths=(0.5,), trials=1
  )


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
  model: models.Model, config: interface.CacheConfig, tokens: np.ndarray
) -> float:
  """Median milliseconds of a decoding step behind a window, batch 1."""
  variables = generation.prepared(model, config)
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


def load(path: str) -> dict[str, Any]:
  """What is stored; nothing where there is no file yet."""
  file = pathlib.Path(path)
  return json.loads(file.read_text()) if file.exists() else {}


if __name__ == '__main__':
  cli.run(main)

"""Times a language model with one key/value cache after the other.

  python -m experiments.benchmark --model=smollm2-135m --context=2048 \
      --kv_cache=contiguous --kv_cache=int4 --kv_cache=evict:ratio=0.25

Prefill is timed over --context tokens, decoding over --steps single tokens
behind them, both without compilation; of the steps the median stands, with the
tenth and ninetieth percentile. Bytes are those of all layers' caches, exactly,
for --context + --steps tokens a row. Times hold for the device that is named
and for what else it was doing. The tokens are random: no time depends on them.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import models
from experiments import adapters, cli, generation, results
from jaxq.kvcache import interface, registry
from jaxq.parallel import mesh as mesh_lib

_MODEL = flags.DEFINE_string(
  'model',
  None,
  'Packaged name, .gguf file, Hugging Face or jaxq directory.',
  required=True,
)
_KV_CACHE = flags.DEFINE_multi_string(
  'kv_cache',
  ['contiguous'],
  'What keys and values are kept in; docs/kv_cache.md lists them.',
)
_CONTEXT = flags.DEFINE_integer(
  'context', 2048, 'Tokens of each row before decoding.', lower_bound=1
)
_BATCH = flags.DEFINE_integer('batch', 1, 'Rows.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 32, 'Tokens decoded.', lower_bound=2)
_PREFILL_CHUNK = flags.DEFINE_integer(
  'prefill_chunk', None, 'Tokens read at a time; default: all.', lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'Of float weights, activations and what a cache does not compress.',
)
_MESH = flags.DEFINE_string(
  'mesh', '', 'Device mesh, as in model:4. Default: one device.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the results.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What is timed.

  context, batch: tokens of each row before decoding, and rows.
  steps: tokens decoded, at least 2, as the first compiles.
  chunk: tokens read at a time; None: all of the context.
  """

  context: int
  batch: int = 1
  steps: int = 32
  chunk: int | None = None

  @property
  def capacity(self) -> int:
    """Tokens that a row comes to hold."""
    return self.context + self.steps

  def __post_init__(self):
    for name, least in (('context', 1), ('batch', 1), ('steps', 2)):
      if getattr(self, name) < least:
        raise ValueError(
          f'benchmark: {name}={getattr(self, name)}; it must be at least '
          f'{least}.'
        )


def main(argv: Sequence[str]) -> None:
  """Loads once, times every cache, prints and writes."""
  del argv
  configs = [registry.parse(text) for text in _KV_CACHE.value]
  load = Load(
    context=_CONTEXT.value,
    batch=_BATCH.value,
    steps=_STEPS.value,
    chunk=_PREFILL_CHUNK.value,
  )
  mesh = mesh_lib.choose(_MESH.value, batch_size=1)
  model = models.load(_MODEL.value, dtype=_DTYPE.value, mesh=mesh)
  rows = tuple(measure(model, config, load) for config in configs)
  results.print_table(rows)
  info = results.run_info(cli.resolved_flags())
  print(f'{info.device}, JAX {info.jax}; compilation is not counted.')
  if _OUTPUT.value is not None and jax.process_index() == 0:
    results.save(_OUTPUT.value, results.Result(run=info, rows=rows))
    print(f'results: {_OUTPUT.value}')


def measure(
  model: models.Model, config: interface.CacheConfig, load: Load
) -> results.Row:
  """One row of the table.

  Raises:
    ValueError: more tokens than the model takes, or a cache that cannot be.
    NotImplementedError: the model is no decoder.
  """
  variables = generation.prepared(model, config)
  longest = model.config.max_position
  if load.capacity > longest:
    raise ValueError(
      f'context={load.context} and steps={load.steps} make {load.capacity} '
      f'tokens; {model.name} takes {longest}. Give a shorter context.'
    )
  lm = adapters.language_model(model.module, config)
  caches = jax.jit(lm.init_caches, static_argnums=(0, 1))(
    load.batch, load.capacity
  )
  size = sum(interface.nbytes(cache) for cache in caches)
  elements = 2 * load.batch * load.capacity * model.config.num_layers
  elements *= model.config.num_kv_heads * model.config.head_dim
  rng = np.random.default_rng(0)
  tokens = rng.integers(
    0, model.config.vocab_size, (load.batch, load.capacity), np.int32
  )

  def forward(variables, tokens, start, caches):
    T = tokens.shape[1]
    positions = start + jnp.arange(T, dtype=jnp.int32)[None]
    positions = jnp.where(positions < load.capacity, positions, -1)
    positions = jnp.broadcast_to(positions, tokens.shape)
    x, caches = lm.forward(variables, tokens, positions, caches)
    return lm.head(variables, x[:, -1]), caches

  run = jax.jit(forward, donate_argnums=3)
  prefill, caches = _prefill(run, variables, tokens, caches, load)
  steps, caches = _decode(run, variables, tokens, caches, load)
  conventions = {
    'context': load.context,
    'batch': load.batch,
    'steps': load.steps,
    'dtype': jnp.dtype(model.module.dtype).name,
    'prefill chunk': load.chunk or load.context,
  }
  low, middle, high = np.percentile(steps, (10, 50, 90))
  metric = lambda name, value, **how: results.Metric(
    name=name, value=float(value), conventions=conventions, **how
  )
  return results.Row(
    name=registry.text_of(config),
    metrics=(
      metric('prefill per token', prefill, unit='ms'),
      metric(
        'decode per step', middle, low=float(low), high=float(high), unit='ms'
      ),
      metric('cache', size / 2**20, unit='MiB'),
      metric('bits per key or value', 8 * size / elements),
    ),
  )


def _prefill(
  run: Any, variables: Any, tokens: np.ndarray, caches: Any, load: Load
) -> tuple[float, Any]:
  """Milliseconds per token of a row, and the filled caches.

  The program is compiled by a first run over caches that are thrown away. A
  last chunk that is not full is read by a program of its own.
  """
  chunk = min(load.chunk or load.context, load.context)
  starts = range(0, load.context, chunk)
  parts = [
    (jnp.asarray(tokens[:, i : min(i + chunk, load.context)]), jnp.int32(i))
    for i in starts
  ]

  def read(caches):
    logits = None
    for part, start in parts:
      logits, caches = run(variables, part, start, caches)
    return jax.block_until_ready(logits), caches

  read(jax.tree.map(jnp.copy, caches))
  begin = time.monotonic()
  _, caches = read(caches)
  return 1e3 * (time.monotonic() - begin) / load.context, caches


def _decode(
  run: Any, variables: Any, tokens: np.ndarray, caches: Any, load: Load
) -> tuple[list[float], Any]:
  """Milliseconds of every step but the first, which compiles."""
  times: list[float] = []
  for i in range(load.context, load.capacity):
    own = jnp.asarray(tokens[:, i : i + 1])
    begin = time.monotonic()
    logits, caches = run(variables, own, jnp.int32(i), caches)
    jax.block_until_ready(logits)
    times.append(1e3 * (time.monotonic() - begin))
  return times[1:], caches


if __name__ == '__main__':
  cli.run(main)

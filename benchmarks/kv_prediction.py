"""Can a layer's tokens be chosen from the input of the layer before?

  python -m experiments.label_channels --model=smollm2-135m --output=FILE
  python -m benchmarks.kv_prediction --model=smollm2-135m --channels=FILE

Double Sparsity that keeps keys and values in host memory fetches what layer
l + 1 reads while layer l runs (jaxq.kvcache.offload, predict=true): it asks
with layer l + 1's query projection of layer l's normalised attention input.
This prints, per layer, how many of the tokens that the layer's own query
chooses are chosen so, over the last queries of windows of real text, beside
what a random choice would hit. Layers under --least belong into
`exact_layers`; the last line is that field.
"""

import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import models
from experiments import cli
from jaxq.data import pipeline
from jaxq.kvcache import double_sparsity, labels, quest, softmax, stores
from models import decoder, query_prediction

FLAGS = flags.FLAGS
flags.DEFINE_string('model', 'smollm2-135m', 'A decoder, as for evaluate.')
flags.DEFINE_string(
  'channels', None, 'File of experiments.label_channels.', required=True
)
flags.DEFINE_string('data', 'wiki-sample:evaluation', 'Text that is read.')
flags.DEFINE_integer('length', 1024, 'Tokens of a window.', lower_bound=2)
flags.DEFINE_integer('windows', 4, 'How many.', lower_bound=1)
flags.DEFINE_integer(
  'queries', 32, 'Last tokens of a window that ask.', lower_bound=1
)
flags.DEFINE_integer('heavy_tokens', 256, 'Tokens that are chosen.')
flags.DEFINE_float('least', 0.5, 'Overlap under which a layer is exact.')


def main(argv: Sequence[str]) -> None:
  """Prints the table."""
  del argv
  model = models.load(FLAGS.model)
  config = double_sparsity.DoubleSparsityConfig(
    channels=FLAGS.channels, heavy_tokens=FLAGS.heavy_tokens
  )
  data = pipeline.DataConfig(
    source=FLAGS.data,
    num_sequences=FLAGS.windows,
    sequence_length=FLAGS.length,
  )
  tokens = pipeline.calibration_tokens(data, model.tokenizer)
  found = overlaps(model, tokens, config, FLAGS.queries)
  print('| layer | overlap | of the worst head | least of a query |')
  print('|---:|---:|---:|---:|')
  for i, row in enumerate(found):
    if not np.isnan(row).all():
      print(
        f'| {i} | {row.mean():.3f} | {row.mean(axis=(0, 1)).min():.3f} | '
        f'{row.mean(axis=-1).min():.3f} |'
      )
  mean = np.array([row.mean() for row in found])
  used = mean[~np.isnan(mean)]
  held = FLAGS.length - FLAGS.queries / 2
  print(
    f'mean {used.mean():.3f}, by chance {config.heavy_tokens / held:.3f}; '
    f'{FLAGS.windows} windows of {FLAGS.length} tokens of {FLAGS.data}'
  )
  below = [str(i) for i in np.flatnonzero(mean < FLAGS.least)]
  print(f'under {FLAGS.least}: exact_layers={"/".join(below) or "none needed"}')


def overlaps(
  model: models.Model,
  tokens: np.ndarray,
  config: double_sparsity.DoubleSparsityConfig,
  queries: int,
) -> np.ndarray:
  """Share of the chosen that were predicted: (layers, windows, queries, Hkv).

  NaN where the layer reads everything, or has no layer before.

  Args:
    model: a decoder of equal blocks, in one run.
    tokens: (windows, T) int32.
    config: the channels, how many are chosen, and the dense layers.
    queries: tokens of the end of a window that ask.
  """
  c = model.config
  order = config.order(c.num_layers, c.num_kv_heads, c.head_dim)
  r = c.head_dim // config.group_factor
  block = decoder.Block(c, None, c.kind(0))
  stacked = model.variables['params']['blocks_0']
  of = lambda i: jax.tree.map(lambda a: a[i], stacked)

  @jax.jit
  def layer(params, before, x):
    """x of this block, the normalised input of the one before -> the next's."""
    (y, _), seen = block.apply({'params': params}, x, mutable=['heads'])
    heads = seen['heads']['attention']
    own = _normed(block, params, x)
    at = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    guess = _query(block, params, before, at)
    return y, own, heads['q'][0], heads['k'][0], guess

  @jax.jit
  def overlap(channels, q, guess, k):
    return _overlap(config, channels, q, guess, k, queries)

  x = model.module.apply(
    model.variables, jnp.asarray(tokens), method='embed_tokens'
  )
  shape = (c.num_layers, len(tokens), queries, c.num_kv_heads)
  found, before = np.full(shape, np.nan), x
  for i in range(c.num_layers):
    x, before, q, k, guess = layer(of(i), before, x)
    if i >= max(1, config.dense_layers):
      channels = jnp.asarray(order[i, :, :r], jnp.int32)
      found[i] = overlap(channels, q, guess, k)
  return found


def _overlap(config, channels, q, guess, k, queries):
  """q, guess (B, T, H, D), k (B, T, Hkv, D) -> (B, queries, Hkv)."""
  B, T, Hkv, _ = k.shape
  short = jnp.take_along_axis(k, channels[None, None], axis=-1)
  grid = stores.Grid(bits=config.label_bits)
  codes, scale, offset = stores.quantize(short, grid)
  label = stores.IntStore(
    codes=stores.pack(codes, grid.bits),
    scale=scale,
    offset=offset,
    grid=grid,
    head_dim=channels.shape[1],
  )

  def chosen(q, t):  # Of the tokens before t.
    cache: Any = types.SimpleNamespace(
      config=config,
      label=label,
      channels=channels,
      length=jnp.broadcast_to(t, (B,)),
    )
    one = jax.lax.dynamic_slice_in_dim(q, t, 1, axis=1)
    ranked = labels.rank(cache, softmax.group(one, Hkv, None))
    return quest.top(ranked, config.heavy_tokens)[:, :, 0, 0]  # (B, Hkv, T)

  def both(t):
    mine, guessed = chosen(q, t), chosen(guess, t)
    return jnp.sum(mine & guessed, axis=-1) / jnp.sum(mine, axis=-1)

  at = jnp.arange(T - queries, T)
  return jax.lax.map(both, at).transpose(1, 0, 2)


def _normed(block, params, x):
  return block.apply({'params': params}, x, method=lambda m, x: m.input_norm(x))


def _query(block, params, before, at):
  """The queries that this block's attention makes of another's input."""

  def ask(m, before):
    variables = {'params': params['attention']}
    return query_prediction.queries(m.attention, variables, before, at)

  return block.apply({'params': params}, before, method=ask)


if __name__ == '__main__':
  cli.run(main)

"""Tests of models.pruned_decoder and models.dynamic_decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import dycoke, fastv, interface, pooling, sparsevlm
from models import decoder, dynamic_decoder, pruned_decoder

CONFIG = decoder.DecoderConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=32,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
)
B, V, TEXT = 2, 8, 5  # Two tokens of text, the image, three more.
T = V + TEXT
VISUAL = jnp.broadcast_to(
  (jnp.arange(T) >= 2) & (jnp.arange(T) < 2 + V), (B, T)
)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))


@functools.cache
def model():
  module = decoder.Decoder(CONFIG)
  variables = jax.jit(module.init)(
    jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )
  # Larger kernels, so that attention is uneven, but nowhere 0 in float32.
  return module, jax.tree.map(lambda a: 2 * a if a.ndim > 2 else a, variables)


@functools.cache
def split(*layers):
  module, variables = model()
  return pruned_decoder.split(module, variables, layers)


def embeddings(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, T, 16))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames='capacity')
def prefill(module, stages, variables, x, positions, visual, capacity=None):
  return pruned_decoder.prefill(
    module,
    variables,
    x,
    positions,
    visual,
    stages,
    num_visual=V,
    capacity=capacity,
  )


class _NumpyDecoder:
  """The decoder with dense attention masks, layer by layer."""

  def __init__(self, variables):
    self.params = jax.tree.map(
      lambda a: np.asarray(a, np.float64), variables['params']
    )

  def layer(self, i):
    return jax.tree.map(lambda a: a[i], self.params['blocks_0'])

  def run(self, x, layers, seen, positions):
    """x (T, C) through some layers; seen (T, T); also the last weights."""
    for i in layers:
      p = self.layer(i)
      h = self.norm(x, p['input_norm'])
      a = p['attention']
      q, k, v = (
        (h @ a[f'{n}_proj']['kernel']).reshape(len(x), -1, 4) for n in 'qkv'
      )
      q, k = self.rotate(q, positions), self.rotate(k, positions)
      k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
      scores = np.einsum('thd,shd->hts', q, k) / 2
      scores = np.where(seen[None], scores, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      out = np.einsum('hts,shd->thd', weights, v).reshape(len(x), -1)
      x = x + out @ a['o_proj']['kernel']
      h, m = self.norm(x, p['post_norm']), p['mlp']
      gate = h @ m['gate_proj']['kernel']
      up = gate / (1 + np.exp(-gate)) * (h @ m['up_proj']['kernel'])
      x = x + up @ m['down_proj']['kernel']
    return x, weights

  @staticmethod
  def norm(x, p):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p['scale']

  @staticmethod
  def rotate(x, positions):
    angle = positions[:, None, None] * 10000.0 ** (-np.arange(0, 4, 2) / 4)
    a, b = np.split(x, 2, axis=-1)
    c, s = np.cos(angle), np.sin(angle)
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


class FastvTest(parameterized.TestCase):
  def test_dropping_equals_hiding(self):
    """FastV's two forms: rows that are gone, and columns nobody sees."""
    config = fastv.FastvConfig(layer=2, budget=0.5)
    stages = pruned_decoder.stages_of(config, V)
    module, variables = split(2)
    self.assertEqual(module.runs, (1, 1, 2))
    x = embeddings()
    out = prefill(module, stages, variables, x, POSITIONS, VISUAL)
    oracle = _NumpyDecoder(model()[1])
    causal = np.tril(np.ones((T, T), bool))
    for b in range(B):
      h, weights = oracle.run(
        np.asarray(x[b], np.float64), (0, 1), causal, np.arange(T)
      )
      scores = weights[:, -1].mean(0)[2 : 2 + V]
      kept = np.sort(np.argsort(-scores)[: V // 2])
      np.testing.assert_array_equal(out.reduced[0].index[b], kept)
      alive = np.ones(T, bool)
      alive[2 : 2 + V] = np.isin(np.arange(V), kept)
      hidden, _ = oracle.run(h, (2, 3), causal & alive, np.arange(T))
      np.testing.assert_array_equal(
        out.sequence.positions[b], np.flatnonzero(alive)
      )
      np.testing.assert_allclose(
        out.sequence.x[b], hidden[alive], rtol=1e-3, atol=1e-4
      )
      np.testing.assert_allclose(out.last[b], hidden[-1], rtol=1e-3, atol=1e-4)

  def test_all_tokens_kept_is_the_model(self):
    stages = pruned_decoder.stages_of(fastv.FastvConfig(budget=1.0), V)
    module, variables = split(2)
    out = prefill(module, stages, variables, embeddings(), POSITIONS, VISUAL)
    full, _ = model()
    run = jax.jit(full.apply, static_argnames='method', static_argnums=1)
    x, _ = run(model()[1], 0, embeddings(), POSITIONS, method='run')
    np.testing.assert_allclose(out.sequence.x, x, rtol=1e-4, atol=1e-4)

  def test_caches_of_two_lengths_go_on_decoding(self):
    """Decoding behind a pruned prompt equals a longer pruned prompt."""
    config = fastv.FastvConfig(layer=2, budget=0.5)
    stages = pruned_decoder.stages_of(config, V)
    module, variables = split(2)
    # Padding behind a shorter row; its last token is another.
    positions = POSITIONS.at[1, -1].set(-1)
    out = prefill(
      module, stages, variables, embeddings(), positions, VISUAL, capacity=4
    )
    lengths = [np.asarray(cache.length[0]).tolist() for cache in out.caches]
    half = V // 2
    self.assertEqual(lengths, [[T, T - 1]] * 2 + [[T - half, T - 1 - half]])
    token = jnp.array([[7], [7]])
    new = jnp.array([[T], [T - 1]])
    step = jax.jit(module.apply, static_argnames='method')
    got, caches = step(variables, token, new, out.caches, method='hidden')
    self.assertEqual(caches[2].length[0].tolist(), [T - half + 1, T - half])
    # The same by an oracle: the new token sees what is in the caches.
    oracle = _NumpyDecoder(model()[1])
    table = oracle.params['embed']['embedding']
    for b, count in enumerate((T, T - 1)):
      x = np.concatenate([np.asarray(embeddings()[b])[:count], table[[7]]])
      causal = np.tril(np.ones((count + 1, count + 1), bool))
      h, _ = oracle.run(x, (0, 1), causal, np.arange(count + 1))
      alive = np.ones(count + 1, bool)
      alive[2 : 2 + V] = np.isin(np.arange(V), out.reduced[0].index[b])
      hidden, _ = oracle.run(h, (2, 3), causal & alive, np.arange(count + 1))
      np.testing.assert_allclose(got[b, 0], hidden[-1], rtol=1e-3, atol=1e-3)


class SparseVlmTest(absltest.TestCase):
  def test_two_stages_recycle_behind_the_kept_tokens(self):
    config = sparsevlm.SparseVlmConfig(layers=(1, 3), keep=(4, 2))
    stages = pruned_decoder.stages_of(config, V)
    self.assertEqual([s.layer for s in stages], [1, 3])
    self.assertEqual(
      [s.budget for s in stages],
      [interface.Budget(k_max=5), interface.Budget(k_max=3)],
    )
    module, variables = split(1, 3)
    self.assertEqual(module.runs, (1, 1, 1, 1))
    out = prefill(module, stages, variables, embeddings(), POSITIONS, VISUAL)
    self.assertEqual(out.sequence.x.shape, (B, TEXT + 3, 16))
    source, visual = out.sequence.source, np.asarray(out.sequence.visual)
    # Text before, kept tokens in order, the cluster, text behind.
    np.testing.assert_array_equal(source[:, :2], [[0, 1]] * B)
    np.testing.assert_array_equal(source[:, -3:], [[10, 11, 12]] * B)
    np.testing.assert_array_equal(visual.sum(1), [3, 3])
    self.assertTrue((np.diff(source[:, 2:4]) > 0).all())
    np.testing.assert_array_equal(source[:, 4], [-1, -1])


class DycokeTest(absltest.TestCase):
  def test_a_step_that_prunes_nothing_is_a_step(self):
    module, variables = split(2)
    caches = prefill(
      module, (), variables, embeddings(), POSITIONS, VISUAL, capacity=3
    ).caches
    x = jax.random.normal(jax.random.key(3), (B, 1, 16))
    position = jnp.full((B, 1), T)
    S = caches[0].k.shape[2]
    visual = jnp.pad(VISUAL, ((0, 0), (0, S - T)))

    @functools.partial(jax.jit, static_argnums=0)
    def step(config, caches, watch, x):
      return dynamic_decoder.dynamic_step(
        module, variables, x, position, caches, visual, watch, config
      )

    watch = dynamic_decoder.first_watch(B, V)
    whole = dycoke.DycokeConfig(layer=1, prune=0.0)
    got, after, _ = step(whole, caches, watch, x)

    @jax.jit
    def plain(x):
      for i, cache in enumerate(caches):
        x, _ = module.apply(variables, i, x, position, cache, method='run')
      return x

    expected = plain(x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    few = dycoke.DycokeConfig(layer=1, prune=0.5)
    got, after, watch = step(few, caches, watch, x)
    self.assertGreater(np.abs(got - expected).max(), 1e-4)
    np.testing.assert_array_equal(watch.chosen.sum(1), [4, 4])
    best = np.sort(np.argsort(-np.asarray(watch.scores), axis=1)[:, :4])
    for b in range(B):
      np.testing.assert_array_equal(np.flatnonzero(watch.chosen[b]), best[b])
    # Every layer has the new token; no visual token has left a cache.
    self.assertEqual(
      [cache.length[0].tolist() for cache in after], [[T + 1] * B] * 3
    )
    # Like scores keep the choice, whatever it is; others choose anew.
    odd = jnp.arange(V)[None] % 2 == 1
    kept = watch.replace(chosen=jnp.broadcast_to(odd, (B, V)))
    _, _, again = step(few, caches, kept, x)
    np.testing.assert_array_equal(again.chosen, kept.chosen)
    unlike = kept.replace(scores=-kept.scores)
    _, _, again = step(few, caches, unlike, x)
    np.testing.assert_array_equal(again.chosen, watch.chosen)


class MessagesTest(absltest.TestCase):
  def test_layers_and_reducers(self):
    module, variables = model()
    with self.assertRaisesRegex(ValueError, r'layer=4 of 4; allowed 1..3'):
      pruned_decoder.split(module, variables, [4])
    with self.assertRaisesRegex(
      ValueError, r'layer=0, scoring=.last.; allowed'
    ):
      pruned_decoder.Stage(layer=0, reducer=fastv.FastvConfig())
    with self.assertRaisesRegex(
      NotImplementedError, 'PoolingConfig inside a d'
    ):
      pruned_decoder.stages_of(pooling.PoolingConfig(), V)
    stages = pruned_decoder.stages_of(fastv.FastvConfig(), V)
    with self.assertRaisesRegex(ValueError, r'no run of \(4,\) .*Call split'):
      prefill(module, stages, variables, embeddings(), POSITIONS, VISUAL)
    sliding = decoder.DecoderConfig(
      **{**vars(CONFIG), 'window': 4, 'sliding': (True,) * 4}
    )
    with self.assertRaisesRegex(NotImplementedError, 'sliding window'):
      pruned_decoder.split(decoder.Decoder(sliding), variables, [2])
    with self.assertRaisesRegex(ValueError, 'is block 1 alone; .*Call split'):
      dynamic_decoder.dynamic_step(
        module,
        variables,
        embeddings()[:, :1],
        POSITIONS[:, :1],
        decoder.init_caches(CONFIG, (), B, T),
        VISUAL,
        dynamic_decoder.first_watch(B, V),
        dycoke.DycokeConfig(layer=1),
      )

  def test_budgets_are_checked(self):
    stage = pruned_decoder.Stage(
      layer=2, reducer=fastv.FastvConfig(), budget=interface.Budget(k_max=V + 1)
    )
    with self.assertRaisesRegex(ValueError, 'k_max=9 for N=8'):
      prefill(
        split(2)[0], (stage,), split(2)[1], embeddings(), POSITIONS, VISUAL
      )


if __name__ == '__main__':
  absltest.main()

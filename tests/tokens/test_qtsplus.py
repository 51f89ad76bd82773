"""QTSplus: the choice, its share, padding, copied weights, the prompt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, qtsplus

D, N = 16, 24
SMALL = qtsplus.QTSplusConfig(num_heads=2, num_kv_heads=1, budget_hidden=8)
COPIES = dataclasses.replace(SMALL, mixing_layers=0)


def inputs(n=N, seed=0, width=D):
  keys = jax.random.split(jax.random.key(seed), 2)
  ts = interface.token_set(
    jax.random.normal(keys[0], (2, n, width)), grid=(n // 4, 2, 2)
  )
  return ts, jax.random.normal(keys[1], (2, 3, D))


@functools.cache
def params_of(config):
  return config.init_params(jax.random.key(7), *inputs())


def reduce(config, ts, query, k_max=12, **given):
  budget = interface.Budget(k_max=k_max)
  given = {'query': query, 'params': params_of(config), **given}
  return reduce_jit(config, ts, budget, given)


@functools.partial(jax.jit, static_argnums=0)
def reduce_jit(config, ts, budget, given):
  return config.reduce(ts, budget=budget, **given)


class ReduceTest(parameterized.TestCase):
  def test_keeps_the_best_in_order(self):
    ts, query = inputs()
    r = reduce(COPIES, ts, query)
    share, n = np.asarray(r.aux['rho']), np.asarray(r.aux['n'])
    self.assertTrue(((share >= 0.05) & (share <= 0.5)).all())
    np.testing.assert_array_equal(n, np.ceil(share * N))
    np.testing.assert_array_equal(r.count, n)
    for b in range(2):
      best = np.argsort(-np.asarray(r.aux['relevance'][b]))[: n[b]]
      np.testing.assert_array_equal(r.index[b, : n[b]], np.sort(best))
      np.testing.assert_array_equal(
        r.tokens[b, : n[b]], ts.tokens[b, np.sort(best)]
      )

  def test_number_kept_by_hand(self):
    mask = jnp.ones((2, 10_000), bool)
    rho = jnp.array([0.05, 0.5])
    for n_max, expected in ((2560, [500, 2560]), (512, [500, 512])):
      np.testing.assert_array_equal(
        qtsplus.kept_number(rho, mask, n_max), expected
      )
    few = mask.at[0, 3:].set(False).at[1].set(False)
    np.testing.assert_array_equal(qtsplus.kept_number(rho, few, 512), [1, 0])
    config = qtsplus.QTSplusConfig()
    shapes = jax.eval_shape(
      lambda: interface.token_set(jnp.zeros((1, 10_000, 2)))
    )
    self.assertEqual(config.budget_for(shapes).k_max, 2560)
    tenth = dataclasses.replace(config, budget=0.1)
    self.assertEqual(tenth.budget_for(shapes).k_max, 1000)

  def test_padding_changes_no_share_no_choice_and_no_mixed_token(self):
    ts, query = inputs()
    config = dataclasses.replace(SMALL, time_embed=True)
    params = {**params_of(config), 'time_gate': jnp.float32(0.7)}
    r = reduce(config, ts, query, params=params)
    pad = lambda x, value: jnp.concatenate(
      [x, jnp.full((2, 8, *x.shape[2:]), value, x.dtype)], axis=1
    )
    padded = interface.TokenSet(
      tokens=pad(ts.tokens, 99),
      mask=pad(ts.mask, False),
      positions=pad(ts.positions, 3),
      size=pad(ts.size, 1),
      grid=(8, 2, 2),
    )
    asked = jnp.arange(5)[None] < jnp.array([[3], [3]])
    long = jnp.concatenate([query, 99 * jnp.ones((2, 2, D))], axis=1)
    other = reduce(config, padded, long, params=params, query_mask=asked)
    np.testing.assert_array_equal(other.index, r.index)
    np.testing.assert_allclose(other.aux['rho'], r.aux['rho'], rtol=1e-5)
    np.testing.assert_allclose(other.tokens, r.tokens, atol=1e-5)

  def test_time_enters_through_its_gate(self):
    ts, query = inputs()
    later = ts.replace(positions=ts.positions + jnp.array([[[40, 0, 0]]]))
    run = lambda ts, gate: (
      reduce(
        SMALL,
        ts,
        query,
        params={**params_of(SMALL), 'time_gate': jnp.float32(gate)},
      ).tokens
    )
    np.testing.assert_array_equal(run(ts, 0), run(later, 0))
    self.assertGreater(float(jnp.abs(run(ts, 1) - run(later, 1)).max()), 0.01)

  def test_the_control_deals_the_shares_out_again(self):
    ts, query = inputs()
    own = reduce(COPIES, ts, query)
    control = dataclasses.replace(COPIES, control='share')
    run = jax.jit(
      lambda key: control.reduce(
        ts, query=query, params=params_of(COPIES), rng=key
      )
    )
    swapped = []
    for seed in range(4):
      r = run(jax.random.key(seed))
      np.testing.assert_allclose(
        r.aux['relevance'], own.aux['relevance'], rtol=1e-5
      )
      rho, mine = np.asarray(r.aux['rho']), np.asarray(own.aux['rho'])
      np.testing.assert_allclose(np.sort(rho), np.sort(mine), rtol=1e-5)
      swapped.append(not np.allclose(rho, mine, rtol=1e-5))
    self.assertEqual(set(swapped), {False, True})

  def test_renumbered_positions(self):
    ts, query = inputs()
    r = reduce(dataclasses.replace(COPIES, renumber=True), ts, query)
    for b, n in enumerate(r.count.tolist()):
      for axis in range(3):
        np.testing.assert_array_equal(r.positions[b, :n, axis], np.arange(n))

  def test_projected_tokens_start_as_they_are(self):
    config = dataclasses.replace(COPIES, project=True)
    ts, query = inputs(width=10)
    params = config.init_params(jax.random.key(0), ts, query)
    r = reduce(config, ts, query, params=params)
    self.assertEqual(r.tokens.shape[-1], D)
    first = int(r.index[0, 0])
    np.testing.assert_array_equal(r.tokens[0, 0, :10], ts.tokens[0, first])
    np.testing.assert_array_equal(r.tokens[0, 0, 10:], 0)

  def test_the_scoring_layers_are_the_models_last(self):
    ts, query = inputs()
    params = params_of(SMALL)
    block = {
      name: jax.tree.map(lambda leaf: leaf + 1, params['scoring_0'][name])
      for name in ('attention', 'input_norm', 'post_norm')
    }
    made = qtsplus.from_blocks(params, block, (block,))
    for layer in ('scoring_0', 'mixing_0'):
      for name, source in (
        ('attention', 'attention'),
        ('memory_norm', 'input_norm'),
      ):
        jax.tree.map(
          np.testing.assert_array_equal, made[layer][name], block[source]
        )
    self.assertEqual(jax.tree.structure(made), jax.tree.structure(dict(params)))
    kept = qtsplus.from_blocks(params, block)
    self.assertIs(kept['mixing_0'], params['mixing_0'])


class IntegrateTest(parameterized.TestCase):
  def test_kept_tokens_replace_the_placeholder(self):
    ts, query = inputs()
    r = reduce(COPIES, ts, query)
    embeddings = 100 + jnp.arange(12.0).reshape(2, 6, 1) * jnp.ones((1, 1, D))
    mask = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
    place = jnp.array([2, 0])
    out, used, slot = qtsplus.integrate(embeddings, mask, place, r)
    self.assertEqual(out.shape, (2, 6 - 1 + 12, D))
    for b in range(2):
      n, at = int(r.count[b]), int(place[b])
      text = embeddings[b][np.asarray(mask[b])]
      expected = jnp.concatenate([text[:at], r.tokens[b, :n], text[at + 1 :]])
      self.assertEqual(int(used[b].sum()), expected.shape[0])
      np.testing.assert_array_equal(out[b, : expected.shape[0]], expected)
      np.testing.assert_array_equal(slot[b, at : at + n], np.arange(n))
      self.assertTrue((np.delete(slot[b], range(at, at + n)) == -1).all())

  def test_all_tokens_give_the_models_own_prompt(self):
    # The share forced to 1, nothing mixed: bit for bit the full sequence.
    ts, _ = inputs()
    kept = interface.Reduced(
      tokens=ts.tokens,
      mask=ts.mask,
      positions=ts.positions,
      size=ts.size,
      index=jnp.broadcast_to(jnp.arange(N)[None], (2, N)),
      assignment=jnp.broadcast_to(jnp.arange(N)[None], (2, N)),
      count=jnp.full((2,), N),
    )
    text = jax.random.normal(jax.random.key(5), (2, 4, D))
    full = jnp.concatenate([text[:, :1], ts.tokens, text[:, 2:]], axis=1)
    out, used, _ = qtsplus.integrate(
      text, jnp.ones((2, 4), bool), jnp.array([1, 1]), kept
    )
    np.testing.assert_array_equal(out, full)
    self.assertTrue(used.all())

  def test_messages(self):
    ts, query = inputs()
    r = reduce(COPIES, ts, query)
    text, mask = jnp.ones((2, 4, D)), jnp.ones((2, 4), bool)
    with self.assertRaisesRegex(ValueError, r'place=\[1, -1\].*placeholder'):
      qtsplus.integrate(text, mask, jnp.array([1, -1]), r)
    with self.assertRaisesRegex(ValueError, 'width 16 for embeddings of width'):
      qtsplus.integrate(text[..., :8], mask, jnp.array([1, 1]), r)


class MessagesTest(parameterized.TestCase):
  def test_messages(self):
    ts, query = inputs()
    for low, high in ((0.0, 0.5), (0.5, 0.5), (0.1, 1.1)):
      with self.assertRaisesRegex(ValueError, 'allowed 0 < rho_min < rho_max'):
        qtsplus.QTSplusConfig(rho_min=low, rho_max=high)
    with self.assertRaisesRegex(ValueError, "control='x'; allowed .'none'"):
      qtsplus.QTSplusConfig(control='x')
    with self.assertRaisesRegex(ValueError, 'rng=None; this reducer needs'):
      dataclasses.replace(COPIES, control='share').reduce(
        ts, query=query, params={}
      )
    with self.assertRaisesRegex(ValueError, 'n_max=0, scoring_layers=1'):
      qtsplus.QTSplusConfig(n_max=0)
    with self.assertRaisesRegex(ValueError, 'num_heads=8, num_kv_heads=3'):
      qtsplus.QTSplusConfig(num_kv_heads=3)
    wide, _ = inputs(width=10)
    with self.assertRaisesRegex(ValueError, 'tokens of width 10 and a query'):
      reduce(COPIES, wide, query)
    with self.assertRaisesRegex(ValueError, 'the query has no token'):
      reduce(COPIES, ts, query[:, :0])
    odd = dataclasses.replace(COPIES, num_heads=3, num_kv_heads=3)
    with self.assertRaisesRegex(ValueError, 'width 16 and num_heads=3'):
      odd.init_params(jax.random.key(0), ts, query)
    with self.assertRaisesRegex(ValueError, 'query=None; the selector is made'):
      COPIES.init_params(jax.random.key(0), ts)


if __name__ == '__main__':
  absltest.main()

"""CaCoVID at inference: budgets of frames, the choice, the policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import cacovid, interface
from models import decoder, decoder_config

GIVEN = cacovid.CaCoVIDConfig(scorer='given')


reduce = jax.jit(
  lambda config, ts, scores, budget=None: config.reduce(
    ts, scores=scores, budget=budget
  ),
  static_argnums=0,
)
logits = jax.jit(cacovid.CaCoVIDConfig.logits, static_argnums=0)


@functools.partial(jax.jit, static_argnames=('reference_bounds',))
def allocate(f, wanted, total, upper, limit, reference_bounds=False):
  return cacovid.allocate_frames(
    f, wanted, total, upper, limit, 49, reference_bounds=reference_bounds
  )


def reference(f, r, importance, cap, T, hw):
  """The authors' allocation, one token at a time; cap is a share of hw."""
  f = np.asarray(f, np.float64)
  f = f / np.abs(f).max() * 3
  p = np.exp(f) / np.exp(f).sum()
  p = np.clip(p, 1 / (2 * T), cap / (T * r))
  p = p / p.sum()
  n = np.round(p * round(importance * r * hw * T))
  n = np.clip(n, 1, int(importance * hw * cap)).astype(int)
  rest = int(np.floor(importance * r * hw * T)) - n.sum()
  for _ in range(abs(rest)):
    if rest < 0:
      n[np.argmax(n)] -= 1
    else:
      n[np.argmin(n)] += 1
  return n


class AllocateTest(parameterized.TestCase):
  def test_by_hand(self):
    # T 4, 10 tokens each, r .25, importance .5, cap .375.
    args = (jnp.zeros(4), jnp.int32(5), jnp.int32(5), jnp.int32(1))
    limit = jnp.full((4,), 10)
    np.testing.assert_array_equal(
      allocate(*args, limit, reference_bounds=True), [2, 1, 1, 1]
    )
    np.testing.assert_array_equal(allocate(*args, limit), [1, 1, 1, 1])

  def test_is_the_reference_and_keeps_its_bounds(self):
    rng = np.random.default_rng(0)
    T, hw, r = 8, 49, 0.15
    total, upper = int(0.5 * r * hw * T), int(0.5 * hw * 1.5 * r)
    args = (
      jnp.int32(round(0.5 * r * hw * T)),
      jnp.int32(total),
      jnp.int32(upper),
      jnp.full((T,), hw),
    )
    for _ in range(40):
      f = rng.normal(size=T) ** 3
      expected = reference(f, r, 0.5, 1.5 * r, T, hw)
      scores = jnp.asarray(f, jnp.float32)
      n = allocate(scores, *args, reference_bounds=True)
      np.testing.assert_array_equal(n, expected)
      n = allocate(scores, *args)
      self.assertTrue(np.all((n >= 1) & (n <= upper)), n)
      self.assertEqual(int(n.sum()), total)

  def test_frames_without_tokens_get_none(self):
    limit = jnp.array([49, 0, 3, 49, 49, 49, 49, 49])
    n = allocate(jnp.ones(8), jnp.int32(40), jnp.int32(40), jnp.int32(9), limit)
    self.assertEqual((int(n[1]), int(n[2]), int(n.sum())), (0, 3, 40))


class EvenTest(parameterized.TestCase):
  def test_is_a_rounded_linspace(self):
    run = jax.jit(cacovid.evenly_spaced, static_argnums=2)
    rng = np.random.default_rng(0)
    for _ in range(40):
      mask = rng.uniform(size=90) < 0.6
      at = np.flatnonzero(mask)
      count = int(rng.integers(0, len(at) + 1))
      got = np.flatnonzero(run(jnp.asarray(mask), jnp.int32(count), 90))
      places = np.round(np.linspace(0, len(at) - 1, count)).astype(int)
      np.testing.assert_array_equal(got, at[places])

  def test_more_than_a_float_can_count(self):
    # (M - 1) / (count - 1) is 1 + 1 / 29,999.
    got = cacovid.evenly_spaced(
      jnp.ones(30_001, bool), jnp.int32(30_000), 30_000
    )
    self.assertEqual(int(got.sum()), 30_000)


class ReduceTest(parameterized.TestCase):
  def test_total_frames_and_order(self):
    T, hw = 4, 16
    ts = interface.token_set(
      jax.random.normal(jax.random.key(0), (1, T * hw, 4)), grid=(T, 4, 4)
    )
    scores = jax.random.normal(jax.random.key(1), (1, T * hw))
    scores = scores.at[:, :hw].add(3)
    for ratio in (0.25, 0.5):
      budget = interface.budget_from_ratio(T * hw, ratio)
      r = reduce(GIVEN, ts, scores, budget)
      self.assertEqual(int(r.count[0]), int(ratio * T * hw))
      n = np.asarray(r.aux['tokens_per_frame'][0])
      self.assertEqual(n.sum(), budget.k_max // 2)
      self.assertEqual(n.argmax(), 0)
      by_frame = np.asarray(scores[0]).reshape(T, hw)
      for t in range(T):
        best = np.argsort(-by_frame[t])[: n[t]] + t * hw
        self.assertContainsSubset(best, np.asarray(r.index[0]))

  def test_the_rest_is_even(self):
    ts = interface.token_set(jnp.ones((1, 64, 4)), grid=(4, 4, 4))
    config = dataclasses.replace(GIVEN, importance=0.25)
    r = reduce(config, ts, -jnp.arange(64.0)[None])
    # One of each frame, its first; 12 of the other 60.
    rest = np.delete(np.arange(64), [0, 16, 32, 48])
    even = rest[np.round(np.linspace(0, 59, 12)).astype(int)]
    np.testing.assert_array_equal(
      r.index[0], np.sort(np.concatenate([[0, 16, 32, 48], even]))
    )

  def test_the_policy_reads_the_question(self):
    config = cacovid.CaCoVIDConfig(num_heads=2, intermediate_size=32)
    ts = interface.token_set(
      jax.random.normal(jax.random.key(0), (1, 32, 16)), grid=(2, 4, 4)
    )
    query = jax.random.normal(jax.random.key(1), (2, 1, 3, 16))
    params = config.init_params(jax.random.key(2), ts)
    u, v = logits(config, params, ts, query[0])
    self.assertEqual((u.shape, v.shape), ((1, 32, 2), (1, 2, 2)))
    other, _ = logits(config, params, ts, query[1])
    self.assertTrue(np.any(u != other))
    padded = jnp.concatenate([query[0], query[1]], axis=1)
    asked = (jnp.arange(6) < 3)[None]
    same, _ = logits(config, params, ts, padded, asked)
    np.testing.assert_allclose(same, u, atol=1e-5)
    shifted = cacovid.margin(u + 3.0)
    np.testing.assert_allclose(shifted, cacovid.margin(u), atol=1e-5)

  def test_the_layer_is_a_decoder_blocks(self):
    # Copied from a model, and with one token, which a causal mask lets see all
    # that there is: the layer is the model's block.
    shape = decoder_config.DecoderConfig(
      vocab_size=8,
      hidden_size=16,
      intermediate_size=32,
      num_layers=1,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      qkv_bias=True,
      norm_eps=1e-6,
    )
    block = decoder.Block(shape)
    x = jax.random.normal(jax.random.key(0), (1, 1, 16))
    theirs = jax.jit(block.init)(jax.random.key(1), x)['params']
    config = cacovid.CaCoVIDConfig(
      num_heads=2, num_kv_heads=1, intermediate_size=32
    )
    ts = interface.token_set(x, grid=(1, 1, 1))
    params = config.init_params(jax.random.key(2), ts)
    params = cacovid.from_block(params, theirs)
    self.assertIs(params['block']['mlp'], theirs['mlp'])
    policy = config.policy(16)
    at = jnp.zeros((1, 1), jnp.int32)
    apply = jax.jit(policy.apply, static_argnums=5)
    u, _ = apply({'params': params}, x, at, at == 0, at, 1)
    hidden, _ = jax.jit(block.apply)({'params': theirs}, x)
    hidden = hidden / jnp.sqrt(jnp.mean(hidden**2, -1, keepdims=True) + 1e-6)
    head = jax.jit(cacovid.Head().apply)
    expected = head({'params': params['token_head']}, hidden)
    np.testing.assert_allclose(u, expected, atol=1e-5)

  def test_messages(self):
    ts = interface.token_set(jnp.ones((1, 32, 16)), grid=(2, 4, 4))
    for importance in (0.0, 1.5):
      with self.assertRaisesRegex(ValueError, 'importance=.*in \\(0, 1\\]'):
        cacovid.CaCoVIDConfig(importance=importance)
    with self.assertRaisesRegex(ValueError, 'cap=0.5; a frame must be'):
      cacovid.CaCoVIDConfig(cap=0.5)
    with self.assertRaisesRegex(ValueError, "scorer='x'; allowed .'given'"):
      cacovid.CaCoVIDConfig(scorer='x')
    config = cacovid.CaCoVIDConfig(num_heads=2)
    with self.assertRaisesRegex(ValueError, 'tokens of width 16 and a query'):
      config.logits({}, ts, jnp.ones((1, 3, 8)))
    with self.assertRaisesRegex(ValueError, '2 scores are not finite; one of'):
      GIVEN.reduce(ts, scores=jnp.ones((1, 32)).at[0, 3:5].set(jnp.nan))
    with self.assertRaisesRegex(ValueError, 'k_max=33 for N=32 tokens'):
      GIVEN.reduce(
        ts, scores=jnp.ones((1, 32)), budget=interface.Budget(k_max=33)
      )


if __name__ == '__main__':
  absltest.main()

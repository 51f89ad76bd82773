"""CaCoVID's loss by hand, its memory, and a policy that learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from jaxq.tokens import cacovid, cacovid_sampling, interface
from jaxq.tokens import cacovid_training as policy

SMALL = policy.TrainConfig(tokens=4, frames=2, visits=3)


def memory_of(rewards, config=SMALL, visits=1, N=12, T=4, seed=0):
  """A memory of random sets with these rewards (tokens + frames,)."""
  keys = jax.random.split(jax.random.key(seed), 4)
  u = jax.random.normal(keys[0], (N, 2))
  v = jax.random.normal(keys[1], (T, 2))
  memory = policy.empty_memory(u, v, config)
  for i in range(visits):
    G = 1 + config.tokens + config.frames
    keep = jax.random.uniform(jax.random.fold_in(keys[2], i), (G, N)) < 0.4
    looked = jax.random.uniform(
      jax.random.fold_in(keys[3], i), (config.frames, T)
    )
    sets = cacovid_sampling.Combinations(keep, looked < 0.5)
    memory = policy.remember(memory, sets, jnp.array([0.0, *rewards]))
  return memory


policy_loss = jax.jit(policy.policy_loss, static_argnums=3)


@pytest.mark.loose_promotion  # optax promotes.
class LossTest(parameterized.TestCase):
  def test_by_numpy(self):
    rewards = [1.0, 0.0, 0.5, 1.0, 0.0, 1.0]
    memory = memory_of(rewards, visits=2)
    u, v = memory.u + 0.3, memory.v - jnp.array([[0.5, 0.0]])
    u = u.at[:, 1].add(0.4)
    got, aux = policy_loss(u, v, memory, SMALL)

    def part(logits, old, bits, rewards, balanced):
      logp = lambda x: np.asarray(jax.nn.log_softmax(x))
      r = np.asarray(rewards).reshape(-1)
      A = (r - r.mean()) / (r.std(ddof=1) + 1e-4)
      bits = np.asarray(bits).reshape(len(r), -1).astype(int)
      total = 0.0
      for i in range(len(r)):
        j = np.arange(bits.shape[1])
        ratio = np.exp(logp(logits)[j, bits[i]] - logp(old)[j, bits[i]])
        loss = -np.minimum(ratio * A[i], np.clip(ratio, 0.8, 1.28) * A[i])
        mean = bits[i].mean()
        w = bits[i] * (1 - mean) + (1 - bits[i]) * mean
        w = w if balanced else np.ones_like(w)
        total += (loss * w).sum() / (w.sum() + 1e-7)
      return total / len(r)

    tokens = part(
      u, memory.u, memory.token_masks[:2], memory.token_rewards[:2], True
    )
    frames = part(
      v, memory.v, memory.frame_masks[:2], memory.frame_rewards[:2], False
    )
    np.testing.assert_allclose(aux['token_loss'], tokens, rtol=1e-4)
    np.testing.assert_allclose(aux['frame_loss'], frames, rtol=1e-4)
    np.testing.assert_allclose(got, tokens + frames, rtol=1e-4)
    np.testing.assert_allclose(aux['accuracy'], 0.625)
    shifted, _ = policy_loss(u + 7, v - 3, memory, SMALL)
    np.testing.assert_allclose(shifted, got, rtol=1e-4)

  def test_equal_rewards_teach_nothing(self):
    memory = memory_of([1.0] * 6)
    value, grads = jax.value_and_grad(
      lambda uv: policy_loss(*uv, memory, SMALL)[0]
    )((memory.u, memory.v))
    self.assertEqual(float(value), 0.0)
    for g in grads:
      np.testing.assert_array_equal(g, 0)

  def test_kept_and_dropped_bits_weigh_the_same(self):
    bits = jnp.arange(20)[None] < jnp.array([[1], [4], [19]])
    w = policy.balanced_weights(bits)
    kept = jnp.where(bits, w, 0).sum(1)
    np.testing.assert_allclose(kept, (w.sum(1) - kept), rtol=1e-5)

  def test_divergence_from_fair_coins(self):
    memory = memory_of([1.0] * 6)
    config = dataclasses.replace(SMALL, beta=0.1)
    value, _ = policy_loss(memory.u, memory.v, memory, config)
    self.assertGreater(float(value), 0)
    coins = policy_loss(0 * memory.u, 0 * memory.v, memory, config)[0]
    np.testing.assert_allclose(coins, 0, atol=1e-6)

  def test_difficulty(self):
    config = policy.TrainConfig()
    step = lambda rate, accuracy: policy.next_rate(rate, accuracy, config)
    self.assertEqual([step(0.02, 1.0), step(0.01, 1.0)], [0.01, 0.01])
    self.assertEqual([step(0.02, 0.5), step(0.02, 0.1)], [0.02, 0.04])
    self.assertEqual(step(0.08, 0.0), 0.12)

  def test_the_copied_layer_is_slower_and_biases_do_not_decay(self):
    params = {'block': {'kernel': jnp.ones((2, 2))}, 'norm': jnp.ones(2)}
    params['token_head'] = {'kernel': jnp.ones((2, 2))}
    optimizer = policy.optimizer(policy.TrainConfig(), 100)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    head, layer = updates['token_head']['kernel'], updates['block']['kernel']
    np.testing.assert_allclose(head / layer, 10, rtol=1e-4)
    np.testing.assert_allclose(updates['norm'], -1e-6, rtol=1e-4)
    np.testing.assert_allclose(head, -1.01e-6, rtol=1e-4)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'rate_min=0.2, rate_max=0.12'):
      policy.TrainConfig(rate_min=0.2)
    with self.assertRaisesRegex(ValueError, 'visits=0; each sample needs'):
      policy.TrainConfig(visits=0)


@pytest.mark.loose_promotion  # optax promotes.
class LearningTest(parameterized.TestCase):
  """A frozen "model" that answers where it sees 2 of 4 evidence tokens."""

  def setUp(self):
    super().setUp()
    self.reducer = cacovid.CaCoVIDConfig(num_heads=2, intermediate_size=32)
    kind = jax.random.normal(jax.random.key(5), (16,))
    rng = np.random.default_rng(0)

    def sample():
      evidence = np.zeros(128, bool)
      evidence[rng.choice(32, 4, replace=False) + 32 * rng.integers(4)] = True
      x = rng.normal(size=(128, 16)) + 1.5 * evidence[:, None] * kind
      ts = interface.token_set(
        jnp.asarray(x, jnp.float32)[None], grid=(4, 4, 8)
      )
      return ts, evidence

    self.sample, self.query = sample, kind[None, None]

  def train(self, samples, **changes):
    """Mean greedy reward of each quarter of the samples, and the policy."""
    config = policy.TrainConfig(
      rate=0.0625,
      rate_min=0.0625,
      rate_max=0.0625,
      frame_ratio=0.25,
      visits=2,
      **changes,
    )
    optimizer = optax.adam(3e-3)
    run = policy.programs(config, self.reducer, optimizer)
    params = self.reducer.init_params(jax.random.key(1), self.sample()[0])
    state, greedy = optimizer.init(params), []
    for i in range(samples):
      ts, evidence = self.sample()

      def rewards_of(keep, evidence=evidence):
        seen = (np.asarray(keep) & evidence).sum(1)
        return jnp.asarray(np.minimum(seen / 2, 1.0), jnp.float32)

      params, state, log = policy.train_on_sample(
        run, jax.random.key(i), params, state, ts, self.query, rewards_of
      )
      greedy.append(log[0]['greedy'])
    quarters = np.array(greedy).reshape(4, -1).mean(1)
    return quarters, params

  def test_the_policy_finds_the_evidence(self):
    quarters, params = self.train(48)
    self.assertGreater(quarters[-1], quarters[0] + 0.3)
    self.assertGreater(quarters[-1], 0.8)
    recall = []
    reduce = jax.jit(
      lambda ts, budget, query, params: self.reducer.reduce(
        ts, query=query, params=params, budget=budget
      )
    )
    for _ in range(8):
      ts, evidence = self.sample()
      r = reduce(ts, interface.Budget(k_max=16), self.query, params)
      kept = np.asarray(r.index[0])
      recall.append(evidence[kept].sum() / 4)
    self.assertGreater(np.mean(recall), 0.4)  # At random: 16 / 128.


if __name__ == '__main__':
  absltest.main()

"""Tests of jaxq.tokens.tome."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, primitives, tome


def oracle(x, size, keys, r, special):
  """One round in NumPy loops: groups of source indices in order."""
  keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
  sources = [i for i in range(len(x)) if i % 2 == 0 and i >= special]
  destinations = [i for i in range(len(x)) if i % 2 == 1 and i >= special]
  best = {}
  for i in sources:
    cosine = [float(keys[i] @ keys[j]) for j in destinations]
    j = int(np.argmax(cosine))
    best[i] = (cosine[j], destinations[j])
  merged = sorted(sources, key=lambda i: (-best[i][0], i))[:r]
  out = []
  for j in (j for j in range(len(x)) if j not in merged):
    members = [j] + [i for i in merged if best[i][1] == j]
    weight = size[members].sum()
    mean = (x[members] * size[members, None]).sum(0) / weight
    out.append((j, weight, mean))
  return out


@functools.partial(jax.jit, static_argnums=(0, 2))
def _reduce(config, ts, k_max, rng=None):
  return config.reduce(ts, budget=interface.Budget(k_max=k_max), rng=rng)


def attention(q, k, v, log_size):
  """softmax(q k^T + log size) v, one head, NumPy."""
  scores = q @ k.T / np.sqrt(q.shape[-1]) + log_size[None]
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights @ v / weights.sum(-1, keepdims=True)


class TomeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.rng = np.random.default_rng(0)

  def normal(self, *shape):
    return self.rng.normal(size=shape).astype(np.float32)

  @parameterized.parameters(0, 1, 2)
  def test_one_round_equals_loops(self, special):
    B, N, r = 2, 13, 4
    x, keys = self.normal(B, N, 5), self.normal(B, N, 6)
    size = self.rng.uniform(1, 4, (B, N)).astype(np.float32)
    ts = interface.token_set(
      jnp.asarray(x),
      size=jnp.asarray(size),
      keys=jnp.asarray(keys),
      special=special,
    )
    reduced = _reduce(tome.TomeConfig(), ts, N - r)
    for b in range(B):
      expected = oracle(x[b], size[b], keys[b], r, special)
      index, weight, mean = map(np.array, zip(*expected, strict=True))
      np.testing.assert_array_equal(reduced.index[b], index)
      np.testing.assert_allclose(reduced.size[b], weight, rtol=1e-6)
      np.testing.assert_allclose(reduced.tokens[b], mean, rtol=1e-5, atol=1e-6)

  def test_nothing_to_merge_is_the_identity(self):
    x = jnp.asarray(self.normal(1, 8, 4))
    reduced = _reduce(tome.TomeConfig(), interface.token_set(x), 8)
    np.testing.assert_array_equal(reduced.tokens, x)
    np.testing.assert_array_equal(reduced.assignment[0], np.arange(8))

  def test_many_rounds_conserve_everything(self):
    x = self.normal(1, 16, 4)
    reduced = _reduce(tome.TomeConfig(), interface.token_set(jnp.asarray(x)), 3)
    np.testing.assert_allclose(reduced.size.sum(), 16, rtol=1e-6)
    total = np.einsum('bk,bkd->bd', reduced.size, reduced.tokens)
    np.testing.assert_allclose(total, x.sum(1), rtol=1e-5, atol=1e-5)
    # Every slot is the mean of what is assigned to it, whatever the rounds.
    for s in range(3):
      member = np.asarray(reduced.assignment[0]) == s
      np.testing.assert_allclose(
        reduced.tokens[0, s], x[0, member].mean(0), rtol=1e-5, atol=1e-6
      )

  def test_twins_merged_attend_as_they_did_apart(self):
    N, D = 12, 8
    x = np.repeat(self.normal(N // 2, D), 2, axis=0)
    w_q, w_k, w_v = (self.normal(D, D) for _ in range(3))
    ts = interface.token_set(jnp.asarray(x)[None])
    reduced = _reduce(tome.TomeConfig(), ts, N // 2)
    np.testing.assert_array_equal(reduced.size[0], np.full(N // 2, 2))
    np.testing.assert_allclose(
      primitives.unmerge(reduced)[0], x, rtol=1e-6, atol=1e-6
    )
    # One token is thrice there, so that sizes differ.
    x = np.concatenate([x, x[:1]])
    few = np.concatenate([np.asarray(reduced.tokens[0])])
    size = np.array([3.0] + [2.0] * (N // 2 - 1))
    apart = attention(x @ w_q, x @ w_k, x @ w_v, np.zeros(N + 1))
    q, k, v = few @ w_q, few @ w_k, few @ w_v
    together = attention(q, k, v, np.log(size))
    np.testing.assert_allclose(together, apart[:N:2], rtol=1e-4, atol=1e-5)
    plain = attention(q, k, v, np.zeros(N // 2))
    self.assertGreater(np.abs(plain - apart[:N:2]).max(), 1e-2)

  def test_random_and_strided_partitions(self):
    ts = interface.token_set(jnp.asarray(self.normal(2, 12, 4)), special=1)
    config = tome.TomeConfig(partition='random')
    reduced = _reduce(config, ts, 8, jax.random.key(0))
    np.testing.assert_array_equal(reduced.count, [8, 8])
    np.testing.assert_array_equal(reduced.index[:, 0], [0, 0])
    np.testing.assert_allclose(reduced.size.sum(1), [12, 12])
    # Every fourth token is a destination, so that one round can leave 3 of 12.
    ts = interface.token_set(jnp.asarray(self.normal(2, 12, 4)))
    reduced = _reduce(tome.TomeConfig(stride=4), ts, 3)
    np.testing.assert_array_equal(reduced.index, [[3, 7, 11]] * 2)
    reduced = _reduce(tome.TomeConfig(stride=4), ts, 2)
    np.testing.assert_allclose(reduced.size.sum(1), [12, 12])

  @parameterized.parameters(
    ({'stride': 1}, 'stride=1; allowed'),
    ({'inflect': 2.0}, 'inflect=2.0'),
    ({'partition': 'odd'}, "partition='odd'; allowed .'random', 'strided'"),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      tome.TomeConfig(**fields)


if __name__ == '__main__':
  absltest.main()

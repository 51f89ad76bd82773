"""Scores against loops over single tokens, which follow kvpress's rules.

The oracles are written from the published rules (NVIDIA/kvpress: SnapKVPress,
ExpectedAttentionPress, KnormPress, AdaKVPress), in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import (
  evict,
  head_budgets,
  interface,
  reposition,
  scores,
  softmax,
  stores,
)
from jaxq.nn import rope as rope_lib
from tests.kvcache import testing

T, W, SINKS, FUTURE, KERNEL = 20, 4, 2, 8, 5
ROPE = rope_lib.Rope()
DATA = testing.qkv(T)
G = testing.H // testing.HKV


def tokens():
  """All tokens of DATA as candidates."""
  q, k, v = DATA
  positions = jnp.broadcast_to(
    jnp.arange(T)[None, :, None], (testing.B, T, testing.HKV)
  )
  window = scores.Window(
    q=q[:, -W:],
    positions=jnp.broadcast_to(jnp.arange(T - W, T)[None], (testing.B, W)),
  )
  return window, scores.Candidates(k=k, v=v, positions=positions)


snapkv = jax.jit(
  functools.partial(scores.snapkv, scoring=interface.Scoring(), kernel=KERNEL)
)


def softmax_np(x):
  p = np.exp(x - x.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def probabilities(row, head):
  """(T, T) causal attention of one query head."""
  q, k = (np.asarray(x, np.float64) for x in DATA[:2])
  s = q[row, :, head] @ k[row, :, head // G].T / np.sqrt(testing.D)
  return softmax_np(np.where(np.tri(T) > 0, s, -np.inf))


def snapkv_np(row, kv_head):
  """Mean over the window and the group of pooled attention to the prefix."""
  out = np.zeros(T - W)
  for head in range(kv_head * G, (kv_head + 1) * G):
    received = probabilities(row, head)[-W:, :-W].mean(0)
    padded = np.pad(received, KERNEL // 2)
    out += [padded[t : t + KERNEL].sum() / KERNEL for t in range(T - W)]
  out /= G
  return np.concatenate([out, np.full(W, out.max())])


def rotation_np(position):
  """(D, D) matrix of one position."""
  half = testing.D // 2
  angle = position * ROPE.frequencies(testing.D)
  cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
  out = np.block([[cos, -sin], [sin, cos]])
  assert out.shape == (2 * half, 2 * half)
  return out


def expected_np(row, kv_head):
  """E exp(q k) for normal q under the mean rotation, times |v|."""
  q, k, v = (np.asarray(x, np.float64)[row] for x in DATA)
  mean_rotation = np.mean([rotation_np(T + i) for i in range(FUTURE)], axis=0)
  p = np.zeros(T - SINKS)
  for head in range(kv_head * G, (kv_head + 1) * G):
    bare = np.stack([rotation_np(-t) @ q[t, head] for t in range(T)][SINKS:])
    mu = mean_rotation @ bare.mean(0)
    cov = np.cov(bare.T, bias=True)
    cov = mean_rotation @ cov @ mean_rotation.T
    keys = k[SINKS:, kv_head]
    s = keys @ mu / np.sqrt(testing.D)
    s += np.einsum('ti,ij,tj->t', keys, cov, keys) / testing.D / 2
    p += softmax_np(s) / G
  return p * np.linalg.norm(v[SINKS:, kv_head], axis=-1)


def kept_np(score, budget, sinks, recent):
  """Positions of the highest scores, first and newest always in."""
  score = score.copy()
  score[:sinks] = np.inf
  score[len(score) - recent :] = np.inf
  return sorted(np.argsort(-score, kind='stable')[:budget])


class ScoresTest(parameterized.TestCase):
  def test_snapkv(self):
    window, candidates = tokens()
    got = snapkv(window, candidates)
    for row in range(testing.B):
      for head in range(testing.HKV):
        np.testing.assert_allclose(
          got[row, head], snapkv_np(row, head), rtol=1e-4, atol=1e-7
        )

  def test_order_and_gaps_do_not_matter_to_snapkv(self):
    window, candidates = tokens()
    want = snapkv(window, candidates)
    order = jax.random.permutation(jax.random.key(0), T)
    empty = jax.tree.map(
      lambda a: jnp.pad(a, [(0, 0), (3, 0)] + [(0, 0)] * (a.ndim - 2)),
      jax.tree.map(lambda a: a[:, order], candidates),
    )
    positions = empty.positions.at[:, :3].set(-1)
    got = snapkv(window, empty.replace(positions=positions))
    np.testing.assert_allclose(got[..., 3:], want[..., order], rtol=1e-5)
    np.testing.assert_array_equal(got[..., :3], 0)

  def test_expected(self):
    _, candidates = tokens()
    window = scores.Window(
      q=DATA[0],
      positions=jnp.broadcast_to(jnp.arange(T)[None], (testing.B, T)),
    )
    got = scores.expected(
      window,
      candidates,
      interface.Scoring(),
      rope=ROPE,
      length=jnp.full((testing.B,), T),
      future=FUTURE,
      sinks=SINKS,
    )
    for row in range(testing.B):
      for head in range(testing.HKV):
        np.testing.assert_allclose(
          got[row, head, SINKS:], expected_np(row, head), rtol=1e-3
        )

  def test_h2o_sums_what_queries_pay(self):
    q, k, _ = DATA
    queries = softmax.group(q, testing.HKV, None)
    positions = jnp.broadcast_to(jnp.arange(T)[None], (testing.B, T))
    state = softmax.attend_own(queries, k, k, interface.Scoring())
    got = scores.received(
      queries,
      softmax.log_sum_exp(state),
      positions,
      stores.FloatStore(k),
      jnp.broadcast_to(positions[..., None], k.shape[:3]),
      interface.Scoring(),
    )
    want = np.mean([probabilities(1, h).sum(0) for h in range(G)], axis=0)
    np.testing.assert_allclose(got[1, 0], want, rtol=1e-4, atol=1e-6)

  def test_knorm_and_random(self):
    k = DATA[1]
    np.testing.assert_allclose(
      scores.knorm(k)[0, 1], -np.linalg.norm(k[0, :, 1], axis=-1), rtol=1e-6
    )
    draw = lambda seed, layer, start: scores.random(
      start + jnp.arange(400)[None], 2, seed, jnp.int32(layer)
    )
    first = draw(0, 0, 0)
    np.testing.assert_array_equal(first[..., 7:], draw(0, 0, 7)[..., :-7])
    for other in (draw(1, 0, 0), draw(0, 1, 0)):
      r = np.corrcoef(first.reshape(-1), other.reshape(-1))[0, 1]
      self.assertLess(abs(r), 0.15)
    self.assertLess(abs(float(first.mean()) - 0.5), 0.05)

  @parameterized.parameters(
    ('snapkv', snapkv_np), ('expected', expected_np), ('knorm', None)
  )
  def test_kept_positions_are_the_oracles(self, policy, oracle):
    budget = 10
    config = evict.EvictConfig(
      policy=policy,
      budget=budget,
      sinks=SINKS,
      recent=W,
      window=W if policy == 'snapkv' else T,
      interval=W,
      kernel=KERNEL,
      future=FUTURE,
    )
    _, cache = testing.run(config, DATA, (T,))
    for row in range(testing.B):
      for head in range(testing.HKV):
        if oracle is None:
          score = -np.linalg.norm(DATA[1][row, :, head], axis=-1)
        else:
          score = oracle(row, head)
        if policy == 'expected':
          score = np.concatenate([np.zeros(SINKS), score])
        got = sorted(np.asarray(cache.positions)[row, :, head, 0])
        self.assertEqual(got, kept_np(score, budget, SINKS, W))

  def test_adakv_is_the_oracles(self):
    # Each head is sure of its best `sure` tokens; the rest go by score.
    rng = np.random.default_rng(0)
    heads, n, budget, alpha = 3, 30, 10, 0.4
    score = rng.random((heads, n)) * np.array([[1.0], [0.3], [3.0]])
    sure = int(budget * alpha)
    raised = score.copy()
    for h in range(heads):
      raised[h, np.argsort(-score[h])[:sure]] = np.inf
    want = np.argsort(-raised.reshape(-1), kind='stable')[: heads * budget]
    head = np.repeat(np.arange(heads), n)[None]
    rank = head_budgets.safeguarded(
      jnp.asarray(score.reshape(1, -1), jnp.float32),
      jnp.asarray(head),
      heads,
      sure,
    )
    _, got = jax.lax.top_k(rank, heads * budget)
    self.assertEqual(set(np.asarray(got[0])), set(want))


class RepositionTest(parameterized.TestCase):
  def test_turning_adds_up(self):
    x = DATA[0]
    at = jnp.broadcast_to(jnp.arange(T)[None] * 50, (testing.B, T))
    turned = rope_lib.rotate(x, at, ROPE)
    back = reposition.turn(turned, -at, ROPE)
    np.testing.assert_allclose(back, x, atol=1e-5)
    on = reposition.turn(turned, 7 - at, ROPE)
    want = rope_lib.rotate(x, jnp.full_like(at, 7), ROPE)
    np.testing.assert_allclose(on, want, atol=1e-4)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'who: the keys have no rotary'):
      reposition.check('who', None)
    scaling = rope_lib.Scaling(kind='dynamic', factor=2.0, original=64)
    with self.assertRaisesRegex(NotImplementedError, 'dynamic positions chan'):
      reposition.check('who', rope_lib.Rope(scaling=scaling))


if __name__ == '__main__':
  absltest.main()

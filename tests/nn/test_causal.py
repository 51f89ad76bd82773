"""Tests of jaxq.nn.causal."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import causal
from pallas_kernels import compat, targets


def make(T, H, Hkv, D=8, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(T), 3)
  q = jax.random.normal(keys[0], (2, T, H, D), dtype)
  k = jax.random.normal(keys[1], (2, T, Hkv, D), dtype)
  v = jax.random.normal(keys[2], (2, T, Hkv, D), dtype)
  return q, k, v


def reference(q, k, v, scale, window, softcap):
  """Every score of every head, in float64."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  repeats = q.shape[2] // k.shape[2]
  k, v = (np.repeat(a, repeats, axis=2) for a in (k, v))
  scores = np.einsum('bthd,bshd->bhts', q, k) * scale
  if softcap is not None:
    scores = softcap * np.tanh(scores / softcap)
  rows, columns = np.indices(scores.shape[-2:])
  hidden = columns > rows
  if window is not None:
    hidden |= columns <= rows - window
  scores = np.where(hidden, -np.inf, scores)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('bhts,bshd->bthd', weights, v)


class CausalTest(parameterized.TestCase):
  @parameterized.product(
    T=(1, 127, 128, 300),
    heads=((1, 1), (6, 2)),
    how=(
      {},
      {'window': 1},
      {'window': 60},
      {'window': 500},
      {'softcap': 2.0},
      {'scale': 0.7, 'window': 130, 'softcap': 5.0},
    ),
  )
  def test_equals_the_definition(self, T, heads, how):
    q, k, v = make(T, *heads)
    out = jax.jit(functools.partial(causal.attention, **how))(q, k, v)
    full = {'scale': q.shape[-1] ** -0.5, 'window': None, 'softcap': None}
    expected = reference(q, k, v, **{**full, **how})
    np.testing.assert_allclose(out, expected, atol=2e-6)

  def test_many_chunks(self):
    q, k, v = make(2500, 2, 1)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(causal.attention(q, k, v), expected, atol=2e-6)

  def test_bfloat16(self):
    q, k, v = make(200, 2, 1, dtype=jnp.bfloat16)
    out = causal.attention(q, k, v)
    self.assertEqual(out.dtype, jnp.bfloat16)
    expected = reference(q, k, v, q.shape[-1] ** -0.5, None, None)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)

  def test_a_kernel_where_there_is_a_tpu(self):
    data = make(128, 2, 1, D=64, dtype=jnp.bfloat16)
    f = lambda q, k, v: causal.attention(q, k, v, window=40)
    loss = lambda q, k, v: jnp.sum(f(q, k, v).astype(jnp.float32) ** 2)
    run = lambda: jax.jit(
      lambda *x: (f(*x), jax.grad(loss, argnums=(0, 1, 2))(*x))
    )(*data)
    want = run()
    text = str(jax.make_jaxpr(f)(*data))
    self.assertNotIn('pallas_call', text)
    with (
      mock.patch.object(targets, 'current', return_value='v5e'),
      mock.patch.object(compat, 'interpret_mode', lambda _: True),
    ):
      text = str(jax.make_jaxpr(lambda *x: f(*x))(*data))
      self.assertIn('name=prefill_attention', text)
      got = run()
    # Both round probabilities and outputs to bfloat16.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      a, b = (np.asarray(x, np.float32) for x in (a, b))
      np.testing.assert_allclose(a, b, atol=0.03, rtol=0.03)


if __name__ == '__main__':
  absltest.main()

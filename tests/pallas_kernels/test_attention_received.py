"""Tests of attention_received: the TPU kernel, interpreted, equals base.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.attention_received import api, arg_specs
from pallas_kernels.attention_received import pallas_mosaic_tpu as tpu

SMALL = tpu.Block(bt=128, bs=128)


def make(B=1, T=5, S=9, H=2, Hkv=1, D=8, dtype='float32'):
  rng = np.random.default_rng(T + S)
  q = jnp.asarray(rng.normal(size=(B, T, H, D)), dtype)
  k = jnp.asarray(rng.normal(size=(B, S, Hkv, D)), dtype)
  return q, k


def run(q, k, lse, **options):
  options = {
    'implementation': 'pallas_mosaic_tpu',
    'chip': 'v6e',
    'interpret': True,
    **options,
  }
  f = functools.partial(api.attention_received, **options)
  return jax.jit(f)(q, k, lse)


def weights(q, k, causal=False):
  """Attention weights (B, H, T, S), by loops over heads in float64."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  (B, T, H, D), S = q.shape, k.shape[1]
  out = np.zeros((B, H, T, S))
  for b, h in np.ndindex(B, H):
    logits = q[b, :, h] @ k[b, :, h * k.shape[2] // H].T / D**0.5
    if causal:
      logits[np.arange(T)[:, None] + S - T < np.arange(S)] = -np.inf
    e = np.exp(logits - logits.max(-1, keepdims=True))
    out[b, h] = e / e.sum(-1, keepdims=True)
  return out


class KernelTest(parameterized.TestCase):
  def test_a_case_worked_by_hand(self):
    # One row sees both keys alike, the other is all for the second.
    q = jnp.array([[0.0, 0.0], [0.0, 100.0]]).reshape(1, 2, 1, 2)
    k = jnp.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    lse = api.row_logsumexp(q, k, scale=1.0)
    y = run(q, k, lse, scale=1.0)
    np.testing.assert_allclose(y, [[[0.5, 1.5]]], rtol=1e-6)
    y = run(q, k, lse, scale=1.0, reduce='max')
    np.testing.assert_allclose(y, [[[0.5, 1.0]]], rtol=1e-6)

  @parameterized.parameters(
    ('sum', False, {'B': 2, 'T': 5, 'S': 9, 'H': 4, 'Hkv': 2}),
    ('max', False, {'T': 130, 'S': 300, 'H': 2, 'Hkv': 1, 'D': 72}),
    ('sum', True, {'T': 200, 'S': 290}),
    ('max', True, {'T': 257, 'S': 257, 'H': 1}),
  )
  def test_equals_base_and_the_softmax(self, reduce, causal, shape):
    q, k = make(**shape)
    lse = api.row_logsumexp(q, k, causal=causal)
    options = {'reduce': reduce, 'causal': causal}
    y = run(q, k, lse, block=SMALL, **options)
    p = weights(q, k, causal)
    want = p.sum(2) if reduce == 'sum' else p.max(2)
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=1e-6)
    base = run(q, k, lse, implementation='xla', **options)
    np.testing.assert_allclose(y, base, rtol=2e-5, atol=1e-6)

  def test_bfloat16(self):
    q, k = make(T=20, S=150, D=64, dtype='bfloat16')
    lse = api.row_logsumexp(q, k)
    y = run(q, k, lse)
    self.assertEqual((y.shape, y.dtype), ((1, 2, 150), jnp.float32))
    np.testing.assert_allclose(y, weights(q, k).sum(2), rtol=1e-4)
    # All weight goes to some key.
    np.testing.assert_allclose(jnp.sum(y, -1), [[20.0, 20.0]], rtol=1e-5)

  @parameterized.parameters('sum', 'max')
  def test_rows_that_do_not_count(self, reduce):
    q, k = make(B=2, T=6, S=7)
    lse = api.row_logsumexp(q, k).at[0, 0, 5].set(-jnp.inf)
    mask = jnp.array([[1, 0, 1, 0, 0, 1], [0] * 6], bool)
    y = run(q, k, lse, reduce=reduce, row_mask=mask)
    p = weights(q, k) * np.asarray(mask)[:, None, :, None]
    p[0, 0, 5] = 0
    want = p.sum(2) if reduce == 'sum' else p.max(2)
    np.testing.assert_allclose(y, want, rtol=1e-5)
    poisoned = run(
      jnp.where(mask[..., None, None], q, jnp.inf),
      k,
      lse,
      reduce=reduce,
      row_mask=mask,
    )
    self.assertTrue(np.isfinite(poisoned).all())


class ApiTest(parameterized.TestCase):
  def test_logsumexp_sees_the_keys_that_are_there(self):
    q, k = make(B=2, T=3, S=4)
    mask = jnp.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    lse = api.row_logsumexp(q, k, key_mask=mask)
    want = api.row_logsumexp(q[:1], k[:1, :2])
    np.testing.assert_allclose(lse[:1], want, rtol=1e-6)
    self.assertTrue(np.all(np.isneginf(lse[1])))
    np.testing.assert_array_equal(run(q, k, lse)[1], jnp.zeros((2, 4)))

  @parameterized.parameters('xla', 'pallas_mosaic_tpu')
  def test_gradient_is_that_of_the_softmax(self, implementation):
    q, k = make(T=4, S=6)
    mask = jnp.array([[True, True, False, True]])

    def loss(q, k):
      lse = api.row_logsumexp(q, k)
      y = api.attention_received(
        q,
        k,
        lse,
        row_mask=mask,
        implementation=implementation,
        chip='v6e',
        interpret=True,
      )
      return jnp.sum(y**2)

    def plain(q, k):
      logits = jnp.einsum('bthd,bsd->bhts', q, k[:, :, 0]) * 8**-0.5
      p = jnp.where(mask[:, None, :, None], jax.nn.softmax(logits, -1), 0.0)
      return jnp.sum(jnp.sum(p, 2) ** 2)

    for got, want in zip(
      *(jax.jit(jax.grad(f, (0, 1)))(q, k) for f in (loss, plain)), strict=True
    ):
      np.testing.assert_allclose(got, want, atol=1e-5)

  def test_choice(self):
    q, k = make()
    self.assertEqual(api.choose(q, k), 'xla')  # On a CPU.
    self.assertEqual(api.choose(q, k, 'v5p'), 'pallas_mosaic_tpu')
    half = q.astype(jnp.float16), k.astype(jnp.float16)
    self.assertEqual(api.choose(*half, 'v5p'), 'xla')

  @parameterized.named_parameters(
    ('rank', {'q': jnp.zeros((1, 2, 8))}, ValueError, 'they need the axes'),
    ('Hkv', {'k': jnp.zeros((1, 9, 3, 8))}, ValueError, 'Hkv must divide H'),
    (
      'dtype',
      {'k': jnp.zeros((1, 9, 1, 8), 'bfloat16')},
      TypeError,
      'q is float32 and k is bfloat16',
    ),
    ('lse', {'lse': jnp.zeros((1, 5, 2))}, ValueError, r'needs \(1, 2, 5\)'),
    ('mask', {'row_mask': jnp.ones((5,), bool)}, ValueError, r'needs \(1, 5\)'),
    ('reduce', {'reduce': 'mean'}, ValueError, "reduce='mean'; allowed .'max'"),
    ('name', {'implementation': 'cuda'}, ValueError, "'cuda'; allowed"),
  )
  def test_messages(self, changed, kind, message):
    q, k = make()
    args = {'q': q, 'k': k, 'lse': jnp.zeros((1, 2, 5)), **changed}
    with self.assertRaisesRegex(kind, message):
      api.attention_received(**args)

  def test_refusals(self):
    q, k = make()
    lse = jnp.zeros((1, 2, 5))
    with self.assertRaisesRegex(ValueError, r'key_mask has shape \(9,\)'):
      api.row_logsumexp(q, k, key_mask=jnp.ones(9, bool))
    with self.assertRaisesRegex(NotImplementedError, "chip is 'v4'; it runs"):
      run(q, k, lse, chip='v4')
    half = q.astype(jnp.float16), k.astype(jnp.float16)
    with self.assertRaisesRegex(NotImplementedError, 'q is float16; it takes'):
      run(*half, lse)
    with self.assertRaisesRegex(ValueError, 'bs=64; it must be a multiple'):
      tpu.Block(bs=64)

  def test_blocks_fit_the_chips(self):
    for spec in arg_specs.SPECS.values():
      block = tpu.pick_block(spec.T, spec.S)
      self.assertLess(tpu.onchip_bytes(block, spec.D, 4), 2**24)


if __name__ == '__main__':
  absltest.main()

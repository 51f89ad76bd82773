"""Tests of prefill_attention: the TPU kernels, interpreted, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.prefill_attention import api
from pallas_kernels.prefill_attention import pallas_mosaic_tpu as tpu

KERNEL = {'implementation': 'pallas_mosaic_tpu', 'chip': 'v5e'}
SMALL = tpu.Block(bq=128, bk=128)


def make(T, S, *, B=2, H=2, Hkv=1, D=64, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((B, T, H, D), (B, S, Hkv, D), (B, S, Hkv, D))
  return [jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes]


def exact(q, k, v, start, lengths, *, window=None, softcap=None):
  """float64: out, log-sum-exp, probabilities (B, H, T, S)."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, H, D = q.shape
  S, G = k.shape[1], H // k.shape[2]
  k, v = (np.repeat(x, G, axis=2) for x in (k, v))
  s = np.einsum('bthd,bshd->bhts', q, k) / D**0.5
  s = s if softcap is None else softcap * np.tanh(s / softcap)
  rows = np.asarray(start)[:, None, None] + np.arange(T)[None, :, None]
  columns = np.arange(S)[None, None]
  seen = (columns <= rows) & (columns < np.asarray(lengths)[:, None, None])
  if window is not None:
    seen &= columns > rows - window
  e = np.where(seen[:, None], np.exp(s), 0.0)
  total = e.sum(-1, keepdims=True)
  p = e / np.where(total > 0, total, 1.0)
  with np.errstate(divide='ignore'):
    lse = np.log(total[..., 0]).transpose(0, 2, 1)
  return np.einsum('bhts,bshd->bthd', p, v), lse, p


# Interpreted kernels are long programs of small work: compile time is all.
FAST = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


@functools.partial(
  jax.jit, static_argnames=('f', 'options'), compiler_options=FAST
)
def _run(f, arrays, options):
  return f(**arrays, **{'interpret': True, **dict(options)})


def run(f, arrays, **options):
  options = {**KERNEL, 'block': SMALL, **options}
  arrays = {n: jnp.asarray(x) for n, x in arrays.items()}
  return _run(f, arrays, tuple(options.items()))


class PrefillAttentionTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('causal', {}, {}),
    ('gqa3_head128', {'H': 3, 'D': 128}, {}),
    ('window_softcap', {'H': 8, 'Hkv': 2}, {'window': 100, 'softcap': 2.0}),
  )
  def test_is_attention_and_its_column_sums(self, sizes, scoring):
    q, k, v = make(200, 250, **sizes)
    start, lengths = np.array([50, 0]), np.array([250, 130])
    want, lse, p = exact(q, k, v, start, lengths, **scoring)
    rows = {'start': start, 'lengths': lengths}
    weights = np.random.default_rng(1).uniform(size=(2, 200))
    names = api.IMPLEMENTATIONS if scoring else (KERNEL['implementation'],)
    for name in names:
      options = {**scoring, 'implementation': name}
      got = run(
        api.prefill_attention, {'q': q, 'k': k, 'v': v, **rows}, **options
      )
      # Outputs and probabilities are rounded to bfloat16.
      np.testing.assert_allclose(got[0].astype(jnp.float32), want, atol=0.02)
      np.testing.assert_allclose(got[1], lse, atol=1e-4)
      arrays = {'q': q, 'k': k, 'lse': got[1], 'weights': weights, **rows}
      sums = run(api.received, arrays, **options)
      expected = np.einsum('bhts,bt->bhs', p, weights)
      np.testing.assert_allclose(sums, expected, rtol=1e-3, atol=1e-4)

  def test_received_from_a_few_queries_in_any_order(self):
    q, k, v = make(200, 200, B=1)
    lengths = np.array([180])
    _, lse, p = exact(q, k, v, np.array([0]), lengths, window=90)
    picked = np.array([[199, 3, 3, -1, 140]])  # One twice, one is none.
    arrays = {
      'q': q[:, picked[0]],
      'k': k,
      'lse': jnp.asarray(lse, jnp.float32)[:, picked[0]],
      'positions': picked,
      'lengths': lengths,
    }
    want = p[:, :, [199, 3, 3, 140]].sum(axis=2)
    for name in api.IMPLEMENTATIONS:
      got = run(api.received, arrays, window=90, implementation=name)
      np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)

  def test_nothing_seen_and_anything_behind(self):
    q, k, v = make(128, 256)
    spoil = lambda x: x.at[:, 130:].set(jnp.nan)
    start, lengths = np.array([128, 0]), np.array([130, 0])
    arrays = {'q': q, 'k': spoil(k), 'v': spoil(v)}
    rows = {'start': start, 'lengths': lengths}
    out, lse = run(api.prefill_attention, {**arrays, **rows})
    self.assertFalse(np.isnan(np.asarray(out, np.float32)).any())
    np.testing.assert_array_equal(out[1].astype(jnp.float32), 0)
    np.testing.assert_array_equal(lse[1], -np.inf)
    arrays = {'q': q, 'k': spoil(k), 'lse': lse, **rows}
    sums = run(api.received, arrays)
    np.testing.assert_allclose(np.sum(sums[0], -1), 128, rtol=1e-3)
    np.testing.assert_array_equal(sums[1], 0)

  def test_choice_and_messages(self):
    q, k, v = make(128, 128)
    self.assertEqual(api.choose(q, k, v), 'xla')  # On a CPU.
    self.assertEqual(api.choose(q, k, v, chip='v6e'), 'pallas_mosaic_tpu')
    q, k, v = make(8, 8)
    self.assertEqual(api.choose(q, k, v, chip='v6e'), 'xla')  # Not a tile.
    named = functools.partial(api.prefill_attention, **KERNEL)
    with self.assertRaisesRegex(NotImplementedError, 'k is float32; it takes'):
      named(q, k.astype(jnp.float32), v)
    with self.assertRaisesRegex(NotImplementedError, 'head_dim=32; it takes'):
      named(*make(8, 8, D=32))
    with self.assertRaisesRegex(NotImplementedError, "chip is 'v4'"):
      api.prefill_attention(q, k, v, **{**KERNEL, 'chip': 'v4'})
    with self.assertRaisesRegex(ValueError, "'triton'; allowed .*'xla'"):
      api.prefill_attention(q, k, v, implementation='triton')
    with self.assertRaisesRegex(ValueError, 'k and v are shaped alike'):
      api.prefill_attention(q, k[:, :4], v)
    with self.assertRaisesRegex(ValueError, r'lse \(2, 8\), weights and posi'):
      api.received(q, k, jnp.zeros((2, 8)))
    lse, few = jnp.zeros((2, 8, 2)), jnp.zeros((2, 5), jnp.int32)
    with self.assertRaisesRegex(ValueError, r'\(2, 8\), \(2, 5\); they are'):
      api.received(q, k, lse, positions=few)
    with self.assertRaisesRegex(ValueError, 'bq=100, bk=128; both must'):
      tpu.Block(bq=100, bk=128)


if __name__ == '__main__':
  absltest.main()

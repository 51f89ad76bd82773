"""Tests of decode_attention: the TPU kernel, interpreted, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import stored, targets
from pallas_kernels.decode_attention import api
from pallas_kernels.decode_attention import pallas_mosaic_tpu as tpu

KERNEL = {'implementation': 'pallas_mosaic_tpu', 'chip': 'v5e'}
S = 256
LENGTHS = (0, 1, S, 150)
SMALL = tpu.Block(tokens=128, chunk=128)


# Name: bits, tokens and channels that share a scale of keys, channels of
# values (0: all of a head), heads of norms.
FORMS = {
  'bf16': (16, 1, 0, 0, 0),
  'int8': (8, 1, 0, 0, 0),
  'int4': (4, 1, 0, 0, 0),
  'int2': (2, 1, 0, 0, 0),
  'kivi2': (2, 32, 1, 32, 0),
  'kivi4': (4, 32, 1, 32, 0),
  'oscar2': (2, 32, 1, 32, 1),
}


def make(form, *, Hkv=2, G=4, D=128, T=1, B=4, slots=S):
  """q bfloat16, and what is stored: random codes and scales."""
  rng = np.random.default_rng(0)
  bits, tokens, k_channels, v_channels, norms = FORMS[form]
  q = jnp.asarray(rng.normal(size=(B, T, Hkv * G, D)), jnp.bfloat16)

  def side(tokens, channels):
    if bits == 16:
      x = rng.normal(size=(B, slots, Hkv, D))
      return {'codes': jnp.asarray(x, jnp.bfloat16)}
    size = (B, slots, Hkv, D * bits // 8)
    codes = rng.integers(0, 256, size=size).astype('uint8')
    groups = (B, slots // tokens, Hkv, D // channels if channels else 1)
    scale = rng.uniform(2, 4, size=groups) / 2**bits
    if bits == 8:  # Symmetric; the code 255 is not used.
      return {'codes': np.minimum(codes, 254), 'scale': scale, 'center': 127}
    offset = rng.normal(size=groups) / 4 - scale * (2**bits - 1) / 2
    return {'codes': codes, 'scale': scale, 'offset': offset}

  k, v = side(tokens, k_channels), side(1, v_channels)
  if norms:
    k['norm'] = rng.uniform(0.5, 1.5, size=(B, slots, norms, 1))
  dtypes = {'codes': None, 'norm': 'float32'}
  scale_dtype = 'bfloat16' if norms else 'float16'
  sides = []
  for x in (k, v):
    center = x.pop('center', 0)
    arrays = {
      n: jnp.asarray(a, dtypes.get(n, scale_dtype)) for n, a in x.items()
    }
    sides.append(stored.Stored(**arrays, bits=bits, center=center))
  return q, *sides


def decoded(x):
  """float64 values, by NumPy."""
  codes = np.asarray(x.codes)
  if x.bits == 16:
    return codes.astype(np.float64)
  fields = [(codes >> f * x.bits) & (2**x.bits - 1) for f in range(8 // x.bits)]
  out = np.concatenate(fields, axis=-1).astype(np.float64) - x.center

  def spread(a):
    a = np.asarray(a).astype(np.float64)
    a = np.repeat(a, out.shape[1] // a.shape[1], axis=1)
    return np.repeat(a, out.shape[3] // a.shape[3], axis=3)

  out = out * spread(x.scale)
  out = out if x.offset is None else out + spread(x.offset)
  return out if x.norm is None else out * np.asarray(x.norm, np.float64)


def exact(q, k, v, lengths, *, oldest=None, softcap=None, order=None):
  """float64: out (B, T, H, D), log-sum-exp; slots are positions."""
  q = np.asarray(q, np.float64)
  k, v = decoded(k), decoded(v)
  B, T, H, D = q.shape
  out, lses = np.zeros(q.shape), np.full((B, T, H), -np.inf)
  for b, t, h in np.ndindex(B, T, H):
    slots = np.arange(min(lengths[b], k.shape[1]))
    if order is not None:
      slots = order[b]
    if oldest is not None:
      slots = slots[slots >= oldest[b][t]]
    if not slots.size:
      continue
    one = h // (H // k.shape[2])
    s = k[b, slots, one] @ q[b, t, h] / D**0.5
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    p = np.exp(s - s.max())
    out[b, t, h] = p @ v[b, slots, one] / p.sum()
    lses[b, t, h] = s.max() + np.log(p.sum())
  return out, lses


# Interpreted kernels are long programs of small work: compile time is all.
FAST = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


@functools.partial(jax.jit, static_argnames=('options',), compiler_options=FAST)
def _run(q, k, v, lengths, arrays, options):
  return api.decode_attention(
    q, k, v, lengths, **arrays, **{'interpret': True, **dict(options)}
  )


def run(q, k, v, lengths=LENGTHS, arrays=None, **options):
  options = tuple({**KERNEL, 'block': SMALL, **options}.items())
  return _run(q, k, v, jnp.asarray(lengths, jnp.int32), arrays or {}, options)


class KernelTest(parameterized.TestCase):
  def check(self, got, want, rtol=3e-3):
    """Outputs in norm, log-sum-exps one by one."""
    out, lse = (np.asarray(x, np.float64) for x in got)
    self.assertTrue(np.isfinite(out).all())
    error = np.linalg.norm(out - want[0]) / np.linalg.norm(want[0])
    # q, probabilities and folded scales are rounded to bfloat16: 2^-9 each.
    self.assertLess(error, rtol)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want[1]))
    seen = np.isfinite(want[1])
    np.testing.assert_allclose(lse[seen], want[1][seen], atol=0.03)

  @parameterized.named_parameters(
    ('bf16', 'bf16', {}),
    ('bf16_gqa1', 'bf16', {'Hkv': 8, 'G': 1}),
    ('bf16_head64', 'bf16', {'D': 64, 'Hkv': 3, 'G': 3}),
    ('int8', 'int8', {'Hkv': 1}),
    ('int8_head64', 'int8', {'D': 64, 'Hkv': 1, 'G': 8}),
    ('int4', 'int4', {}),
    ('int4_head64', 'int4', {'D': 64, 'G': 1}),
    ('int2', 'int2', {'Hkv': 1, 'G': 8}),
    ('kivi2', 'kivi2', {'Hkv': 1}),
    ('kivi4_head64', 'kivi4', {'D': 64, 'G': 3}),
    ('oscar2', 'oscar2', {'Hkv': 1}),
  )
  def test_is_attention_on_what_is_stored(self, form, sizes):
    q, k, v = make(form, **sizes)
    want = exact(q, k, v, LENGTHS)
    self.check(run(q, k, v), want)
    around = (127, 128, 129, S - 1)  # The ends of a step, and what is beside.
    self.check(run(q, k, v, around), exact(q, k, v, around))
    if sizes.get('D') != 64:
      base = run(q, k, v, implementation='xla', block=None)
      for a, b in zip(base, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)

  @parameterized.parameters('bf16', 'kivi4')
  def test_window_softcap_and_chunks(self, form):
    q, k, v = make(form, T=2, Hkv=1, G=2, D=64)
    window, lengths = 70, np.array(LENGTHS)
    oldest = np.maximum(lengths[:, None] + np.arange(2) - window + 1, 0)
    want = exact(q, k, v, LENGTHS, oldest=oldest, softcap=3.0)
    options = {'window': window, 'softcap': 3.0}
    chunked = tpu.Block(tokens=256, chunk=128)
    self.check(run(q, k, v, block=chunked, **options), want)
    base = run(q, k, v, implementation='xla', block=None, **options)
    np.testing.assert_allclose(base[0], want[0], atol=1e-5)

  @parameterized.parameters('bf16', 'int4')
  def test_pages_in_any_order(self, form):
    q, k, v = make(form, B=2)
    rows = exact(q, k, v, (S, 150))

    def pooled(x, places):  # Page i of all rows lies at places[i].
      def of(a):
        pages = a.reshape(4, 128 * a.shape[1] // S, *a.shape[2:])
        return jnp.zeros((5, *pages.shape[1:]), a.dtype).at[places].set(pages)

      return jax.tree.map(of, x)

    for name in api.IMPLEMENTATIONS:
      found = []
      for order in ((3, 1, 2, 4), (2, 4, 3, 1)):  # Page 0 is nobody's.
        places = jnp.array(order, jnp.int32)
        got = run(
          q,
          pooled(k, places),
          pooled(v, places),
          (S, 150),
          {'table': places.reshape(2, 2)},
          block=None,
          implementation=name,
        )
        self.check(got, rows)
        found.append(got)
      for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)

  @parameterized.parameters('bf16', 'kivi2')
  def test_a_layer_of_a_stack(self, form):
    # Rows 0 and 1 are of the first layer, 2 and 3 of the second.
    q, k, v = make(form, Hkv=1)
    lengths = (S, 150)
    for name in api.IMPLEMENTATIONS:
      block = SMALL if name == KERNEL['implementation'] else None
      for layer in (0, 1):
        rows = slice(2 * layer, 2 * layer + 2)
        one = lambda x, rows=rows: jax.tree.map(lambda a: a[rows], x)
        want = exact(q[rows], one(k), one(v), lengths)
        got = run(
          q[rows],
          k,
          v,
          lengths,
          {'first': jnp.int32(2 * layer)},
          implementation=name,
          block=block,
        )
        self.check(got, want)

  @parameterized.parameters('bf16', 'int4')
  def test_selected_pages(self, form):
    q, k, v = make(form, B=2)
    selected = jnp.array([[1, -1], [-1, 0]], jnp.int32)
    order = (np.arange(128, S), np.arange(100))
    want = exact(q, k, v, (S, 100), order=order)
    for name in api.IMPLEMENTATIONS:
      got = run(
        q,
        k,
        v,
        (S, 100),
        {'selected': selected},
        page_size=128,
        block=None,
        implementation=name,
      )
      self.check(got, want)

  def test_a_ring_is_a_window_of_a_row(self):
    q, k, v = make('bf16', B=3)
    lengths = (100, S, S + 77)
    # Of the last row the 77 newest lie in front; its query does not see the
    # oldest of the S that are held.
    order = (np.arange(100), np.arange(1, S), np.delete(np.arange(S), 77))
    want = exact(q, k, v, lengths, order=order)
    for name in api.IMPLEMENTATIONS:
      block = SMALL if name == KERNEL['implementation'] else None
      got = run(
        q, k, v, lengths, ring=True, window=S, implementation=name, block=block
      )
      self.check(got, want)

  @parameterized.parameters('bf16', 'int8', 'oscar2')
  def test_what_is_behind_the_length_is_never_seen(self, form):
    q, k, v = make(form, Hkv=1)
    lengths = (0, 32, S, 128)

    def spoil(x):
      def of(a):
        if not jnp.issubdtype(a.dtype, jnp.floating):
          return a
        slot = np.arange(a.shape[1]) * (S // a.shape[1])
        behind = slot[None] >= np.array(lengths)[:, None]
        return np.where(behind[:, :, None, None], np.nan, a).astype(a.dtype)

      return jax.tree.map(of, x)

    for one, other in zip(
      run(q, k, v, lengths), run(q, spoil(k), spoil(v), lengths), strict=True
    ):
      np.testing.assert_array_equal(one, other)

  def test_splits_merge_to_one_pass(self):
    q, k, v = make('int4', B=1, Hkv=1, D=64)
    one = run(q, k, v, (200,))
    two = run(q, k, v, (200,), block=dataclasses.replace(SMALL, splits=2))
    for a, b, atol in zip(one, two, (3e-3, 1e-5), strict=True):
      # Other maxima: other roundings of probabilities.
      np.testing.assert_allclose(a, b, atol=atol)

  def test_parts_merge_to_the_whole(self):
    q, k, v = make('bf16', B=1)
    runs = (range(64), range(64, S), range(0))
    parts = [exact(q, k, v, (S,), order=(np.array(r, int),)) for r in runs]
    merged = api.merge([tuple(map(jnp.asarray, part)) for part in parts])
    for a, b in zip(merged, exact(q, k, v, (S,)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)

  def test_one_program_for_all_lengths(self):
    q, k, v = make('int8', Hkv=1, B=1)
    run(q, k, v, (1,))
    before = _run._cache_size()
    for length in (0, 7, 128, S):
      run(q, k, v, (length,))
    self.assertEqual(_run._cache_size(), before)


class CacheTest(parameterized.TestCase):
  def test_choice(self):
    q, k, v = make('int4')
    self.assertEqual(api.choose(q, k, v), 'xla')  # On a CPU.
    for chip in targets.TARGETS:
      self.assertEqual(api.choose(q, k, v, chip=chip), KERNEL['implementation'])
    self.assertEqual(api.choose(q, k, v, chip='h100'), 'xla')
    wide = q.astype(jnp.float32)
    self.assertEqual(api.choose(wide, k, v, chip='v5e'), 'xla')

  def test_bytes(self):
    _, k, v = make('kivi2', B=1)
    # Three bits a value: codes, and two float16 for 32 of them.
    self.assertEqual(api.nbytes(k, v, 1024), 1024 * 2 * 2 * 128 * 3 // 8)

  @parameterized.named_parameters(
    ('chip', {'chip': 'v4'}, "chip is 'v4'; it runs on .'tpu7x', 'v5e'"),
    ('q', {'q': jnp.float32}, 'q is float32; it takes bfloat16'),
    ('queries', {'T': 40}, '160 queries of a key head; it takes 64'),
    ('heads', {'Hkv': 3}, r'3 key heads; it takes \[1, 2, 4, 8, 16, 32\]'),
    ('head_dim', {'D': 256}, 'head_dim=256; it takes 128 and what is below'),
    ('slots', {'slots': 72}, '72 slots in a row; it takes multiples of 16'),
  )
  def test_a_named_kernel_refuses(self, changed, message):
    sizes = {
      n: x for n, x in changed.items() if n in ('T', 'D', 'Hkv', 'slots')
    }
    q, k, v = make('bf16', **sizes)
    q = q.astype(changed.get('q', q.dtype))
    with self.assertRaisesRegex(NotImplementedError, message):
      run(q, k, v, block=None, chip=changed.get('chip', 'v5e'))

  def test_messages(self):
    q, k, v = make('bf16')
    with self.assertRaisesRegex(ValueError, "'triton'; allowed .*'xla'"):
      run(q, k, v, implementation='triton')
    with self.assertRaisesRegex(ValueError, 'chunk=96 with pages of 128'):
      run(
        q,
        k,
        v,
        block=tpu.Block(tokens=96, chunk=96),
        arrays={'selected': jnp.zeros((4, 1), jnp.int32)},
        page_size=128,
      )
    with self.assertRaisesRegex(ValueError, 'chunk=100, splits=1; chunk must'):
      tpu.Block(tokens=200, chunk=100)
    with self.assertRaisesRegex(ValueError, 'their heads divide its heads'):
      run(q[:, :, :3], k, v)
    with self.assertRaisesRegex(ValueError, r'lengths \(2,\) and 4 rows'):
      run(q, k, v, (1, 2))
    with self.assertRaisesRegex(ValueError, r'first \(\) with 4 rows of k'):
      run(q[:3], k, v, (1, 2, 3), {'first': jnp.int32(0)})
    with self.assertRaisesRegex(ValueError, 'page_size=100 with 256 slots'):
      run(
        q,
        k,
        v,
        arrays={'selected': jnp.zeros((4, 1), jnp.int32)},
        page_size=100,
      )
    with self.assertRaisesRegex(ValueError, 'ring=True with pages'):
      run(q, k, v, ring=True, arrays={'table': jnp.zeros((4, 1), jnp.int32)})
    with self.assertRaisesRegex(ValueError, 'v has norms; only keys may'):
      run(q, k, dataclasses.replace(v, norm=jnp.ones((4, S, 1, 1))))
    with self.assertRaisesRegex(ValueError, 'k has floating codes with bits=4'):
      run(q, dataclasses.replace(k, bits=4), v)
    with self.assertRaisesRegex(TypeError, 'k has codes of int8; allowed'):
      run(q, dataclasses.replace(k, codes=k.codes.astype(jnp.int8)), v)
    _, k, v = make('kivi2')
    with self.assertRaisesRegex(
      ValueError, 'page_size=16, groups of 32 tokens'
    ):
      run(
        q, k, v, arrays={'selected': jnp.zeros((4, 1), jnp.int32)}, page_size=16
      )
    with self.assertRaisesRegex(ValueError, 'k has bits=3, a scale=True'):
      run(q, dataclasses.replace(k, bits=3), v)
    with self.assertRaisesRegex(ValueError, 'scales are .B, S / tokens'):
      run(q, dataclasses.replace(k, scale=k.scale[:, :3]), v)
    with self.assertRaisesRegex(ValueError, 'they are shaped alike'):
      run(q, dataclasses.replace(k, offset=k.offset[:, :1]), v)


if __name__ == '__main__':
  absltest.main()

"""The contract of jaxq.tokens.interface, for every reducer in the registry.

One function per reducer runs it on a batch and gives the gradients too, so that
each is compiled once; every check below is on what that function returns for
other values of the same shapes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, registry

_BATCH = 4
# What is compiled runs a few times only.
_FAST_COMPILE = {
  'xla_backend_optimization_level': '0',
  'xla_llvm_disable_expensive_passes': True,
}
# Variants of registered reducers that take other paths.
_VARIANTS = (
  'prumerge_plus:adaptive=false',
  'sparsevlm:recycle=false',
  'tome:partition=random',
  'visionzip:merge=mean',
  'vqtoken_codes:positions=sequence',
)
NAMES = (*sorted(registry.REDUCERS), *_VARIANTS)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
  """A reducer with inputs; `run` is compiled once."""

  example: interface.Example
  traits: interface.Traits
  ts: interface.TokenSet
  given: dict[str, Any]
  k: jax.Array

  @property
  def k_max(self):
    return self.example.k_max

  def run(self, **changes):
    """(Reduced, gradients of its tokens to tokens and scores)."""
    values = {'ts': self.ts, 'given': self.given, 'k': self.k, **changes}
    return _run(self.example)(values['ts'], values['given'], values['k'])


@functools.cache
def case(name):
  config = registry.parse(name)
  example = config.example()
  traits = example.reducer.traits
  T, H, W = example.grid
  N, D = T * H * W + example.special, example.dim
  keys = iter(jax.random.split(jax.random.key(0), 8))
  mask = np.ones((_BATCH, N), bool)
  mask[1, N // 3 :: 5] = False  # Holes.
  mask[2, N // 2 :] = False
  mask[3] = False  # Nothing: C8.
  positions = np.concatenate(
    [np.zeros((example.special, 3)), np.indices(example.grid).reshape(3, -1).T]
  )
  axes = max(example.position_axes, traits.position_axes)
  if axes > 3:
    positions = np.pad(positions, ((0, 0), (0, axes - 3)))
  where = jnp.asarray(positions[:, :axes], jnp.int32)
  modality = jnp.arange(N)[None] >= N // 2 if traits.modality else None
  ts = interface.token_set(
    jax.random.normal(next(keys), (_BATCH, N, D)),
    mask=jnp.asarray(mask),
    positions=jnp.broadcast_to(where, (_BATCH, N, axes)),
    size=jax.random.uniform(next(keys), (_BATCH, N), minval=1.0, maxval=3.0),
    modality=None
    if modality is None
    else jnp.broadcast_to(modality, (_BATCH, N)).astype(jnp.int32),
    grid=example.grid,
    special=example.special,
  )
  given: dict[str, Any] = {}
  if traits.scores:
    given['scores'] = jax.random.uniform(next(keys), (_BATCH, N))
  if traits.query:
    shape = (_BATCH, example.query_length, example.query_dim)
    given['query'] = jax.random.normal(next(keys), shape)
    given['query_mask'] = jnp.arange(shape[1])[None] < jnp.array(
      [[shape[1]], [2], [1], [shape[1]]]
    )
  if traits.rng:
    given['rng'] = next(keys)
  if traits.params:
    given['params'] = jax.jit(
      example.reducer.init_params, compiler_options=_FAST_COMPILE
    )(next(keys), ts, given.get('query'))
  k = jnp.array([example.k_max, example.k_max, 1, example.k_max])
  return Case(example=example, traits=traits, ts=ts, given=given, k=k)


@functools.cache
def _run(example):
  def tokens_of(tokens, scores, ts, given, k):
    if scores is not None:
      given = {**given, 'scores': scores}
    reduced = example.reducer.reduce(
      ts.replace(tokens=tokens),
      budget=interface.Budget(k_max=example.k_max, k=k),
      **given,
    )
    return jnp.sum(jnp.sin(reduced.tokens)), reduced

  @functools.partial(jax.jit, compiler_options=_FAST_COMPILE)
  def run(ts, given, k):
    scores = given.get('scores')
    rest = {name: v for name, v in given.items() if name != 'scores'}
    both = (0,) if scores is None else (0, 1)
    grad = jax.grad(tokens_of, argnums=both, has_aux=True)
    grads, reduced = grad(ts.tokens, scores, ts, rest, k)
    return reduced, grads

  return run


def _nothing_lost(tree):
  """numpy leaves of a pytree."""
  return jax.tree.map(np.asarray, tree)


class ContractTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_shapes_dtypes_and_one_compile(self, name):
    c = case(name)
    reduced, _ = c.run()
    B, K, N = _BATCH, c.k_max, c.ts.mask.shape[1]
    P = c.ts.positions.shape[-1]
    expected = {
      'mask': ((B, K), bool),
      'positions': ((B, K, P), np.int32),
      'size': ((B, K), np.float32),
      'index': ((B, K), np.int32),
      'assignment': ((B, N), np.int32),
      'count': ((B,), np.int32),
    }
    for field, (shape, dtype) in expected.items():
      value = getattr(reduced, field)
      self.assertEqual(value.shape, shape, field)
      self.assertEqual(value.dtype, dtype, field)
    self.assertEqual(reduced.tokens.shape[:2], (B, K))
    self.assertEqual(reduced.tokens.dtype, c.ts.tokens.dtype)
    ts = c.ts.replace(
      mask=~c.ts.mask.at[0].set(False), tokens=c.ts.tokens[::-1] + 1
    )
    given = dict(c.given)
    if 'scores' in given:
      given['scores'] = -given['scores']
    c.run(ts=ts, given=given, k=c.k // 2)
    self.assertEqual(_run(c.example)._cache_size(), 1)

  @parameterized.parameters(*NAMES)
  def test_slots_in_use_come_first_and_others_are_empty(self, name):
    c = case(name)
    for k in (c.k, c.k // 2):
      r = _nothing_lost(c.run(k=k)[0])
      self.assertTrue((r.count <= np.asarray(k)).all(), r.count)
      np.testing.assert_array_equal(r.count, r.mask.sum(1))
      used = np.arange(c.k_max)[None] < r.count[:, None]
      np.testing.assert_array_equal(r.mask, used)
      for field in ('tokens', 'size', 'positions'):
        self.assertFalse(getattr(r, field)[~used].any(), field)
      self.assertTrue((r.index[~used] == -1).all())
      self.assertTrue((r.assignment[~np.asarray(c.ts.mask)] == -1).all())
      self.assertTrue((r.assignment >= -1).all())
      self.assertTrue((r.assignment < np.maximum(r.count, 1)[:, None]).all())

  @parameterized.parameters(*NAMES)
  def test_assignment_index_and_order(self, name):
    c = case(name)
    r, ts = _nothing_lost((c.run()[0], c.ts))
    kind = c.traits.kind
    for b in range(_BATCH):
      slots = np.flatnonzero(r.index[b] >= 0)
      sources = r.index[b, slots]
      if c.traits.ordered:
        self.assertTrue((np.diff(sources) > 0).all(), sources)
      if kind in ('selector', 'merger'):
        np.testing.assert_array_equal(r.assignment[b, sources], slots)
        np.testing.assert_array_equal(
          r.positions[b, slots], ts.positions[b, sources]
        )
      if kind == 'selector':
        self.assertLen(slots, r.count[b])
        self.assertEqual((r.assignment[b] >= 0).sum(), r.count[b])
        np.testing.assert_array_equal(r.size[b, slots], ts.size[b, sources])
      elif kind == 'merger':
        for s in range(r.count[b]):
          np.testing.assert_allclose(
            r.size[b, s], ts.size[b][r.assignment[b] == s].sum(), rtol=1e-5
          )

  @parameterized.parameters(*NAMES)
  def test_mass(self, name):
    c = case(name)
    r, ts = _nothing_lost((c.run()[0], c.ts))
    if c.traits.kind == 'selector':
      if c.traits.differentiable_scores:
        self.skipTest('its tokens are scaled by straight-through weights')
      for b in range(_BATCH):
        kept = r.tokens[b, : r.count[b]]
        np.testing.assert_array_equal(
          kept.view(np.int32),
          ts.tokens[b, r.index[b, : r.count[b]]].view(np.int32),
        )
    elif c.traits.conserves_mass and c.traits.kind != 'generator':
      assigned = np.where(r.assignment >= 0, ts.size, 0)
      before = np.einsum('bn,bnd->bd', assigned, np.nan_to_num(ts.tokens))
      after = np.einsum('bk,bkd->bd', r.size, r.tokens)
      np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)
    else:
      self.skipTest('its traits promise no mass')

  @parameterized.parameters(*NAMES)
  def test_the_batch_permutes_and_padding_never_matters(self, name):
    c = case(name)
    r = _nothing_lost(c.run()[0])
    if not c.traits.rng:
      order = np.array([2, 0, 3, 1])
      batch = {
        field: c.given[field][order]
        for field in ('scores', 'query', 'query_mask')
        if field in c.given
      }
      permuted, _ = c.run(
        ts=jax.tree.map(lambda a: a[order], c.ts),
        given={**c.given, **batch},
        k=c.k[order],
      )
      for field in ('index', 'assignment', 'count', 'positions'):
        np.testing.assert_array_equal(
          getattr(permuted, field), getattr(r, field)[order], field
        )
      np.testing.assert_allclose(
        permuted.tokens, r.tokens[order], rtol=1e-5, atol=1e-5
      )
    fill = lambda a, value: jnp.where(
      c.ts.mask.reshape(c.ts.mask.shape + (1,) * (a.ndim - 2)), a, value
    )
    given = dict(c.given)
    if 'scores' in given:
      given['scores'] = fill(given['scores'], 1e9)
    ts = c.ts.replace(
      tokens=fill(c.ts.tokens, jnp.nan), size=fill(c.ts.size, 7.0)
    )
    other, grads = c.run(ts=ts, given=given)
    for field in ('tokens', 'size', 'index', 'assignment', 'count'):
      np.testing.assert_array_equal(
        getattr(other, field), getattr(r, field), field
      )
    for g in grads:
      self.assertTrue(np.isfinite(g).all())

  @parameterized.parameters(*NAMES)
  def test_all_slots_are_the_identity_for_selectors(self, name):
    c = case(name)
    own = c.example.reducer
    if c.traits.kind != 'selector' or not getattr(own, 'keeps_all', True):
      self.skipTest('only a selector that can keep everything')
    N = c.ts.mask.shape[1]
    reduced = jax.jit(
      lambda ts, given: own.reduce(
        ts, budget=interface.Budget(k_max=N), **given
      ),
      compiler_options=_FAST_COMPILE,
    )(c.ts, c.given)
    mask = np.asarray(c.ts.mask)
    np.testing.assert_array_equal(reduced.count, mask.sum(1))
    for b in range(_BATCH):
      np.testing.assert_array_equal(
        reduced.index[b][reduced.mask[b]], np.flatnonzero(mask[b])
      )
    np.testing.assert_array_equal(reduced.tokens[0], np.asarray(c.ts.tokens[0]))

  @parameterized.parameters(*NAMES)
  def test_gradients(self, name):
    c = case(name)
    reduced, grads = c.run()
    for g in grads:
      self.assertTrue(np.isfinite(g).all())
    if c.traits.kind != 'generator':
      self.assertTrue(np.any(grads[0][0] != 0))
    if c.traits.differentiable_scores and len(grads) > 1:
      self.assertTrue(np.any(grads[1] != 0))
    self.assertFalse(np.any(grads[0][3]))  # The row that is all masked.
    for leaf in jax.tree.leaves(reduced):
      self.assertTrue(np.isfinite(leaf).all())
    _, grads = c.run(k=jnp.array([1, 0, 1, 0]))
    for g in grads:
      self.assertTrue(np.isfinite(g).all())

  @parameterized.parameters(*NAMES)
  def test_missing_arguments_are_named(self, name):
    c = case(name)
    for needed in ('scores', 'query', 'rng', 'params'):
      if getattr(c.traits, needed):
        given = {
          key: value
          for key, value in c.given.items()
          if key not in (needed, f'{needed}_mask')
        }
        with self.assertRaisesRegex(ValueError, f'{needed}=None; this reducer'):
          c.example.reducer.reduce(c.ts, **given)
    if c.traits.class_token:
      with self.assertRaisesRegex(ValueError, 'needs a class token'):
        c.example.reducer.reduce(c.ts.replace(special=0, grid=None), **c.given)


if __name__ == '__main__':
  absltest.main()

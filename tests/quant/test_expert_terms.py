"""Tests of jaxq.quant.expert_terms, on two planted modalities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import linear, routed_low_rank
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import expert_terms
from tests.quant import planted

W4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=16)
C, N = planted.C, 48
# The ranks of the planted outliers: 2 common channels, 4 of each modality.
RANKS = {'shared_rank': 2, 'num_experts': 2, 'expert_rank': 4}


def config(**fields):
  fields = {'skip_tokens': 0, 'share': 0.1, 'modalities': 2, **RANKS, **fields}
  return expert_terms.TermsConfig(**fields)


@functools.cache
def data(seed=1):
  """x (8, 32, C), modality (8, 32), E of two linears, E[x x^T]."""
  x, modality = planted.modal_inputs(seed)
  errors = {}
  for i, (name, width) in enumerate((('q', N), ('k', 2 * N))):
    w = jax.random.normal(jax.random.key(i), (C, width)) / 8
    errors[name] = w - qarray.fake_quant(w, W4)
  flat = x.reshape(-1, C)
  return x, modality, errors, flat.T @ flat / flat.shape[0]


@functools.cache
def fitted(**fields):
  x, modality, errors, gram = data()
  if fields.get('gram') == 'diagonal':
    gram = jnp.mean(jnp.abs(x), axis=(0, 1))
  run = jax.jit(expert_terms.fit_terms, static_argnums=4)
  return run(errors, gram, x, modality, config(**fields))


def left(terms, x=None):
  """Mean squared output error of 'q' behind its term."""
  x = data()[0] if x is None else x
  made = jnp.zeros(()) if terms is None else terms['q'](x)
  return float(jnp.mean(jnp.square(x @ data()[2]['q'] - made)))


@functools.cache
def routing(**fields):
  x, modality, errors, _ = data()
  norms = jnp.sqrt(sum(jnp.sum(e**2, axis=1) for e in errors.values()))
  return expert_terms.route(x, norms, modality, config(**fields))


class ExactTest(parameterized.TestCase):
  @parameterized.parameters('q', 'k')  # K above N, and below.
  def test_without_experts_and_diagonal_it_is_lqer(self, name):
    """S = diag(mean |x|), S E = U s V^T; A = S^-1 U_r, B = s_r V_r^T."""
    terms = fitted(
      num_experts=0, shared_rank=6, gram='diagonal', dtype='float32'
    )
    self.assertIsInstance(terms[name], linear.LowRank)
    x, _, errors, _ = data()
    scale = np.mean(np.abs(np.asarray(x, np.float64)), axis=(0, 1))
    e = np.asarray(errors[name], np.float64)
    u, s, v = np.linalg.svd(scale[:, None] * e, full_matrices=False)
    expected = (u[:, :6] / scale[:, None] * s[:6]) @ v[:6]
    np.testing.assert_allclose(terms[name].product, expected, atol=1e-5)

  @parameterized.product(name=('q', 'k'), gram=('full', 'diagonal'))
  def test_the_full_rank_is_exact(self, name, gram):
    x, _, errors, full = data()
    given = full if gram == 'full' else jnp.mean(jnp.abs(x), axis=(0, 1))
    rank = min(errors[name].shape)
    how = config(num_experts=0, shared_rank=rank, gram=gram, dtype='float32')
    terms = expert_terms.fit_terms({name: errors[name]}, given, None, None, how)
    exact = x @ errors[name]
    error = jnp.max(jnp.abs(terms[name](x) - exact)) / jnp.max(jnp.abs(exact))
    self.assertLess(float(error), 1e-4)

  @parameterized.parameters('linear', 'importance')
  def test_no_term_makes_it_worse(self, router):
    """base >= shared >= routed, and so it is for each expert's tokens."""
    x, _, errors, _ = data()
    routed = fitted(router=router)['q']
    shared = linear.LowRank(routed.a[:, :2], routed.b[:2])
    y = x @ errors['q']
    parts = [y, y - shared(x), y - routed(x)]
    base, one, both = (float(jnp.mean(jnp.square(part))) for part in parts)
    self.assertGreater(base, one)
    self.assertGreater(one, both)
    gates = routed_low_rank.gates(x, routed.router, routed.weight, 1)
    for e in range(2):
      own = gates[..., e] > 0
      self.assertGreater(int(jnp.sum(own)), 0)
      before, after = (
        float(jnp.sum(jnp.square(part[own]))) for part in parts[1:]
      )
      self.assertLess(after, before)

  def test_tokens_go_where_their_modality_goes(self):
    found = routing()
    _, modality, _, _ = data()
    self.assertTrue(bool(found.enough))
    np.testing.assert_array_equal(
      np.flatnonzero(found.channels.independent), planted.COMMON
    )
    dependent = set(np.flatnonzero(found.channels.dependent))
    self.assertContainsSubset(set(sum(planted.MODAL, ())), dependent)
    flat = modality.reshape(-1)
    routed = jnp.argmax(found.gates, axis=1)
    for labels, least in ((found.clusters.labels, 0.98), (routed, 0.9)):
      same = float(jnp.mean((labels == flat).astype(jnp.float32)))
      self.assertGreater(max(same, 1 - same), least)
    for e in range(2):
      liked = set(np.flatnonzero(found.lift[e] > 1.2)) & dependent
      self.assertIn(
        liked & set(sum(planted.MODAL, ())), map(set, planted.MODAL)
      )

  @parameterized.parameters(
    ({'features': 'member'},),
    ({'router': 'importance'},),
    ({'features': 'member', 'router': 'importance'},),
  )
  def test_every_way_to_route_gains(self, fields):
    self.assertLess(left(fitted(**fields)), 0.5 * left(None))

  def test_unsigned_outliers_need_the_importance_router(self):
    x, modality, errors, _ = data()
    x = x * jax.random.rademacher(jax.random.key(3), (8, 32, 1), jnp.float32)
    flat = x.reshape(-1, C)
    error = {}
    for router in ('linear', 'importance'):
      terms = expert_terms.fit_terms(
        errors, flat.T @ flat / len(flat), x, modality, config(router=router)
      )
      error[router] = left(terms, x)
    self.assertLess(error['importance'], 0.85 * error['linear'])


class GainTest(parameterized.TestCase):
  def test_at_equal_work_it_beats_a_single_term(self):
    ours = left(fitted())
    single = left(fitted(num_experts=0, shared_rank=6))
    self.assertLess(ours, 0.7 * single)
    # Other tokens of the same kind.
    fresh = planted.modal_inputs(seed=5)[0]
    self.assertLess(
      left(fitted(), fresh),
      0.7 * left(fitted(num_experts=0, shared_rank=6), fresh),
    )

  def test_at_equal_size_a_single_term_is_no_worse(self):
    """It cannot be: see the module docstring of quant_experts."""
    ours = left(fitted())
    single = left(fitted(num_experts=0, shared_rank=10))
    self.assertLess(single, 1.01 * ours)  # Damping, and bfloat16.
    # What the shared term takes of the output is not what experts lack.
    self.assertLess(ours, 3 * single)

  def test_eigenvalues_of_a_sum_of_gram_matrices(self):
    """Why: sum_{i > r1 + r2} of G1 + G2 <= those beyond r1, r2 of each."""
    rng = np.random.default_rng(0)
    for _ in range(20):
      d1, d2 = (rng.normal(size=(12, 12)) ** 3 for _ in range(2))
      tails = [
        np.sort(np.linalg.eigvalsh(g))[::-1][r:].sum()
        for g, r in (
          (d1 @ d1.T, 3),
          (d2 @ d2.T, 2),
          (d1 @ d1.T + d2 @ d2.T, 5),
        )
      ]
      self.assertLessEqual(tails[2], tails[0] + tails[1] + 1e-9)

  def test_whitening_beats_the_diagonal_on_correlated_inputs(self):
    keys = jax.random.split(jax.random.key(7), 2)
    latent = jax.random.normal(keys[0], (8, 32, 6))
    x = latent @ jax.random.normal(keys[1], (6, C)) + 0.1 * data()[0]
    flat = x.reshape(-1, C)
    errors = data()[2]
    grams = {
      'full': flat.T @ flat / len(flat),
      'diagonal': jnp.mean(jnp.abs(flat), axis=0),
    }
    found = {
      name: expert_terms.fit_terms(
        errors, gram, None, None, config(num_experts=0, gram=name)
      )
      for name, gram in grams.items()
    }
    self.assertLess(left(found['full'], x), 0.7 * left(found['diagonal'], x))


class ContractTest(parameterized.TestCase):
  @parameterized.parameters('bfloat16', 'float32', 'int8')
  def test_shapes_and_dtypes(self, dtype):
    terms = fitted(dtype=dtype)
    for name, width in (('q', N), ('k', 2 * N)):
      term = terms[name]
      self.assertEqual(term.a.shape, (C, 10))
      self.assertEqual(term.b.shape, (10, width))
      leaf = term.a.qvalue if dtype == 'int8' else term.a
      self.assertEqual(leaf.dtype, jnp.dtype(dtype))
      self.assertEqual(term.active, 6)
    np.testing.assert_array_equal(terms['q'].router, terms['k'].router)
    self.assertLess(left(terms), 1.1 * left(fitted(dtype='float32')))

  def test_limited_rows_are_zero_elsewhere(self):
    term = fitted(rows='channels')['q']
    touched = np.flatnonzero(jnp.any(term.a[:, :2] != 0, axis=1))
    np.testing.assert_array_equal(touched, planted.COMMON)
    for e in range(2):
      own = term.a[:, 2 + 4 * e : 6 + 4 * e]
      rows = set(np.flatnonzero(jnp.any(own != 0, axis=1)))
      self.assertEmpty(rows & set(planted.COMMON))
      self.assertNotEmpty(rows)
    self.assertLess(left({'q': term}), left(None))

  def test_upweighted_channels_are_met_better(self):
    _, _, errors, gram = data()
    common = jnp.array(planted.COMMON)

    def rest(upweight):
      term = fitted(num_experts=0, shared_rank=2, upweight=upweight)['q']
      return float(jnp.sum((errors['q'] - term.product)[common] ** 2))

    self.assertLess(rest(30.0), 0.5 * rest(1.0))
    self.assertGreater(float(gram[2, 2]), 100)

  def test_two_experts_of_a_token(self):
    two = fitted(num_experts=3, top_k=2, expert_rank=2)['q']
    self.assertEqual(two.active, 6)
    y = data()[0] @ data()[2]['q']
    shared = linear.LowRank(two.a[:, :2], two.b[:2])
    before = float(jnp.mean(jnp.square(y - shared(data()[0]))))
    self.assertLess(left({'q': two}), before)

  def test_padding_changes_nothing(self):
    x, modality, errors, gram = data()
    made = [
      expert_terms.fit_terms(errors, gram, padded, m, config(dtype='float32'))[
        'q'
      ]
      for padded, m in (
        (x, modality),
        (
          jnp.concatenate([x, jnp.zeros((3, 32, C))]),
          jnp.concatenate([modality, jnp.zeros((3, 32), jnp.int32)]),
        ),
      )
    ]
    self.assertLess(abs(left({'q': made[1]}) / left({'q': made[0]}) - 1), 0.05)

  def test_the_first_tokens_have_no_say(self):
    x, modality, errors, _ = data()
    norms = jnp.sqrt(jnp.sum(errors['q'] ** 2, axis=1))
    sink = x.at[:, 0].set(0.0).at[:, 0, 20].set(1e4)
    how = config(skip_tokens=1)
    found = [
      expert_terms.route(a, norms, modality, how).channels for a in (x, sink)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)

  def test_too_few_tokens_get_the_shared_term(self):
    x, modality, errors, gram = data()
    few = x[:2, :16]
    terms = expert_terms.fit_terms(
      errors, gram, few, modality[:2, :16], config()
    )
    np.testing.assert_array_equal(terms['q'].b[2:], 0)
    self.assertTrue(bool(jnp.any(terms['q'].b[:2] != 0)))

  def test_tokens_all_alike_give_nan(self):
    x, modality, errors, gram = data()
    same = jnp.broadcast_to(x[:1, :1], x.shape)
    terms = expert_terms.fit_terms(errors, gram, same, modality, config())
    self.assertTrue(bool(jnp.all(jnp.isnan(terms['q'].b[2:]))))

  def test_a_gram_matrix_with_nan_gives_nan(self):
    _, _, errors, gram = data()
    terms = expert_terms.fit_terms(
      errors, gram.at[3, 3].set(jnp.nan), None, None, config(num_experts=0)
    )
    self.assertTrue(bool(jnp.all(jnp.isnan(terms['q'].b))))


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(router='mlp'), r"router='mlp'; allowed \['importance', 'linear'\]"),
    (dict(gram='block'), r"gram='block'; allowed \['diagonal', 'full'\]"),
    (dict(rows='some'), r"rows='some'; allowed \['all', 'channels'\]"),
    (dict(features='x'), r"features='x'; allowed \['importance', 'member'\]"),
    (dict(dtype='int4'), r"dtype='int4'; allowed \['bfloat16', 'float32'"),
    (dict(shared_rank=-1), 'shared_rank=-1; allowed 0 to'),
    (dict(expert_rank=0), 'expert_rank=0; allowed 1 to'),
    (dict(num_experts=65), 'num_experts=65; allowed 0 to 64'),
    (dict(tau=1.5), 'tau=1.5; allowed'),
    (dict(share=0.0), 'share=0.0; allowed'),
    (dict(top_k=3), 'top_k=3 of num_experts=2; allowed 1 to 2'),
    (dict(top_k=0), 'top_k=0 of num_experts=2'),
  )
  def test_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      config(**fields)

  @parameterized.parameters(
    ({'shared_rank': 49, 'num_experts': 0},), ({'expert_rank': 49},)
  )
  def test_a_rank_larger_than_the_layer(self, fields):
    x, modality, errors, gram = data()
    errors = {'q': errors['q']}
    with self.assertRaisesRegex(
      ValueError, r'rank=49 is larger than a layer of shape \(64, 48\)'
    ):
      expert_terms.fit_terms(errors, gram, x, modality, config(**fields))

  def test_a_config_is_hashable(self):
    self.assertEqual(hash(config()), hash(dataclasses.replace(config())))


if __name__ == '__main__':
  absltest.main()

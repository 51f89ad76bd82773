"""Tests of jaxq.nn.moe and jaxq.nn.mlp."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import mlp, moe

C, E, K, F = 6, 5, 2, 7


def made(**fields):
  """A layer, its params and an input (2, 9, C)."""
  module = moe.SparseMLP(E, K, F, **fields)
  x = jax.random.normal(jax.random.key(0), (2, 9, C))
  return module, module.init(jax.random.key(1), x)['params'], x


def reference(params, x, normalize):
  """One token at a time, in NumPy: (tokens, C) -> (tokens, C), chosen."""
  params = jax.tree.map(np.asarray, params)
  out, chosen = np.zeros_like(x), []
  for t, row in enumerate(x):
    logits = row @ params['router']['kernel']
    p = np.exp(logits - logits.max())
    p /= p.sum()
    best = np.argsort(-p)[:K]
    weights = p[best] / p[best].sum() if normalize else p[best]
    for weight, e in zip(weights, best, strict=True):
      kernels = {k: v['kernel'] for k, v in params[f'expert_{e}'].items()}
      gate = row @ kernels['gate_proj']
      hidden = gate / (1 + np.exp(-gate)) * (row @ kernels['up_proj'])
      out[t] += weight * (hidden @ kernels['down_proj'])
    chosen.append(set(best.tolist()))
  return out, chosen


class SparseMlpTest(parameterized.TestCase):
  @parameterized.product(normalize=(True, False), jit=(True, False))
  def test_against_one_token_at_a_time(self, normalize, jit):
    module, params, x = made(normalize=normalize)
    apply = jax.jit(module.apply) if jit else module.apply
    got = apply({'params': params}, x)
    expected, _ = reference(params, np.asarray(x).reshape(-1, C), normalize)
    np.testing.assert_allclose(got.reshape(-1, C), expected, atol=1e-5)

  def test_taps_of_an_expert_see_its_own_tokens(self):
    module, params, x = made()
    _, updated = module.apply({'params': params}, x, mutable=['tapped'])
    tapped = jax.tree.map(np.asarray, updated['tapped'])
    _, chosen = reference(params, np.asarray(x).reshape(-1, C), True)
    np.testing.assert_array_equal(tapped['in'], x)
    routed = tapped['routed'].reshape(-1, E)
    for t, best in enumerate(chosen):
      self.assertEqual(set(np.flatnonzero(routed[t]).tolist()), best)
    for e in range(E):
      for name in ('gate_proj', 'up_proj', 'down_proj'):
        seen = tapped[f'expert_{e}'][name]['in'].reshape(len(routed), -1)
        np.testing.assert_array_equal(np.any(seen != 0, -1), routed[:, e] > 0)

  def test_all_experts_see_all_tokens_and_nothing_else_changes(self):
    module, params, x = made()
    every = module.clone(all_experts=True)
    y, updated = every.apply({'params': params}, x, mutable=['tapped'])
    for e in range(E):
      for name in ('gate_proj', 'down_proj'):
        seen = np.asarray(updated['tapped'][f'expert_{e}'][name]['in'])
        self.assertTrue(np.all(np.any(seen != 0, -1)))
    np.testing.assert_allclose(
      y, module.apply({'params': params}, x), atol=1e-6
    )

  def test_biases_do_not_reach_tokens_of_other_experts(self):
    module, params, x = made()
    add = lambda leaves: {**leaves, 'bias': jnp.ones(leaves['kernel'].shape[1])}
    for e in range(E):
      expert = params[f'expert_{e}']
      expert = {name: add(leaves) for name, leaves in expert.items()}
      params = {**params, f'expert_{e}': expert}
    _, updated = module.apply({'params': params}, x, mutable=['tapped'])
    tapped = jax.tree.map(np.asarray, updated['tapped'])
    seen = tapped['expert_0']['down_proj']['in']
    np.testing.assert_array_equal(
      np.any(seen != 0, -1), tapped['routed'][..., 0] > 0
    )


class MlpTest(parameterized.TestCase):
  @parameterized.parameters(
    ('relu', lambda x: np.maximum(x, 0)),
    ('silu', lambda x: x / (1 + np.exp(-x))),
  )
  def test_without_a_gate(self, activation, f):
    module = mlp.MLP(F, activation=activation, gated=False, use_bias=True)
    x = jax.random.normal(jax.random.key(0), (1, 3, C))
    params = module.init(jax.random.key(1), x)['params']
    params['up_proj']['bias'] = jnp.arange(F, dtype=jnp.float32) - 3
    up, down = (params[f'{name}_proj']['kernel'] for name in ('up', 'down'))
    hidden = f(np.asarray(x[0] @ up) + np.arange(F) - 3)
    np.testing.assert_allclose(
      module.apply({'params': params}, x)[0],
      hidden @ np.asarray(down),
      rtol=1e-4,
    )


if __name__ == '__main__':
  absltest.main()

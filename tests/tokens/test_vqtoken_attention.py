"""VQToken's attention: identity, equivariance, parity, what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, training, vqtoken, vqtoken_attention
from tests.parity import oracle

K, D, T = 5, 16, 3
MODULE = vqtoken_attention.VQAttention(num_heads=4, ffn=32)
apply = jax.jit(MODULE.apply, static_argnums=4)


def made(seed=0):
  """(params, codes, features, mask), all codes in use."""
  keys = jax.random.split(jax.random.key(seed), 3)
  codes = jax.random.normal(keys[0], (1, K, D))
  features = jax.random.uniform(keys[1], (1, K, T, 3))
  mask = jnp.ones((1, K), bool)
  params = jax.jit(MODULE.init)(keys[2], codes, features, mask)['params']
  return params, codes, features, mask


class AttentionTest(parameterized.TestCase):
  def test_without_outputs_it_is_the_codebook(self):
    params, codes, features, mask = made()
    params = vqtoken_attention.zero_outputs(params)
    out = apply({'params': params}, codes, features, mask)
    np.testing.assert_array_equal(out, codes)

  def test_permuted_codes_are_permuted(self):
    params, codes, features, mask = made()
    order = np.array([3, 0, 4, 2, 1])
    out = apply({'params': params}, codes, features, mask)
    permuted = apply(
      {'params': params}, codes[:, order], features[:, order], mask
    )
    np.testing.assert_allclose(permuted, out[:, order], atol=1e-5)
    self.assertGreater(float(jnp.abs(out - codes).max()), 0.1)

  def test_codes_out_of_use_change_nothing(self):
    params, codes, features, mask = made()
    mask = mask.at[0, 3:].set(False)
    run = lambda codes: apply({'params': params}, codes, features, mask)
    out, other = run(codes), run(codes.at[0, 3:].add(9.0))
    np.testing.assert_array_equal(out[:, :3], other[:, :3])

  def test_dropout_only_in_training(self):
    params, codes, features, mask = made()
    run = lambda key: apply(
      {'params': params}, codes, features, mask, True, rngs={'dropout': key}
    )
    a, b = run(jax.random.key(0)), run(jax.random.key(1))
    self.assertTrue(np.any(a != b))

  def test_map_features_by_hand(self):
    ts = interface.token_set(jnp.ones((1, 8, 2)), grid=(2, 2, 2))
    assignment = jnp.array([[0, 0, 1, 1, 1, 1, 1, 0]])
    got = vqtoken_attention.map_features(assignment, ts, 3)
    np.testing.assert_allclose(
      got[0],
      [
        [[0.5, 0.25, 0.5], [0.25, 0.75, 0.75]],
        [[0.5, 0.75, 0.5], [0.75, 5 / 12, 5 / 12]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
      ],
      rtol=1e-6,
    )

  def test_heads_must_divide_the_width(self):
    with self.assertRaisesRegex(ValueError, 'width 16 and num_heads=3'):
      vqtoken_attention.check_heads(16, 3)


class ReferenceTest(parameterized.TestCase):
  @parameterized.parameters(3, 7)
  def test_is_torchs_decoder_layer(self, frames):
    torch = oracle.torch()
    n = 6
    labels = jax.random.randint(jax.random.key(0), (2, frames, n), 0, K)
    codes = jax.random.normal(jax.random.key(1), (2, K, D))
    module = vqtoken_attention.ReferenceVQAttention(num_heads=4, ffn=32)
    params = jax.jit(module.init)(jax.random.key(2), codes, labels)['params']
    params = jax.tree.map(  # Biases and norms are not trivial either.
      lambda leaf: (
        leaf + 0.1 * jnp.cos(jnp.arange(leaf.size * 1.0)).reshape(leaf.shape)
      ),
      params,
    )
    out = jax.jit(module.apply)({'params': params}, codes, labels)
    layer = torch.nn.TransformerDecoderLayer(
      D, 4, 32, dropout=0.0, batch_first=True
    )
    to = lambda leaf: torch.from_numpy(np.array(leaf))
    state = {}
    for name, theirs in (
      ('self_attention', 'self_attn'),
      ('cross_attention', 'multihead_attn'),
    ):
      p = params[name]
      qkv = [p[f'{x}_proj'] for x in 'qkv']
      state[f'{theirs}.in_proj_weight'] = torch.cat(
        [to(x['kernel']).T for x in qkv]
      )
      state[f'{theirs}.in_proj_bias'] = torch.cat([to(x['bias']) for x in qkv])
      state[f'{theirs}.out_proj.weight'] = to(p['o_proj']['kernel']).T
      state[f'{theirs}.out_proj.bias'] = to(p['o_proj']['bias'])
    for name, theirs in (
      ('self_norm', 'norm1'),
      ('cross_norm', 'norm2'),
      ('mlp_norm', 'norm3'),
    ):
      state[f'{theirs}.weight'] = to(params[name]['scale'])
      state[f'{theirs}.bias'] = to(params[name]['bias'])
    for name, theirs in (('up_proj', 'linear1'), ('down_proj', 'linear2')):
      state[f'{theirs}.weight'] = to(params['mlp'][name]['kernel']).T
      state[f'{theirs}.bias'] = to(params['mlp'][name]['bias'])
    layer.load_state_dict(state)
    L = max(frames, K)
    query = to(labels).float() @ to(params['query']['kernel'])
    query = (query + to(params['query']['bias']))[:, np.arange(L) % frames]
    memory = to(codes)[:, np.arange(L) % K]
    with torch.no_grad():
      expected = layer(query, memory)
    np.testing.assert_allclose(out, expected.numpy(), atol=1e-5)
    with self.assertRaisesRegex(ValueError, '4 cells per frame; the layer was'):
      module.apply({'params': params}, codes, labels[..., :4])


@pytest.mark.loose_promotion  # optax promotes.
class OrderTest(parameterized.TestCase):
  def test_the_map_tells_which_code_came_first(self):
    # Two objects, one frame each, the same codebook whatever their order: only
    # the map knows. A shuffled map must tell nothing.
    kinds = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (8, 8)))[0]
    rng = np.random.default_rng(0)
    config = vqtoken.VQTokenConfig(codes=3, num_heads=2, ffn=16, iters=8)

    def batch(n=32):
      first = rng.integers(0, 2, n)
      kind = np.zeros((n, 2, 4), int)  # Background.
      kind[np.arange(n), 0, rng.integers(0, 4, n)] = 1 + first
      kind[np.arange(n), 1, rng.integers(0, 4, n)] = 2 - first
      ts = interface.token_set(kinds[kind.reshape(n, 8)], grid=(2, 2, 2))
      return ts, jnp.asarray(first)

    def logits(params, ts):
      r = config.reduce(ts, params=params['vq'])
      own = jnp.einsum('bkd,d->bk', r.tokens, kinds[1])
      return 4 * jnp.einsum('bk,bkd,d->b', own, r.tokens, params['reader'])

    def loss(params, ts, first):
      out = logits(params, ts)
      value = optax.sigmoid_binary_cross_entropy(
        out, first.astype(jnp.float32)
      ).mean()
      return value, jnp.mean((out > 0) == (first == 1))

    ts, first = batch()
    params = {
      'vq': config.init_params(jax.random.key(1), ts),
      'reader': jax.random.normal(jax.random.key(2), (8,)),
    }
    optimizer = optax.adam(1e-2)
    update = jax.jit(training.step(loss, optimizer))
    state, right = optimizer.init(params), []
    for _ in range(120):
      params, state, _, accuracy = update(params, state, *batch())
      right.append(float(accuracy))
    self.assertLess(np.mean(right[:1]), 0.8)
    self.assertGreater(np.mean(right[-20:]), 0.95)


if __name__ == '__main__':
  absltest.main()

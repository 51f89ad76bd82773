"""Tests of jaxq.tokens.decoder_layers."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxq.tokens import decoder_layers, sync_rope
from models import decoder
from tests.tokens import testing

B, T, C, L = 2, 7, 16, 3
CONFIG = decoder_layers.LayerConfig(
  num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=24, norm_eps=1e-5
)
MODEL = decoder.DecoderConfig(
  vocab_size=11, hidden_size=C, intermediate_size=24, num_layers=L,
  num_heads=4, num_kv_heads=2, head_dim=4, rope_theta=1e4, norm_eps=1e-5,
  tie_embeddings=True,
)  # fmt: skip
ROPE = sync_rope.plain(4, 1e4)


def causal(q, k, v, _):
  seen = jnp.tril(jnp.ones((1, T, T), bool))
  return decoder_layers.masked_attention(q, k, v, seen), None


class DecoderLayersTest(absltest.TestCase):
  def test_runs_the_blocks_of_a_model(self):
    model = decoder.Decoder(MODEL)
    ids = jax.random.randint(jax.random.key(0), (B, T), 0, 11)
    variables = testing.filled(model.init, jax.random.key(1), ids)
    expected, _ = model.apply(variables, ids, method='hidden')
    x = model.apply(variables, ids, method='embed_tokens')
    at = jnp.broadcast_to(jnp.arange(T)[None, :, None], (B, T, 1))
    stacked = {'params': variables['params']['blocks_0']}
    tables = sync_rope.tables(at, ROPE)
    self.assertEqual(decoder_layers.number(stacked), L)

    @jax.jit
    def run(stacked, x):
      return [
        decoder_layers.run(CONFIG, stacked, x, tables, causal, capture=capture)
        for capture in (0, 2, L)
      ]

    outs = run(stacked, x)
    for out, _, _ in outs:
      np.testing.assert_allclose(out, expected, atol=1e-5)
    states = [state for _, _, state in outs]
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_allclose(states[2], expected, atol=1e-5)
    lower = decoder_layers.part(stacked, 0, 2)
    out, _, _ = decoder_layers.run(CONFIG, lower, x, tables, causal)
    np.testing.assert_allclose(states[1], out, atol=1e-5)

  def test_weights_are_those_of_masked_attention(self):
    q, k, v = (
      jax.random.normal(jax.random.key(i), (B, T, h, 4))
      for i, h in enumerate((4, 2, 2))
    )
    mask = jax.random.bernoulli(jax.random.key(9), 0.6, (B, T, T))
    mask = mask | jnp.eye(T, dtype=bool)[None]

    @jax.jit
    def both(q, k, v, mask):
      weights = decoder_layers.attention_weights(q, k, mask)
      out = decoder_layers.weigh(weights, v)
      masked = decoder_layers.masked_attention(q, k, v, mask)
      return jnp.sum(weights, axis=-1), out, masked

    total, out, masked = both(q, k, v, mask)
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
    np.testing.assert_allclose(out, masked, atol=1e-5)

  def test_some_rows_only(self):
    variables = testing.filled(
      lambda key: decoder_layers.init(key, CONFIG, C, 1), jax.random.key(0)
    )
    one = jax.tree.map(lambda a: a[0], variables)
    x = jax.random.normal(jax.random.key(1), (B, T, C))
    at = jnp.broadcast_to(jnp.arange(T)[None, :, None], (B, T, 1))
    tables = sync_rope.tables(at, ROPE)
    rows = jnp.array([[1, 4, -1], [0, 5, 6]], jnp.int32)

    def attend(q, k, v):
      seen = jnp.ones((1, q.shape[1], T), bool)
      return decoder_layers.masked_attention(q, k, v, seen), None

    layer = decoder_layers.Layer(CONFIG)

    @jax.jit
    def update(one, x, tables):
      return [
        layer.apply(one, x, tables, attend, which, method='attention_update')[0]
        for which in (None, rows)
      ]

    whole, some = update(one, x, tables)
    np.testing.assert_allclose(some[0, :2], whole[0, [1, 4]], atol=1e-5)
    np.testing.assert_allclose(some[1], whole[1, [0, 5, 6]], atol=1e-5)

  def test_heads_must_divide(self):
    with self.assertRaisesRegex(ValueError, 'second must divide the first'):
      decoder_layers.LayerConfig(
        num_heads=4, num_kv_heads=3, head_dim=4, intermediate_size=8
      )


if __name__ == '__main__':
  absltest.main()

"""Tests of jaxq.tokens.decoder_interventions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import decoder_interventions as interventions
from jaxq.tokens import decoder_layers, sync_rope
from tests.tokens import testing

B, T, C, L = 2, 8, 8, 4
CONFIG = decoder_layers.LayerConfig(
  num_heads=2, num_kv_heads=1, head_dim=4, intermediate_size=12
)
ROPE = sync_rope.plain(4, 100.0)
SPAN = interventions.Span(start=2, length=4)
TEXT = [0, 1, 6, 7]
VARIABLES = testing.filled(
  lambda key: decoder_layers.init(key, CONFIG, C, L), jax.random.key(0)
)
X = jax.random.normal(jax.random.key(1), (B, T + 2, C))
POSITIONS = jnp.broadcast_to(jnp.arange(T + 2)[None, :, None], (B, T + 2, 1))
MASK = jnp.ones((B, T + 2), bool)
How = interventions.Intervention


@functools.partial(jax.jit, static_argnames=('how', 'length', 'spare'))
def prefill(x, how, chosen=None, length=T, spare=2):
  return interventions.prefill(
    CONFIG, ROPE, VARIABLES, x[:, :length], POSITIONS[:, :length],
    MASK[:, :length], SPAN, how, chosen=chosen, spare=spare,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=('how', 'spare'))
def decode(x, state, how, spare):
  return interventions.decode(
    CONFIG, ROPE, VARIABLES, x, state, SPAN, how, spare=spare
  )


class InterventionTest(parameterized.TestCase):
  def test_nothing_left_out_is_the_model(self):
    tables = sync_rope.tables(POSITIONS[:, :T], ROPE)
    seen = jnp.tril(jnp.ones((1, T, T), bool))
    expected, _, _ = jax.jit(
      lambda x: decoder_layers.run(
        CONFIG,
        VARIABLES,
        x,
        tables,
        lambda q, k, v, _: (
          decoder_layers.masked_attention(q, k, v, seen),
          None,
        ),
      )
    )(X[:, :T])
    plain = prefill(X, How())
    np.testing.assert_allclose(plain.x, expected, atol=1e-5)
    self.assertEqual(How(entry_layer=0), How())
    np.testing.assert_array_equal(prefill(X, How(exit_layer=L)).x, plain.x)
    states = jax.jit(
      lambda x: interventions.layer_states(
        CONFIG, ROPE, VARIABLES, x, POSITIONS[:, :T], MASK[:, :T]
      )
    )(X[:, :T])
    np.testing.assert_array_equal(states[0], X[:, :T])
    np.testing.assert_allclose(states[-1], expected, atol=1e-5)

  @parameterized.parameters(
    How(),
    How(
      entry_layer=1,
      exit_layer=3,
      cut_visual=(1,),
      cut_text=(2,),
      skip=(1.0, 2.5),
      renormalise=True,
    ),
  )
  def test_cached_decoding_is_the_whole_sequence(self, how):
    whole = prefill(X, how, length=T + 2)
    state = prefill(X, how).state
    for t in (T, T + 1):
      out, state = decode(X[:, t : t + 1], state, how, 2)
      row = t if whole.x.shape[1] == T + 2 else t - SPAN.length
      np.testing.assert_allclose(out[:, 0], whole.x[:, row], atol=1e-5)

  def test_entry_and_exit_hide_the_image(self):
    other = X.at[:, 2:6].add(5.0)
    for how, seen in (
      (How(), True),
      (How(exit_layer=1), True),
      # After two layers of text alone and one that cuts, nothing is left.
      (How(entry_layer=3, cut_text=(3,), renormalise=True), False),
    ):
      one, two = prefill(X, how).x, prefill(other, how).x
      if one.shape[1] == T:
        one, two = one[:, jnp.array(TEXT)], two[:, jnp.array(TEXT)]
      moved = float(jnp.max(jnp.abs(one[:, 2:] - two[:, 2:])))
      self.assertEqual(moved > 1e-4, seen, how)
      np.testing.assert_array_equal(one[:, :2], two[:, :2])  # In front of it.

  def test_skipped_tokens_pass_as_they_are(self):
    everywhere = How(skip=tuple(n / 2 for n in range(2 * L)))
    x = prefill(X, everywhere).x
    np.testing.assert_array_equal(x[:, 2:6], X[:, 2:6])
    self.assertTrue(bool(jnp.all(jnp.any(x[:, 6:] != X[:, 6:T], -1))))
    # They still serve as keys.
    plain = prefill(X, How(exit_layer=1))
    skipped = prefill(X, How(exit_layer=1, skip=(0.0,)))
    np.testing.assert_allclose(plain.x, skipped.x, atol=1e-5)

  def test_computing_fewer_rows_gives_the_same(self):
    chosen = jnp.zeros((B, T), bool).at[0, 3:6].set(True).at[1, 2:4].set(True)
    skip = (0.5, 1.0, 1.5)
    whole = prefill(X, How(skip=skip), chosen)
    few = prefill(X, How(skip=skip, rows=6), chosen)
    np.testing.assert_allclose(few.x, whole.x, atol=1e-5)
    with self.assertRaisesRegex(ValueError, 'rows=5; 6 tokens of a row'):
      interventions.check_rows(
        How(skip=skip, rows=5), chosen, np.ones((B, T), bool)
      )

  def test_runs_and_caches(self):
    runs = interventions.runs_of(How(skip=(0.5, 1.0)), L)
    self.assertEqual([run[:2] for run in runs], [(0, 1), (1, 2), (2, 4)])
    self.assertTrue(runs[0][2].skip_mlp and not runs[0][2].skip_attention)
    self.assertTrue(runs[1][2].skip_attention and not runs[1][2].skip_mlp)
    state = jax.eval_shape(lambda x: prefill(x, How(entry_layer=1)).state, X)
    caches = state.caches
    self.assertEqual([c.k.shape[:3] for c in caches], [(1, B, 6), (3, B, 10)])
    # 32 layers, entry at 8: a quarter of the visual work.
    self.assertEqual(interventions.visual_work(How(entry_layer=8), 32), 0.75)
    self.assertEqual(interventions.entry_candidates(32), (0, 4, 8, 12, 16))

  @parameterized.parameters(False, True)
  def test_cut_edges(self, keep_sink):
    # Values are indicators of keys, so that the output is the weights.
    q, k = jax.random.normal(jax.random.key(5), (2, 1, T, 1, T))
    v = jnp.eye(T)[None, :, None]
    seen = jnp.tril(jnp.ones((1, T, T), bool))
    visual = (np.arange(T) >= 2) & (np.arange(T) < 6)

    def weights(**cut):
      kind = interventions.Kind(
        present=True, skip_attention=False, skip_mlp=False, keep_sink=keep_sink,
        **cut,
      )  # fmt: skip
      run = jax.jit(
        lambda q, k: interventions.cut_attention(
          kind, How(), q, k, v, seen, visual, visual
        )
      )
      return np.asarray(run(q, k))[0, :, 0]

    plain = weights(cut_visual=False, cut_text=False)
    cut = weights(cut_visual=False, cut_text=True)
    lost = plain[6:, 2:6].sum(axis=1)
    np.testing.assert_array_equal(cut[2:6], plain[2:6])  # Visual queries.
    np.testing.assert_allclose(
      cut[6:, 2], lost if keep_sink else 0.0, atol=1e-6
    )
    self.assertFalse(cut[6:, 3:6].any())
    np.testing.assert_allclose(
      cut[6:].sum(axis=1), 1.0 if keep_sink else 1 - lost, rtol=1e-5
    )
    if not keep_sink:
      cut = weights(cut_visual=True, cut_text=False)
      self.assertFalse(cut[2:6, 2:6].any())
      np.testing.assert_array_equal(cut[6:], plain[6:])

  def test_alignment_finds_the_layer(self):
    states = jax.random.normal(jax.random.key(0), (L + 1, 30, C))
    curve = jax.jit(interventions.alignment)(states[2, 4:9] * 3, states)
    self.assertEqual(int(jnp.argmax(curve)), 2)
    np.testing.assert_allclose(curve[2], 1.0, rtol=1e-5)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'multiples of 0.5'):
      How(skip=(0.3,))
    with self.assertRaisesRegex(ValueError, 'enter before they leave'):
      How(entry_layer=2, exit_layer=2)
    with self.assertRaisesRegex(ValueError, 'entry_layer=-1; allowed 0'):
      How(entry_layer=-1)
    for how in (
      How(skip=(4.0,)), How(cut_text=(4,)), How(entry_layer=4),
      How(exit_layer=5),
    ):  # fmt: skip
      with self.assertRaisesRegex(ValueError, 'model of 4 layers; allowed'):
        interventions.runs_of(how, L)
    with self.assertRaisesRegex(ValueError, 'must lie in 0 to 7'):
      interventions.prefill(
        CONFIG, ROPE, VARIABLES, X[:, :T], POSITIONS[:, :T], MASK[:, :T],
        interventions.Span(start=5, length=4), How(),
      )  # fmt: skip


if __name__ == '__main__':
  absltest.main()

"""Tests of jaxq.tokens.follow_the_flow."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import follow_the_flow as flow
from jaxq.tokens import interface

S, D = 5, 4
STATES = jnp.arange(S * D, dtype=jnp.float32).reshape(1, S, D) + 1
PADS = -STATES
CLEAN = STATES * 100


def keep(*places):
  return jnp.asarray(np.isin(np.arange(S), places))[None]


class EditTest(parameterized.TestCase):
  def test_keep(self):
    out = flow.keep_tokens(STATES, keep(2), PADS)
    np.testing.assert_array_equal(out[0, 2], STATES[0, 2])
    others = jnp.array([0, 1, 3, 4])
    np.testing.assert_array_equal(out[0, others], PADS[0, others])
    # Exactly one row differs from the pads.
    self.assertEqual(int(jnp.any(out != PADS, axis=-1).sum()), 1)
    np.testing.assert_array_equal(flow.keep_tokens(STATES, keep(), PADS), PADS)
    for everything in (keep(0, 1, 2, 3, 4), None):
      np.testing.assert_array_equal(
        flow.keep_tokens(STATES, everything, PADS), STATES
      )

  @parameterized.parameters(
    ('full', (0, 1, 2, 3, 4)), ('tokens', (0, 1, 2)), ('pads', (3, 4)),
    ('item', (1, 2)), ('single', (1,)),
  )  # fmt: skip
  def test_presets(self, name, expected):
    mask = flow.preset(name, jnp.array([3]), S, item=(1, 3))
    np.testing.assert_array_equal(mask, keep(*expected))

  def test_patch(self):
    out = flow.patch_item(STATES, (1, 3), CLEAN, (0, 2))
    np.testing.assert_array_equal(out[0, 1:3], CLEAN[0, :2])
    rest = jnp.array([0, 3, 4])
    np.testing.assert_array_equal(out[0, rest], STATES[0, rest])
    # With its own states: nothing changes. Apart, the order does not matter.
    np.testing.assert_array_equal(
      flow.patch_item(STATES, (1, 3), STATES, (1, 3)), STATES
    )
    one = flow.patch_item(out, (4, 5), CLEAN, (3, 4))
    two = flow.patch_item(STATES, (4, 5), CLEAN, (3, 4))
    two = flow.patch_item(two, (1, 3), CLEAN, (0, 2))
    np.testing.assert_array_equal(one, two)
    source = flow.patch_source(S, [((1, 3), (0, 2)), ((4, 5), (3, 4))])
    np.testing.assert_array_equal(
      flow.patch_rows(STATES, CLEAN, jnp.asarray(source)[None]), one
    )

  def test_merge(self):
    out = flow.merge_ranges(STATES, [(1, 4)], PADS)
    np.testing.assert_allclose(out[0, 1], jnp.mean(STATES[0, 1:4], axis=0))
    np.testing.assert_array_equal(out[0, 2:4], PADS[0, 2:4])
    np.testing.assert_array_equal(
      out[0, jnp.array([0, 4])], STATES[0, jnp.array([0, 4])]
    )

  def test_find_items(self):
    ids = (7, 3, 9, 3, 9)
    self.assertEqual(flow.find_spans(ids, (3, 9)), [(1, 3), (3, 5)])
    self.assertEqual(flow.match_span(ids, (3, 9), occurrence=1), (3, 5))
    self.assertEqual(flow.match_span(ids, (8,), variants=[(7,)]), (0, 1))
    with self.assertRaisesRegex(ValueError, r'item is at \[1, 3\]; one place'):
      flow.match_span(ids, (3, 9))
    with self.assertRaisesRegex(ValueError, r'\[\[8\]\] is not in \[7, 3'):
      flow.match_span(ids, (8,))
    with self.assertRaisesRegex(ValueError, 'occurrence=2 of 2; allowed 0 to'):
      flow.match_span(ids, (3, 9), occurrence=2)
    with self.assertRaisesRegex(ValueError, 'cut to S=4 tokens; it must lie'):
      flow.match_span(ids, (3, 9), occurrence=1, limit=4)

  def test_repair(self):
    pooled = jnp.ones((1, 3))
    out = flow.repair(
      flow.Encoding(STATES, pooled), (7, 3, 9, 0, 0),
      flow.Encoding(CLEAN), (3, 9, 0, 0, 0), (3, 9),
    )  # fmt: skip
    np.testing.assert_array_equal(out.states[0, 1:3], CLEAN[0, :2])
    np.testing.assert_array_equal(out.states[0, 3:], STATES[0, 3:])
    np.testing.assert_array_equal(out.pooled, pooled)
    with self.assertRaisesRegex(ValueError, r'ids \[3, 9\].*\[4, 9\]; it must'):
      flow.repair(
        flow.Encoding(STATES), (7, 3, 9), flow.Encoding(CLEAN), (4, 9), (3, 9)
      )

  def test_several_encoders_as_flux_and_sd3_have_them(self):
    full = {
      't5': flow.Encoding(STATES),
      'clip': flow.Encoding(STATES * 2, jnp.ones((1, 2))),
    }
    empty = {
      't5': flow.Encoding(PADS),
      'clip': flow.Encoding(PADS * 2, jnp.zeros((1, 2))),
    }
    out = flow.edit_encoders(full, empty, {'t5': keep(2), 'clip': keep()})
    np.testing.assert_array_equal(out['t5'].states[0, 2], STATES[0, 2])
    np.testing.assert_array_equal(out['clip'].states, PADS * 2)
    np.testing.assert_array_equal(out['clip'].pooled, jnp.zeros((1, 2)))
    out = flow.edit_encoders(full, empty, {'clip': keep(2)}, probe=False)
    np.testing.assert_array_equal(out['clip'].pooled, jnp.ones((1, 2)))
    np.testing.assert_array_equal(out['t5'].states, STATES)
    out = flow.edit_encoders(full, empty, {'t5': None, 'clip': None})
    np.testing.assert_array_equal(out['clip'].pooled, jnp.ones((1, 2)))

  def test_encoding_in_one_batch(self):
    calls = []

    def encode(ids):
      calls.append(ids.shape)
      states = ids[..., None].astype(jnp.float32) * jnp.ones((1, 1, D))
      return flow.Encoding(states, states[:, 0])

    prompts = jnp.arange(2 * S).reshape(2, S)
    own, empty, items = flow.encode_together(
      encode, prompts, jnp.full((S,), 99), jnp.full((3, S), 50)
    )
    self.assertEqual(calls, [(6, S)])
    np.testing.assert_array_equal(own.states[..., 0], prompts)
    np.testing.assert_array_equal(empty.states, np.full((2, S, D), 99))
    np.testing.assert_array_equal(items.pooled, np.full((3, D), 50))

  def test_layers_and_places(self):
    states = jnp.stack([STATES, STATES * 2, STATES * 3])
    out = flow.skipped_state(states, 1, lambda x: x + 1)
    np.testing.assert_array_equal(out, STATES * 2 + 1)
    with self.assertRaisesRegex(ValueError, 'skip=3 of an encoder with 2'):
      flow.skipped_state(states, 3, lambda x: x)
    self.assertEqual(flow.front_padded((5, 6), 2, 6, 1, 0), [1, 1, 5, 6, 0, 0])

  def test_context_and_leaks(self):
    alike = flow.context_cosine(STATES, (1, 3), CLEAN, (1, 3))
    np.testing.assert_allclose(alike, 1.0, rtol=1e-6)
    away = flow.context_cosine(STATES, (1, 3), -CLEAN, (1, 3))
    np.testing.assert_allclose(away, -1.0, rtol=1e-6)
    # Two prompts; in the second the item's states have another sense.
    right = jnp.concatenate([STATES, STATES])
    mixed = right.at[1, 1:3].multiply(-5.0)

    def shows(states, seed):
      del seed
      return np.asarray(jnp.any(states > 0, axis=(1, 2)))

    pads = jnp.full_like(right, -1.0)
    leaked = flow.leaks(shows, mixed, pads, (1, 3), right, (1, 3), seeds=(0, 1))
    np.testing.assert_array_equal(leaked, [False, True])

  def test_bad_ranges(self):
    with self.assertRaisesRegex(ValueError, r'range \(4, 6\) of S=5'):
      flow.patch_item(STATES, (4, 6), CLEAN, (0, 2))
    with self.assertRaisesRegex(ValueError, 'both must have as many tokens'):
      flow.patch_item(STATES, (1, 3), CLEAN, (0, 1))
    with self.assertRaisesRegex(ValueError, r'\(2, 4\) overlaps an earlier'):
      flow.patch_source(S, [((1, 3), (0, 2)), ((2, 4), (0, 2))])
    with self.assertRaisesRegex(ValueError, "preset: 'some'; allowed"):
      flow.preset('some', jnp.array([3]), S)
    with self.assertRaisesRegex(ValueError, "'item' without item; it needs"):
      flow.preset('item', jnp.array([3]), S)


class ReduceTest(absltest.TestCase):
  def test_compaction_by_hand(self):
    ts = interface.token_set(STATES)
    scores = jnp.array([[3.0, 0, 2, 0, 0]])
    config = flow.FollowTheFlowConfig(least=1.0)
    out = config.reduce(ts, scores=scores, budget=interface.Budget(k_max=4))
    np.testing.assert_array_equal(out.tokens[0, 0], STATES[0, 0])
    np.testing.assert_array_equal(out.tokens[0, 1], STATES[0, 2])
    self.assertFalse(bool(out.tokens[0, 2:].any()))
    np.testing.assert_array_equal(out.positions[0, :, 0], [0, 2, 0, 0])
    self.assertEqual(int(out.count[0]), 2)
    place = flow.FollowTheFlowConfig(least=1.0, compact=False)
    out = place.reduce(
      ts, scores=scores, params=PADS[0], budget=interface.Budget(k_max=S)
    )
    np.testing.assert_array_equal(
      out.tokens, flow.keep_tokens(STATES, keep(0, 2), PADS)
    )
    np.testing.assert_array_equal(out.index[0], [0, -1, 2, -1, -1])
    np.testing.assert_array_equal(out.assignment[0], [0, -1, 2, -1, -1])
    one = place.reduce(ts, scores=scores, params=PADS[0])  # A quarter of 5.
    np.testing.assert_array_equal(
      one.tokens, flow.keep_tokens(STATES, keep(0), PADS)
    )
    with self.assertRaisesRegex(ValueError, 'k_max=4 for N=5 places'):
      place.reduce(
        ts, scores=scores, params=PADS[0], budget=interface.Budget(k_max=4)
      )
    zeros = place.init_params(jax.random.key(0), ts)
    self.assertEqual(zeros.shape, (S, D))

  def test_attention_to_fewer_is_masked_attention(self):
    queries = jax.random.normal(jax.random.key(0), (1, 6, 1, D))
    scores = jnp.array([[3.0, 0, 2, 1, 0]])
    ts = interface.token_set(jax.random.normal(jax.random.key(1), (1, S, D)))
    config = flow.FollowTheFlowConfig(least=0.5)
    out = config.reduce(ts, scores=scores, budget=interface.Budget(k_max=4))

    @jax.jit
    def attend(x, mask):
      keys = x[:, :, None]
      return jax.nn.dot_product_attention(
        queries, keys, keys, mask=mask[:, None, None]
      )

    fewer = attend(out.tokens, out.mask)
    masked = attend(ts.tokens, scores > 0.5)
    np.testing.assert_allclose(fewer, masked, atol=1e-5)
    pads = jnp.broadcast_to(jnp.float32(0.3), ts.tokens.shape)
    filled = flow.keep_tokens(ts.tokens, scores > 0.5, pads)
    other = attend(filled, jnp.ones((1, S), bool))
    self.assertGreater(float(jnp.max(jnp.abs(other - fewer))), 1e-2)


if __name__ == '__main__':
  absltest.main()

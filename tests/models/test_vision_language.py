"""Tests of models.vision_language and models.visual_tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import registry as caches
from jaxq.nn import multi_axis_rope, rope
from jaxq.numerics import qarray, spec
from jaxq.tokens import controls, fastv, interface, tome
from models import vision_language, visual_tokens

CONFIG = vision_language.VisionLanguageConfig(
  frames=2,
  rows=2,
  columns=3,
  vision_size=16,
  vision_layers=2,
  vision_heads=2,
  hidden_size=24,
  num_layers=2,
  num_heads=2,
  vocab_size=20,
)
B, Q, L, N = 2, 3, 4, 12


def inputs(seed=0):
  keys = jax.random.split(jax.random.key(seed))
  frames = jax.random.normal(keys[0], (B, 2, 8, 12))
  return frames, jax.random.randint(keys[1], (B, Q, L), 0, 20)


@functools.cache
def params():
  model = vision_language.VisionLanguage(CONFIG)
  made = jax.jit(model.init)(jax.random.key(1), *inputs())['params']
  # The class token starts near 0 and positions of it at 0: make it differ.
  return jax.tree.map(lambda a: a + 0.02, made)


@functools.cache
def visual():
  see = jax.jit(functools.partial(visual_tokens.visual_of, CONFIG))
  return see(params(), inputs()[0])


@functools.cache
def all_tokens():
  model = vision_language.VisionLanguage(CONFIG)
  return jax.jit(model.apply)({'params': params()}, *inputs())[0]


@jax.jit
def answer(params, visual, text):
  return visual_tokens.answer(CONFIG, params, visual, text)


def reduce(config, k_max, k=None):
  return _reduced(config, k_max, visual().tokens, k)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reduced(config, k_max, ts, k):
  return config.reduce(ts, budget=interface.Budget(k_max=k_max, k=k))


@functools.partial(jax.jit, static_argnames='k_max')
def pruned(params, ts, text, k_max):
  return visual_tokens.answer_pruned(
    CONFIG,
    params,
    ts,
    text,
    fastv.FastvConfig(),
    layer=1,
    budget=interface.Budget(k_max=k_max),
  )


class MultiAxisRopeTest(parameterized.TestCase):
  @parameterized.parameters('interleaved', 'sections')
  def test_text_turns_as_with_one_axis(self, kind):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 12))
    axes = multi_axis_rope.interleaved(12, 3)
    if kind == 'sections':
      axes = multi_axis_rope.sections((1, 2, 3))
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    turn = rope.Rope(theta=100.0)
    got = multi_axis_rope.rotate(
      x, jnp.stack([positions] * 3, axis=-1), turn, axes
    )
    np.testing.assert_array_equal(got, rope.rotate(x, positions, turn))

  def test_each_frequency_turns_by_its_axis(self):
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 6))
    positions = jnp.array([[[3, 1, 2]]], jnp.int32)
    turn = rope.Rope(theta=7.0)
    got = multi_axis_rope.rotate(x, positions, turn, (0, 1, 2))[0, 0, 0]
    v = np.asarray(x[0, 0, 0], np.float64)
    for i, position in enumerate((3, 1, 2)):
      angle = position * 7.0 ** (-i / 3)
      pair = (v[i] + 1j * v[i + 3]) * np.exp(1j * angle)
      np.testing.assert_allclose(got[i], pair.real, atol=1e-6)
      np.testing.assert_allclose(got[i + 3], pair.imag, atol=1e-6)

  def test_only_distances_matter(self):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 12))
    axes = multi_axis_rope.interleaved(12, 3)

    def score(at, shift):
      turned = [
        multi_axis_rope.rotate(
          a, jnp.array([[np.add(p, shift)]], jnp.int32), rope.Rope(), axes
        )
        for a, p in zip((q, k), at, strict=True)
      ]
      return jnp.sum(turned[0] * turned[1])

    at = ((4, 2, 1), (1, 5, 3))
    near, far = score(at, [0, 0, 0]), score(at, [3, 7, 2])
    np.testing.assert_allclose(near, far, rtol=1e-4)

  def test_messages(self):
    x, positions = jnp.zeros((1, 1, 1, 12)), jnp.zeros((1, 1, 3), jnp.int32)
    with self.assertRaisesRegex(ValueError, '5 axes for heads of 12.*sum to 6'):
      multi_axis_rope.rotate(x, positions, rope.Rope(), (0,) * 5)
    with self.assertRaisesRegex(ValueError, 'axes 0..3 for positions with 3'):
      multi_axis_rope.rotate(x, positions, rope.Rope(), (3,) * 6)
    with self.assertRaisesRegex(NotImplementedError, 'only a rope of all'):
      multi_axis_rope.rotate(x, positions, rope.Rope(dim=4), (0,) * 6)


class VisionLanguageTest(parameterized.TestCase):
  def test_scores_are_attention(self):
    seen = visual()
    self.assertEqual(seen.tokens.tokens.shape, (B, N, 24))
    np.testing.assert_array_equal(seen.tokens.positions[0, 7], [1, 0, 1])
    by_frame = seen.class_scores.reshape(B, 2, 6).sum(axis=-1)
    self.assertTrue((by_frame < CONFIG.vision_heads).all())  # Less its own.
    self.assertTrue((seen.class_scores > 0).all())
    # A row of weights sums to 1, of which the class token has a part.
    self.assertTrue((seen.received.reshape(B, 2, 6).sum(axis=-1) < 1).all())

  def test_all_tokens_through_the_seam(self):
    got = answer(params(), visual().tokens, inputs()[1])
    np.testing.assert_allclose(got, all_tokens(), atol=1e-5)

  @parameterized.named_parameters(
    ('uniform', controls.UniformConfig()), ('tome', tome.TomeConfig())
  )
  def test_a_full_budget_is_the_identity(self, config):
    got = answer(params(), reduce(config, N), inputs()[1])
    np.testing.assert_allclose(got, all_tokens(), atol=1e-5)

  def test_slots_not_in_use_change_nothing(self):
    text = inputs()[1]
    exact = reduce(controls.UniformConfig(), 6)
    padded = reduce(controls.UniformConfig(), N, jnp.array([6, 6]))
    padded = dataclasses.replace(
      padded, tokens=jnp.where(padded.mask[..., None], padded.tokens, 9.0)
    )
    want, got = answer(params(), exact, text), answer(params(), padded, text)
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_positions_matter(self):
    reduced = reduce(controls.UniformConfig(), 6)
    moved = dataclasses.replace(
      reduced, positions=visual().tokens.positions[:, :6]
    )
    a = answer(params(), reduced, inputs()[1])
    b = answer(params(), moved, inputs()[1])
    self.assertGreater(float(jnp.abs(a - b).max()), 1e-4)

  def test_questions_do_not_see_each_other(self):
    text = inputs()[1]
    alone = answer(params(), visual().tokens, text[:, 1:2])
    np.testing.assert_allclose(alone, all_tokens()[:, 1:2], atol=1e-5)

  @parameterized.parameters(None, 'paged')
  def test_decoding_equals_teacher_forcing(self, cache):
    lengths, new = jnp.array([4, 2]), 3
    own = jnp.arange(L)[None] < lengths[:, None]
    text = jnp.where(own, inputs()[1][:, 0], 0)
    reduced = reduce(controls.UniformConfig(), N, jnp.array([7, 3]))
    said = jax.jit(
      functools.partial(
        visual_tokens.generate,
        CONFIG,
        max_new_tokens=new,
        kv_cache=None if cache is None else caches.parse(cache),
      )
    )(params(), reduced, text, lengths)
    # All of it at once, padded behind: causal, so the padding is not seen.
    whole = np.zeros((B, 1, L + new), np.int32)
    for row, n in enumerate(lengths.tolist()):
      whole[row, 0, : n + new] = [*text[row, :n].tolist(), *said[row].tolist()]
    logits = answer(params(), reduced, jnp.asarray(whole))
    for row, n in enumerate(lengths.tolist()):
      expected = jnp.argmax(logits[row, 0, n - 1 : n + new - 1], axis=-1)
      np.testing.assert_array_equal(said[row], expected)

  def test_pruning_nothing_inside_the_decoder_is_the_identity(self):
    logits, reduced = pruned(params(), visual().tokens, inputs()[1][:, 0], N)
    np.testing.assert_allclose(logits, all_tokens()[:, 0], atol=1e-5)
    np.testing.assert_array_equal(reduced.count, N)

  def test_pruning_inside_the_decoder_equals_masking(self):
    text, ts = inputs()[1][:, 0], visual().tokens
    logits, reduced = pruned(params(), ts, text, 4)
    self.assertTrue((reduced.count == 4).all())

    @jax.jit
    def masked(variables, kept):  # The last block does not see the others.
      model: Any = vision_language.VisionLanguage(CONFIG)
      x = model.apply(variables, text, method='embed_text')
      visual, mask = ts.tokens, ts.mask
      for layer in range(2):
        visual, x = model.apply(
          variables,
          visual,
          ts.positions,
          mask,
          x,
          1,
          range(layer, layer + 1),
          method='layers',
        )
        mask = kept
      return model.apply(variables, x, method='logits')

    want = masked({'params': params()}, reduced.assignment >= 0)
    np.testing.assert_allclose(logits, want, atol=1e-4)

  def test_quantized_weights_and_fewer_tokens(self):
    grid = spec.QuantSpec(dtype='int8', granularity='channel')

    def stored(path, leaf):
      if path[-1].key != 'kernel':
        return leaf
      return qarray.quantize(leaf, grid)

    quantized = jax.tree_util.tree_map_with_path(stored, params())
    reduced = reduce(controls.UniformConfig(), 6)
    want = answer(params(), reduced, inputs()[1])
    got = answer(quantized, reduced, inputs()[1])
    self.assertLess(float(jnp.abs(got - want).max()), 0.2)
    self.assertGreater(float(jnp.abs(got - want).max()), 0)

  def test_sound_goes_behind_the_video(self):
    config = dataclasses.replace(CONFIG, audio_size=5)
    audio = jax.random.normal(jax.random.key(3), (B, 2, 4, 5))
    rng = jax.random.key(0)
    hearing: dict[str, Any] = {
      **params(),
      'project_audio': {
        'kernel': jax.random.normal(rng, (5, 24)),
        'bias': jnp.zeros(24),
      },
    }
    see = jax.jit(functools.partial(visual_tokens.visual_of, config))
    ts = see(hearing, inputs()[0], audio).tokens
    self.assertEqual(ts.tokens.shape, (B, N + 8, 24))
    self.assertIsNone(ts.grid)
    np.testing.assert_array_equal(ts.positions[0, N + 6], [1, 2, 0])
    np.testing.assert_allclose(
      ts.tokens[:, :N], visual().tokens.tokens, atol=1e-6
    )
    np.testing.assert_allclose(
      ts.tokens[0, N + 6], audio[0, 1, 2] @ hearing['project_audio']['kernel'],
      rtol=1e-4, atol=1e-4,
    )  # fmt: skip

  def test_a_model_on_a_mesh_has_rules(self):
    rules = dict(vision_language.sharding_rules(CONFIG, 2))
    self.assertIn(r'mlp/down_proj/kernel', rules)
    with self.assertRaisesRegex(ValueError, 'model:3: the vision has an MLP'):
      vision_language.sharding_rules(CONFIG, 3)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'num_layers=0; it must be at lea'):
      dataclasses.replace(CONFIG, num_layers=0)
    with self.assertRaisesRegex(ValueError, 'hidden_size=26, num_heads=2'):
      dataclasses.replace(CONFIG, hidden_size=26)
    with self.assertRaisesRegex(ValueError, r'\(2, 2, 8, 8\).*frames, 8, 12'):
      visual_tokens.visual_of(CONFIG, params(), jnp.zeros((2, 2, 8, 8)))
    with self.assertRaisesRegex(ValueError, 'layer=2; .*1..1 are allowed'):
      visual_tokens.answer_pruned(
        CONFIG,
        params(),
        visual().tokens,
        inputs()[1][:, 0],
        fastv.FastvConfig(),
        layer=2,
      )


if __name__ == '__main__':
  absltest.main()

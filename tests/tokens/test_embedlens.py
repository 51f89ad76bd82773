"""Tests of jaxq.tokens.embedlens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import embedlens, interface

V, D, N = 40, 48, 24
CONFIG = embedlens.EmbedLensConfig(budget=1.0)
GROUPS = embedlens.Groups(vit_sink=(3,), llm_sink=(9,), dead=(17, 20))


EMBEDDING = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)


def image(ids, noise=0.05):
  """(1, N, D) tokens near the embeddings of these ids."""
  jitter = np.random.default_rng(1).normal(size=(1, len(ids), D))
  return (EMBEDDING[np.array(ids)][None] * 4 + noise * jitter).astype(
    np.float32
  )


@functools.partial(jax.jit, static_argnames=('config', 'k_max'))
def reduce(config, x, k_max=None, rng=None):
  probe = embedlens.make_probe(EMBEDDING, GROUPS)
  budget = None if k_max is None else interface.Budget(k_max=k_max)
  return config.reduce(
    interface.token_set(x), params=probe, budget=budget, rng=rng
  )


@functools.partial(jax.jit, static_argnames=('k', 'groups', 'left_out'))
def nearest(x, table, k, groups=GROUPS, left_out=()):
  probe = embedlens.make_probe(table, groups, left_out=left_out)
  ids, cosines = embedlens.nearest_vocab(x, probe, k)
  return ids, cosines, probe


# 6 ViT sinks, 3 LLM sinks, 5 dead ones, 10 alive.
IDS = [3] * 6 + [9] * 3 + [17, 20, 17, 20, 17] + list(range(25, 35))
NEAREST = dataclasses.replace(CONFIG, top_k=1)


class ProbeTest(parameterized.TestCase):
  def test_by_hand_and_ties_go_to_the_lower_id(self):
    x = np.array([[[9, 1, 0, 0], [0, 0, 0, 5], [1, 1, 1, 1]]], np.float32)
    # Any of the top 3 decides, even one of similarity 0.
    groups = embedlens.Groups(vit_sink=(3,), dead=(2,))
    ids, cosines, probe = nearest(x, np.eye(4, dtype=np.float32), 3, groups)
    np.testing.assert_array_equal(ids[0, :, 0], [0, 3, 0])
    np.testing.assert_array_equal(ids[0, 2], [0, 1, 2])
    np.testing.assert_allclose(cosines[0, 2], 0.5, rtol=1e-6)
    classes = embedlens.classify(ids, cosines, probe.classes)
    np.testing.assert_array_equal(
      classes[0], [embedlens.DEAD, embedlens.VIT_SINK, embedlens.DEAD]
    )
    classes = embedlens.classify(ids, cosines, probe.classes, min_sim=0.1)
    np.testing.assert_array_equal(
      classes[0], [embedlens.ALIVE, embedlens.VIT_SINK, embedlens.DEAD]
    )

  def test_rows_of_the_table_and_scale(self):
    ids, cosines, _ = nearest(EMBEDDING[None] * 7, EMBEDDING, 3)
    np.testing.assert_array_equal(ids[0, :, 0], np.arange(V))
    np.testing.assert_allclose(cosines[..., 0], 1.0, rtol=1e-5)
    x = np.random.default_rng(3).normal(size=(1, V, D)).astype(np.float32)
    one = nearest(x, EMBEDDING, 3)
    two = nearest(x * 100, EMBEDDING, 3)
    np.testing.assert_array_equal(one[0], two[0])
    # A dense top-k says the same.
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    table = EMBEDDING / np.linalg.norm(EMBEDDING, axis=1, keepdims=True)
    dense = np.argsort(-unit @ table.T, axis=-1)[..., :3]
    np.testing.assert_array_equal(one[0], dense)

  def test_ids_that_training_never_saw_are_left_out(self):
    ids, _, _ = nearest(EMBEDDING[None] * 7, EMBEDDING, 3, left_out=(5,))
    self.assertNotIn(5, np.asarray(ids))

  def test_margin_is_above_0_where_the_nearest_id_marks_a_group(self):
    probe = embedlens.make_probe(EMBEDDING, GROUPS)
    x = np.random.default_rng(3).normal(size=(1, 200, D)).astype(np.float32)
    margin = jax.jit(embedlens.margin)(x, probe)
    ids, _, _ = nearest(x, EMBEDDING, 1)
    marked = np.isin(np.asarray(ids[..., 0]), (3, 9, 17, 20))
    np.testing.assert_array_equal(margin > 0, marked)
    self.assertGreater(marked.sum(), 5)
    none = embedlens.make_probe(EMBEDDING, embedlens.Groups())
    np.testing.assert_array_equal(embedlens.margin(x[:, :1], none), [[-2.0]])

  def test_informative(self):
    probe = embedlens.make_probe(EMBEDDING, GROUPS)
    mask = np.ones((1, N), bool)
    run = jax.jit(embedlens.informative)
    mean, chance = run(image(IDS), mask, probe, jax.random.key(0))
    self.assertGreater(float(mean), float(chance))
    noise = np.random.default_rng(5).normal(size=(1, N, D)).astype(np.float32)
    mean, chance = run(noise, mask, probe, jax.random.key(0))
    self.assertLess(float(mean), float(chance))


class ReduceTest(parameterized.TestCase):
  def test_classes_and_what_is_dropped(self):
    reduced = reduce(NEAREST, image(IDS))
    np.testing.assert_array_equal(
      reduced.aux['classes'][0], [1] * 6 + [2] * 3 + [3] * 5 + [0] * 10
    )
    np.testing.assert_allclose(reduced.aux['alive_share'], 10 / N)
    np.testing.assert_array_equal(reduced.index[0, :10], np.arange(14, 24))
    self.assertEqual(int(reduced.count[0]), 10)
    np.testing.assert_array_equal(
      reduced.positions[0, :10, 0], np.arange(14, 24)
    )
    some = reduce(dataclasses.replace(NEAREST, drop=('dead',)), image(IDS))
    self.assertEqual(int(some.count[0]), N - 5)

  def test_a_class_that_is_not_there_drops_nothing(self):
    x = image([*range(25, 35), *range(25, 39)])
    reduced = reduce(NEAREST, x)
    np.testing.assert_array_equal(reduced.tokens, x)

  def test_controls(self):
    control = dataclasses.replace(
      NEAREST, drop=('dead', 'llm_sink'), control='alive'
    )
    kept = set()
    for seed in range(3):
      reduced = reduce(control, image(IDS), rng=jax.random.key(seed))
      self.assertEqual(int(reduced.count[0]), N - 8)  # As many as the groups.
      index = np.asarray(reduced.index[0])
      self.assertEqual(set(range(14)) - set(index), set())  # Alive ones went.
      kept.add(tuple(index))
    self.assertGreater(len(kept), 1)
    rest = dataclasses.replace(control, control='complement')
    reduced = reduce(rest, image(IDS))
    np.testing.assert_array_equal(reduced.index[0, :8], np.arange(6, 14))
    self.assertEqual(int(reduced.count[0]), 8)

  def test_too_many_survivors_lose_those_most_like_dead_ones(self):
    x = image(IDS)  # One is alive, but nearer to a dead one than the others.
    unit = EMBEDDING / np.linalg.norm(EMBEDDING, axis=1, keepdims=True)
    x[0, 20] = 0.6 * unit[17] + 0.8 * unit[30]
    reduced = reduce(NEAREST, x, k_max=9)
    self.assertEqual(int(reduced.aux['classes'][0, 20]), embedlens.ALIVE)
    self.assertEqual(int(reduced.count[0]), 9)
    self.assertNotIn(20, np.asarray(reduced.index[0]))

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, r"groups \['sink'\]; allowed"):
      embedlens.EmbedLensConfig(drop=('sink',))
    with self.assertRaisesRegex(ValueError, "control='random'; allowed"):
      embedlens.EmbedLensConfig(control='random')
    with self.assertRaisesRegex(ValueError, 'top_k=0; at least 1'):
      embedlens.EmbedLensConfig(top_k=0)
    with self.assertRaisesRegex(ValueError, r"'dead' has the ids \[99\]"):
      embedlens.make_probe(EMBEDDING, embedlens.Groups(dead=(99,)))
    with self.assertRaisesRegex(ValueError, 'Run embedlens_groups.discover'):
      embedlens.groups_of('a-model')
    self.assertEqual(embedlens.groups_of('llava-1.5-7b').dead, (30296,))
    probe = embedlens.make_probe(EMBEDDING, GROUPS)
    with self.assertRaisesRegex(ValueError, 'channels must be equal'):
      embedlens.nearest_vocab(jnp.zeros((1, 2, D + 1)), probe, 1)
    ts = interface.token_set(image(IDS))
    with self.assertRaisesRegex(ValueError, 'rng=None; this reducer needs'):
      dataclasses.replace(NEAREST, control='alive').reduce(ts, params=probe)


if __name__ == '__main__':
  absltest.main()

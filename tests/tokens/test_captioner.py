"""Tests of jaxq.tokens.captioner."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import captioner, decoder_layers
from tests.tokens import testing

B, P, D, V, L, LMAX = 4, 5, 8, 13, 2, 6
LAYER = decoder_layers.LayerConfig(
  num_heads=2, num_kv_heads=1, head_dim=4, intermediate_size=16
)
PARAMS = testing.filled(
  lambda key: captioner.init_params(key, LAYER, num_layers=L, vocab=V, width=D),
  jax.random.key(0),
)
# Embeddings that differ, so that captions do.
PARAMS['embedding'] = jax.random.normal(jax.random.key(3), (V, D))
PROMPT = captioner.Prompt(
  jax.random.normal(jax.random.key(4), (B, P, D)), jnp.array([5, 3, 4, 5])
)
WRITING = captioner.Writing(max_new=LMAX, layer=1)


def model(stop_id):
  return captioner.model_of(LAYER, num_layers=L, stop_id=stop_id, theta=100.0)


@functools.cache
def free_ids():
  """What is written when nothing ends it."""
  return np.asarray(describe(model(V + 1), WRITING).ids)


@functools.cache
def stop_id():
  """A token that ends one caption at once and others later, or never."""
  ids = free_ids()

  def lengths(i):
    return [[*row, i].index(i) for row in ids]

  return max((int(i) for i in ids[:, 0]), key=lambda i: len(set(lengths(i))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def describe(m, writing, prompt=PROMPT):
  return captioner.describe(m, PARAMS, prompt, writing)


@functools.partial(jax.jit, static_argnums=(0, 1))
def forced(m, writing, ids, lengths):
  return captioner.teacher_forced(m, PARAMS, PROMPT, ids, lengths, writing)


class CaptionerTest(parameterized.TestCase):
  @parameterized.parameters((0, 'consume'), (L, 'predict'))
  def test_teacher_forcing_gives_the_states_of_decoding(
    self, layer, convention
  ):
    writing = dataclasses.replace(WRITING, layer=layer, convention=convention)
    m = model(stop_id())
    written = describe(m, writing)
    self.assertGreater(len(set(np.asarray(written.lengths).tolist())), 1)
    again, logits = forced(m, writing, written.ids, written.lengths)
    np.testing.assert_allclose(again.soft, written.soft, atol=1e-4)
    np.testing.assert_array_equal(again.ids, written.ids)
    # The caption is greedy under the logits, its end too.
    best = np.argmax(logits, axis=-1)
    for b, n in enumerate(np.asarray(written.lengths)):
      np.testing.assert_array_equal(best[b, :n], written.ids[b, :n])
      if n < LMAX:
        self.assertEqual(best[b, n], stop_id())
    if layer == 0:
      rows = np.asarray(PARAMS['embedding'])[np.asarray(written.ids)]
      rows = np.where(np.asarray(written.mask)[..., None], rows, 0)
      np.testing.assert_allclose(written.soft, rows, atol=1e-6)
      # An end at once is no token.
      self.assertIn(0, np.asarray(written.lengths))

  def test_conventions_are_one_position_apart(self):
    ids, lengths = free_ids(), np.full(B, LMAX)
    m = model(V + 1)
    consume, _ = forced(m, WRITING, ids, lengths)
    predict, _ = forced(
      m, dataclasses.replace(WRITING, convention='predict'), ids, lengths
    )
    np.testing.assert_allclose(
      predict.soft[:, 1:], consume.soft[:, :-1], atol=1e-6
    )
    # Ids (a, b, end): states of a and b, or of the prompt's end and of a.
    self.assertFalse(np.allclose(predict.soft[:, 0], consume.soft[:, 0]))

  def test_leaving_early_is_the_whole_loop(self):
    m = model(stop_id())
    consume = dataclasses.replace(WRITING, layer=0)
    scan = dataclasses.replace(consume, loop='scan')
    # A row without a prompt has nothing to say.
    for lengths in (PROMPT.lengths, PROMPT.lengths.at[1].set(0)):
      prompt = PROMPT.replace(lengths=lengths)
      early, full = describe(m, consume, prompt), describe(m, scan, prompt)
      for a, b in zip(
        jax.tree.leaves(early), jax.tree.leaves(full), strict=True
      ):
        np.testing.assert_allclose(a, b, atol=1e-6)
      if not lengths[1]:
        self.assertEqual(int(full.lengths[1]), 0)

  def test_rows_do_not_see_each_other(self):
    m = model(stop_id())
    writing = dataclasses.replace(WRITING, layer=0)
    together = describe(m, writing)
    order = np.array([2, 0, 3, 1])
    moved = jax.tree.map(lambda a: a[order], PROMPT)
    # Another prompt in one row, other values behind the ends of all.
    behind = np.arange(P)[None] >= np.asarray(moved.lengths)[:, None]
    x = np.where(behind[..., None], 7.0, moved.x).astype(np.float32)
    x[3] += 1
    apart = describe(m, writing, moved.replace(x=jnp.asarray(x)))
    np.testing.assert_array_equal(apart.ids[:3], together.ids[order[:3]])
    np.testing.assert_allclose(
      apart.soft[:3], together.soft[order[:3]], atol=1e-5
    )

  def test_no_ngram_twice(self):
    n = 3
    # A model whose layers do nothing: it would say one token for ever.
    still = jax.tree.map(jnp.zeros_like, PARAMS['layers'])
    params = {**PARAMS, 'layers': still}
    writing = dataclasses.replace(WRITING, no_repeat=n)
    m = model(V + 1)
    run = jax.jit(lambda p: captioner.describe(m, p, PROMPT, writing).ids)
    for row in np.asarray(run(params)):
      grams = [tuple(row[i : i + n]) for i in range(LMAX - n + 1)]
      self.assertLen(set(grams), len(grams), row)
      self.assertLen(set(row[: n - 1]), 1)  # It does repeat while it may.

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, "convention='last'; allowed"):
      captioner.Writing(convention='last')
    with self.assertRaisesRegex(ValueError, 'no_repeat 0 or at least 2'):
      captioner.Writing(no_repeat=1)
    self.assertEqual(captioner.Writing(layer=-9).captured(24), 16)
    with self.assertRaisesRegex(ValueError, 'layer=-9 of a captioner with 2'):
      captioner.Writing(layer=-9).captured(2)


if __name__ == '__main__':
  absltest.main()

"""QuoTA's query and scorers: parsing, prompts, probabilities, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, quota_scorer, training

ANSWERS: tuple[tuple[str, list[str]], ...] = (
  ('Step 1: yes. Step 2: cat. Step 3: ["cat"]', ['cat']),
  ('Step 1: Yes.\nStep 2: a dog\nStep 3: ["dog", "ball"]', ['dog', 'ball']),
  ('STEP 1: YES. STEP 2: X. STEP 3: ["RED CAR"]', ['RED CAR']),
  ("step 1: yes step 2: .. step 3: ['man', 'hat']", ['man', 'hat']),
  ('Step 1 - yes, it is. Step 3: ["tree"]', ['tree']),
  ('Step 1: yes. Step 3: the list is ["a b", "c"].', ['a b', 'c']),
  ('Step 1: yes. Step 3: ["the dog\'s bowl"]', ["the dog's bowl"]),
  ('Step 1: yes. Step 3: [\'say "hi"\']', ['say "hi"']),
  ('Step 1: yes. Step 3: ["cat", "cat", " "]', ['cat']),
  ('Step 1: yes. Step 2: [1, 2]. Step 3: ["x"]', ['x']),
  ('Step 1: yes. Step 3: ["x"] and ["y"]', ['x']),
  ('Step 1: no. Step 2: null. Step 3: null', []),
  ('Step 1: no. Step 3: ["cat"]', []),
  ('Step 1: yes. Step 3: null', []),
  ('Step 1: yes. Step 3: []', []),
  ('Step 1: yes. Step 3: ["cat"', []),
  ('Step 1: yes. Step 3: [cat, dog]', []),
  ('Step 1: yes. Step 3: [1, 2]', []),
  ('Step 1: yes. Step 3: [__import__("os").getcwd()]', []),
  ('', []),
)


class QueryTest(parameterized.TestCase):
  @parameterized.parameters(*ANSWERS)
  def test_objects_of_an_answer(self, text, expected):
    self.assertEqual(quota_scorer.parse_objects(text), expected)

  def test_prompts(self):
    self.assertIn('Step 3', quota_scorer.decouple_prompt('Why?'))
    self.assertIn(
      'any object of cat, hat?', quota_scorer.frame_prompt('Q?', ['cat', 'hat'])
    )
    fallback = quota_scorer.frame_prompt('Why is it?', [])
    self.assertIn('Why is it?\nDoes the image contain sufficient', fallback)

  def test_what_is_no_list_is_refused(self):
    for bad in ('["cat"]', ('cat',), ['cat', 1]):
      with self.assertRaisesRegex(TypeError, 'a list of strings is needed'):
        quota_scorer.check_objects(bad)


@pytest.mark.loose_promotion  # optax promotes.
class ScorersTest(parameterized.TestCase):
  def test_probability_of_yes(self):
    logits = jnp.log(jnp.array([[0.2, 0.6, 0.2], [0.1, 0.1, 0.8]]))
    both = quota_scorer.answer_probability
    np.testing.assert_allclose(both(logits, 1), [0.6, 0.1], rtol=1e-5)
    np.testing.assert_allclose(both(logits, 1, 0), [0.75, 0.5], rtol=1e-5)

  def test_frames_in_batches_of_one_shape(self):
    shapes = []

    def scorer(frames, question):
      shapes.append(frames.shape)
      return jnp.asarray(frames[:, 0] * question, jnp.float32)

    frames = np.arange(14.0).reshape(7, 2)
    got = quota_scorer.score_frames(scorer, frames, 0.5, batch=3)
    np.testing.assert_allclose(got, frames[:, 0] / 2)
    self.assertEqual(set(shapes), {(3, 2)})

  def test_similarity_finds_the_frame(self):
    frames = jnp.eye(5, 8)
    got = quota_scorer.similarity(frames, 3 * frames[2])
    self.assertGreater(float(got[2]), 0.99)
    np.testing.assert_allclose(got.sum(), 1, rtol=1e-6)

  def test_the_light_scorer_learns_which_frame_has_the_object(self):
    # A frame is relevant if one of its 4 tokens is the object asked for.
    objects = jax.random.normal(jax.random.key(0), (6, 16))
    rng = np.random.default_rng(0)

    def batch(n):
      which = rng.integers(0, 6, (n, 4, 4))
      asked = rng.integers(0, 6, n)
      x = objects[which.reshape(n, 16)]
      ts = interface.token_set(x, grid=(4, 2, 2))
      relevant = (which == asked[:, None, None]).any(-1)
      return ts, objects[asked][:, None], jnp.asarray(relevant)

    ts, query, _ = batch(32)
    params = quota_scorer.init(jax.random.key(1), ts, query)
    optimizer = optax.adam(1e-2)
    update = jax.jit(training.step(quota_scorer.light_loss, optimizer))
    state = optimizer.init(params)
    for _ in range(80):
      params, state, _, _ = update(params, state, *batch(32))
    ts, query, relevant = batch(256)
    logits = quota_scorer.light_logits(params, ts, query)
    right = float(jnp.mean((logits > 0) == relevant))
    self.assertGreater(right, 0.9)


if __name__ == '__main__':
  absltest.main()

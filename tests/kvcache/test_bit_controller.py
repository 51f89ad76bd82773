"""Tests of jaxq.kvcache.bit_controller and experiments.bit_harm."""

import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments import bit_harm
from jaxq.kvcache import bit_controller, dont_waste_bits
from tests.kvcache import test_models, testing

COST, QUALITY = (
  jnp.array([0.15, 0.3, 0.5, 1.0]),
  jnp.array([0.2, 0.7, 0.9, 1.0]),
)


def data(n=400, seed=0):
  """Features, and harm that one of them decides."""
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(n, 4))
  size = np.exp(2 * features[:, 0] + 0.1 * rng.normal(size=n))
  harm = size[:, None] * np.array([1.0, 0.1, 0.001])
  return features.astype(np.float32), harm


class FeaturesTest(parameterized.TestCase):
  def test_rarity_of_a_stream_by_hand(self):
    stream = [5, 5, 7, 5, 9]
    tokens = jnp.array([stream[:2] + [0] * 6])
    got, first = bit_controller.rarity(
      tokens, jnp.array([stream[2:]]), jnp.array([2]), jnp.array([1])
    )
    # Before 7: two tokens, one kind; before 5: three of two; before 9: four.
    want = [-math.log(1 / 4), -math.log(3 / 6), -math.log(1 / 7)]
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    self.assertEqual(first[0].tolist(), [True, False, True])

  def test_entropy_and_confidence_have_their_ranges(self):
    logits = 5 * jax.random.normal(jax.random.key(0), (3, 50))
    entropy, confidence = bit_controller.of_logits(logits)
    self.assertTrue(((entropy >= 0) & (entropy <= math.log(50))).all())
    self.assertTrue(((confidence > 0) & (confidence <= 1)).all())
    flat, sure = bit_controller.of_logits(jnp.zeros((50,)))
    self.assertAlmostEqual(float(flat), math.log(50), places=5)
    self.assertAlmostEqual(float(sure), 1 / 50, places=6)


class LossTest(parameterized.TestCase):
  def test_by_hand_and_its_gradient(self):
    logits = jnp.array([[0.3, -0.2, 0.5, 0.1]])
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    want = -math.log(p[1]) + 0.1 * p @ COST + 0.1 * (1 - p @ QUALITY)

    def loss(o):
      return bit_controller.controller_loss(o, jnp.array([1]), COST, QUALITY)

    self.assertAlmostEqual(float(loss(logits)), float(want), places=5)
    gradient = jax.grad(loss)(logits)[0]
    for k in range(4):
      e = jnp.zeros((1, 4)).at[0, k].set(1e-2)
      slope = (loss(logits + e) - loss(logits - e)) / 2e-2
      self.assertAlmostEqual(float(gradient[k]), float(slope), places=3)

  def test_costs_are_bytes(self):
    np.testing.assert_allclose(
      bit_controller.byte_costs(64),
      [(128 + 32) / 1024, (256 + 32) / 1024, (512 + 32) / 1024, 1],
    )

  def test_labels_have_the_wanted_mean(self):
    _, harm = data()
    for mean in (3.0, 5.05, 8.0):
      classes = bit_controller.labels(harm, mean)
      got = np.array(bit_controller.CLASSES)[classes].mean()
      self.assertAlmostEqual(got, mean, delta=0.1)
    order = np.argsort(harm[:, 0])  # More harm, no fewer bits.
    self.assertTrue((np.diff(classes[order]) >= 0).all())


class TrainTest(parameterized.TestCase):
  def test_learns_what_decides_and_costs_count(self):
    features, harm = data()
    bits = []
    for beta in (0.0, 10.0):
      trained = bit_controller.train(
        features, harm, head_dim=64, beta=beta, epochs=20, hidden=16
      )
      logits = trained.logits(jnp.asarray(features))
      bits.append(float(bit_controller.expected_bits(logits).mean()))
      if not beta:
        right = np.argmax(logits, -1) == bit_controller.labels(harm, 5.05)
        self.assertGreater(right.mean(), 0.8)
        # The shares of the thresholds are those of the tokens.
        value = trained.expected_bits(jnp.asarray(features))
        limits = trained.thresholds((0.35, 0.35, 0.2, 0.1))
        share = np.mean(np.asarray(value)[:, None] > limits, axis=0)
        np.testing.assert_allclose(share, [0.65, 0.3, 0.1], atol=0.02)
    self.assertGreater(bits[0], bits[1])

  def test_files(self):
    features, harm = data(60)
    trained = bit_controller.train(features, harm, head_dim=64, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'controller.json'
      bit_controller.save(path, trained)
      self.assertLess(path.stat().st_size, 100_000)
      loaded = bit_controller.load(str(path))
      np.testing.assert_allclose(
        loaded.logits(jnp.asarray(features)),
        trained.logits(jnp.asarray(features)),
        atol=2e-2,
      )
      config = dont_waste_bits.DontWasteBitsConfig(controller=str(path))
      config.init(testing.shape())
      classes = dont_waste_bits.choose(
        config, jnp.asarray(features)[None], jnp.zeros((1,), jnp.int32)
      )
      self.assertEqual(classes.shape, (1, 60))
      bad = path.with_name('bad.json')
      bad.write_text('[]')
      with self.assertRaisesRegex(ValueError, 'is no file of a bit controller'):
        bit_controller.load(str(bad))

  def test_messages(self):
    features, harm = data(20)
    with self.assertRaisesRegex(ValueError, 'mean_bits=20; allowed 2..16'):
      bit_controller.labels(harm, 20)
    with self.assertRaisesRegex(ValueError, 'harm of some tokens is NaN'):
      bit_controller.labels(harm * np.nan, 5)
    with self.assertRaisesRegex(ValueError, 'features hold NaN'):
      bit_controller.train(features * np.nan, harm, head_dim=64)


class HarmTest(parameterized.TestCase):
  def test_fewer_bits_harm_more(self):
    made = test_models.model()
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24), np.int32)
    features, harm = bit_harm.measure(
      made, tokens, samples=6, horizon=4, rows=4
    )
    self.assertEqual(features.shape, (12, 4))
    self.assertEqual(harm.shape, (12, 3))
    self.assertTrue(np.isfinite(features).all())
    self.assertTrue((harm > -1e-7).all())
    means = harm.mean(0)
    self.assertGreater(means[0], means[1])
    self.assertGreater(means[1], means[2])
    with self.assertRaisesRegex(
      ValueError, 'horizon=20 and samples=6 in texts'
    ):
      bit_harm.measure(made, tokens, samples=6, horizon=20)


if __name__ == '__main__':
  absltest.main()

"""Tests of experiments.benchmark."""

import dataclasses

from absl.testing import absltest, parameterized

from jaxq.kvcache import registry
from tests.decode import testing
from tests.experiments import testing as experiments_testing


def setUpModule():
  global benchmark
  benchmark = experiments_testing.entry_point('benchmark')


class BenchmarkTest(parameterized.TestCase):
  def test_a_row(self):
    model = testing.model()
    load = benchmark.Load(context=20, batch=2, steps=4, chunk=16)
    row = benchmark.measure(model, registry.parse('contiguous'), load)
    self.assertEqual(row.name, 'contiguous')
    c = model.config
    size = 2 * 2 * 24 * c.num_layers * c.num_kv_heads * c.head_dim * 4
    size += c.num_layers * 2 * 4  # Lengths.
    self.assertAlmostEqual(row['cache'].value * 2**20, size)
    self.assertAlmostEqual(row['bits per key or value'].value, 32, delta=0.3)
    self.assertGreater(row['prefill per token'].value, 0)
    step = row['decode per step']
    self.assertIsNotNone(step.low)
    self.assertEqual(step.conventions['prefill chunk'], 16)

  def test_half_the_tokens_are_half_the_bytes(self):
    model = testing.model()
    load = benchmark.Load(context=60, steps=4)
    sizes = [
      benchmark.measure(model, registry.parse(text), load)['cache'].value
      for text in ('evict:policy=knorm,recent=8,ratio=0.5', 'contiguous')
    ]
    # Heads of 4 are small beside a position and a score.
    self.assertAlmostEqual(sizes[0] / sizes[1], 0.5 * 40 / 32, delta=0.02)

  def test_messages(self):
    model = testing.model()
    load = benchmark.Load(context=250, steps=32)
    with self.assertRaisesRegex(ValueError, 'context=250 and steps=32 make 28'):
      benchmark.measure(model, registry.parse('int8'), load)
    other = dataclasses.replace(model, family='vit', name='vit-s14')
    with self.assertRaisesRegex(NotImplementedError, 'vit-s14, a vit model'):
      benchmark.measure(other, registry.parse('int8'), load)
    with self.assertRaisesRegex(ValueError, 'steps=1; it must be at least 2'):
      benchmark.Load(context=60, steps=1)


if __name__ == '__main__':
  absltest.main()

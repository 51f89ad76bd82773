"""Tests of jaxq.quant.transform."""

from absl.testing import absltest, parameterized

from jaxq.quant import transform


def add(name, amount):
  def apply(block, params, quant, stats):
    del block, stats
    return {'x': params['x'] + amount}, {**quant, name: amount}

  return transform.Transform(name=name, apply=apply)


class TransformTest(parameterized.TestCase):
  def test_chain_keeps_order_and_flattens(self):
    a, b, c = add('a', 1), add('b', 2), add('c', 3)
    chained = transform.chain(a, transform.chain(b, c))
    names = [stage.name for stage in transform.stages(chained)]
    self.assertEqual(names, ['a', 'b', 'c'])
    params, quant = {'x': 0}, {}
    for stage in transform.stages(chained):
      self.assertEqual(stage.rest, ())
      self.assertEqual(stage.observe(None), {})
      params, quant = stage.apply(None, params, quant, {})
    self.assertEqual(params, {'x': 6})
    self.assertEqual(quant, {'a': 1, 'b': 2, 'c': 3})

  def test_a_chain_of_one_is_that_one(self):
    a = add('a', 1)
    self.assertEqual(transform.chain(a), a)
    self.assertEqual(transform.stages(a), (a,))

  def test_an_empty_chain_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'no transforms given'):
      transform.chain()


if __name__ == '__main__':
  absltest.main()

"""Tests of jaxq.quant.mixed."""

import itertools
import json
import pathlib
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import driver
from jaxq.nn import blocks
from jaxq.numerics import spec
from jaxq.quant import gptq, mixed, round_to_nearest, transform
from tests.calibrate import testing as calibration
from tests.quant import testing

TWO, SIX = mixed.choice('2'), mixed.choice('6g8')


def rtn(weights):
  return round_to_nearest.round_to_nearest(
    round_to_nearest.RoundToNearestConfig(weights=weights)
  )


def gptq_of(weights, **fields):
  return gptq.gptq(gptq.GptqConfig(weights=weights, **fields))


def allocation(**fields):
  return mixed.Allocation(
    **{
      'specs': {'2': TWO, '6g8': SIX},
      'linears': {
        'blocks.0.attention.q_proj': '2',
        'blocks.0.attention.k_proj': '6g8',
        'blocks.1.mlp.down_proj': '2',
      },
      'bits': 4.0,
      **fields,
    }
  )


class AllocateTest(parameterized.TestCase):
  def test_by_hand(self):
    # The second unit gains 8 per bit, the first 1; six bits buy one of them.
    losses = np.array([[2.0, 1.0], [9.0, 1.0]])
    bits = np.array([[2.0, 4.0], [2.0, 4.0]])
    np.testing.assert_array_equal(mixed.allocate(losses, bits, 6.0), [0, 1])
    np.testing.assert_array_equal(mixed.allocate(losses, bits, 8.0), [1, 1])
    np.testing.assert_array_equal(mixed.allocate(losses, bits, 4.0), [0, 0])

  @parameterized.parameters(range(6))
  def test_close_to_the_best_of_all(self, seed):
    rng = np.random.default_rng(seed)
    units, choices = 6, 4
    width = np.array([2.0, 3.0, 4.0, 6.0])
    size = rng.integers(1, 5, (units, 1))
    bits = size * width
    losses = rng.uniform(0.1, 1, (units, 1)) * 4.0**-width * size
    budget = 4.0 * size.sum()
    picks = mixed.allocate(losses, bits, budget)
    rows = np.arange(units)
    self.assertLessEqual(bits[rows, picks].sum(), budget)
    best = min(
      losses[rows, each].sum()
      for each in itertools.product(range(choices), repeat=units)
      if bits[rows, each].sum() <= budget
    )
    # Off the hull by less than one unit's step.
    self.assertLess(losses[rows, picks].sum(), 1.5 * best)

  def test_what_is_not_allowed_is_not_taken(self):
    losses = np.array([[np.inf, 1.0], [2.0, 1.0]])
    bits = np.array([[0.0, 4.0], [2.0, 4.0]])
    np.testing.assert_array_equal(mixed.allocate(losses, bits, 6.0), [1, 0])

  def test_more_budget_is_no_worse(self):
    rng = np.random.default_rng(0)
    losses = rng.uniform(size=(20, 5))
    bits = rng.uniform(1, 8, size=(20, 5))
    spent = [
      losses[np.arange(20), mixed.allocate(losses, bits, budget)].sum()
      for budget in (50.0, 80.0, 120.0, 200.0)
    ]
    self.assertEqual(spent, sorted(spent, reverse=True))

  def test_too_small_a_budget(self):
    with self.assertRaisesRegex(ValueError, 'budget of 3 bits; the cheap.* 4.'):
      mixed.allocate(np.ones((2, 1)), np.full((2, 1), 2.0), 3.0)


class AllocationTest(parameterized.TestCase):
  def test_round_trip(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'allocation.json'
    path.write_text(json.dumps(allocation().to_dict()))
    self.assertEqual(mixed.load(path), allocation())

  @parameterized.parameters(
    ('4', 4, 'channel', -1), ('3g64', 3, 'group', 64), ('8', 8, 'channel', -1)
  )
  def test_choice(self, text, bits, granularity, group_size):
    made = mixed.choice(text)
    self.assertEqual(made.bits, bits)
    self.assertEqual(made.granularity, granularity)
    self.assertEqual(made.group_size, group_size)
    self.assertFalse(mixed.choice(text, symmetric=False).symmetric)

  @parameterized.parameters('9', '4g', 'g64', '4g0', 'W4', '')
  def test_choice_message(self, text):
    with self.assertRaisesRegex(
      ValueError, f'--choices={text}; allowed are <b'
    ):
      mixed.choice(text)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, r"take choices \['6g8'\]; allowed"):
      allocation(specs={'2': TWO})
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'other.json'
    path.write_text('{"a": 1}')
    with self.assertRaisesRegex(ValueError, r"other.json: .*\['a'\]; allowed"):
      mixed.load(path)
    path.write_text('{')
    with self.assertRaisesRegex(ValueError, 'other.json: '):
      mixed.load(path)


class MixedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.block, self.params = testing.small_block()
    self.x = testing.inputs()

  @parameterized.parameters((rtn,), (gptq_of,))
  def test_each_linear_is_as_if_it_were_alone(self, method):
    default = mixed.choice('4')
    specs = {mixed.DEFAULT: default, '2': TWO, '6g8': SIX}
    combined = mixed.mixed({name: method(s) for name, s in specs.items()})
    labelled = mixed.label(self.block, 0, allocation())
    params, _ = testing.run(labelled, self.params, combined, self.x)
    for path, want in (
      ('attention/q_proj', TWO),
      ('attention/k_proj', SIX),
      ('mlp/down_proj', default),
    ):
      alone, _ = testing.run(self.block, self.params, method(want), self.x)
      got, expected = (blocks.kernel_of(tree, path) for tree in (params, alone))
      self.assertEqual(got.spec, want)
      np.testing.assert_array_equal(got.qvalue, expected.qvalue)
      np.testing.assert_array_equal(got.scale, expected.scale)

  def test_one_choice_is_the_method_itself(self):
    combined = mixed.mixed({mixed.DEFAULT: rtn(TWO)})
    params, _ = testing.run(self.block, self.params, combined, self.x)
    alone, _ = testing.run(self.block, self.params, rtn(TWO), self.x)
    jax.tree.map(np.testing.assert_array_equal, params, alone)

  def test_several_stages_are_refused(self):
    with self.assertRaisesRegex(NotImplementedError, "choice '2' has several"):
      mixed.mixed({'2': gptq_of(TWO, true_sequential=True)})


class LabelledModelTest(absltest.TestCase):
  def test_the_driver_gives_each_linear_its_bits(self):
    model = mixed.LabelledModel(calibration.small_model(), allocation())
    default = spec.QuantSpec(dtype='int4')
    chain = transform.chain(
      mixed.mixed({mixed.DEFAULT: rtn(default), '2': rtn(TWO), '6g8': rtn(SIX)})
    )
    config = driver.CalibrationConfig(batch_size=4)
    store = calibration.MemoryStore()
    driver.Calibrator(model, chain, config).run(calibration.tokens(), store)
    found = {
      blocks.name_of(i, path): blocks.kernel_of(
        store.blocks[i]['params'], path
      ).spec.dtype
      for i in range(2)
      for path in ('attention/q_proj', 'attention/k_proj', 'mlp/down_proj')
    }
    self.assertEqual(
      found,
      {
        'blocks.0.attention.q_proj': 'int2',
        'blocks.0.attention.k_proj': 'int6',
        'blocks.0.mlp.down_proj': 'int4',
        'blocks.1.attention.q_proj': 'int4',
        'blocks.1.attention.k_proj': 'int4',
        'blocks.1.mlp.down_proj': 'int2',
      },
    )

  def test_unknown_linears(self):
    wrong = allocation(linears={'blocks.9.mlp.down_proj': '2'})
    with self.assertRaisesRegex(
      ValueError, 'blocks.9.mlp.down_proj and 0 more'
    ):
      mixed.LabelledModel(calibration.small_model(), wrong)


if __name__ == '__main__':
  absltest.main()

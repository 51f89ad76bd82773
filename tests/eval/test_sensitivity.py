"""Tests of jaxq.eval.sensitivity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.eval import sensitivity
from jaxq.nn import blocks, taps
from jaxq.numerics import qarray
from jaxq.quant import gptq, mixed, round_to_nearest
from models import decoder
from tests.calibrate import testing

SPECS = {name: mixed.choice(name) for name in ('2', '4', '4g8', '8', '4g7')}


def rtn(weights):
  return round_to_nearest.round_to_nearest(
    round_to_nearest.RoundToNearestConfig(weights=weights)
  )


def setUpModule():
  global MODEL, TOKENS
  MODEL, TOKENS = testing.small_model(), testing.tokens()


def head(outside, x):
  module = decoder.Decoder(MODEL.config_of(outside))
  return module.apply({'params': outside}, x, method='logits')


def measure(method=rtn, specs=SPECS, **fields):
  config = sensitivity.SensitivityConfig(**{'probes': ('2', '4'), **fields})
  return sensitivity.measure(MODEL, head, specs, method, TOKENS, config)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config, runs, variables):
  return decoder.Decoder(config, runs).apply(variables, TOKENS)[0]


def logits(change=None):
  """Of the whole float model, `change` (i, paths, spec) rounded."""
  parts = []
  for i in range(MODEL.num_blocks):
    params = MODEL.block_params(i)
    if change is not None and change[0] == i:
      for path in change[1]:
        kernel = jnp.asarray(blocks.kernel_of(params, path))
        rounded = qarray.fake_quant(kernel, change[2])
        params = taps.set_path(params, f'{path}/kernel', rounded)
    parts.append({'params': params, 'quant': {}})
  variables, runs = decoder.stack(MODEL.outside(), parts)
  return _apply(MODEL.config, runs, variables)


def kl(change):
  p, q = jax.nn.log_softmax(logits()), jax.nn.log_softmax(logits(change))
  return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


class MeasureTest(parameterized.TestCase):
  def test_kl_is_that_of_the_whole_model(self):
    units = measure()
    self.assertLen(units, 7 * MODEL.num_blocks)
    by_name = {unit.name: unit for unit in units}
    for i, path in ((0, 'attention/v_proj'), (1, 'mlp/down_proj')):
      unit = by_name[blocks.name_of(i, path)]
      for probe in ('2', '4'):
        want = kl((i, [path], SPECS[probe]))
        np.testing.assert_allclose(unit.kl[probe], want, rtol=1e-2, atol=1e-6)
      self.assertGreater(unit.kl['2'], unit.kl['4'])
      self.assertGreater(unit.error['4'], unit.error['8'])
      self.assertEqual(unit.linears, (unit.name,))

  def test_masked_predictions_do_not_count(self):
    mask = np.arange(TOKENS.shape[1])[None] < np.full((len(TOKENS), 1), 5)
    specs = {'2': SPECS['2']}
    config = sensitivity.SensitivityConfig(probes=('2',), unit='block')
    (*_, unit) = sensitivity.measure(
      MODEL, head, specs, rtn, TOKENS, config, mask=mask
    )
    last = MODEL.num_blocks - 1
    paths = [lin.path for lin in MODEL.block_at(last).linears]
    p, q = logits(), logits((last, paths, SPECS['2']))
    p, q = jax.nn.log_softmax(p[:, :5]), jax.nn.log_softmax(q[:, :5])
    want = float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))
    np.testing.assert_allclose(unit.kl['2'], want, rtol=1e-2)

  def test_a_block_at_once(self):
    units = measure(unit='block')
    names = [f'blocks.{i}' for i in range(MODEL.num_blocks)]
    self.assertEqual([unit.name for unit in units], names)
    paths = [lin.path for lin in MODEL.block_at(1).linears]
    want = kl((1, paths, SPECS['4']))
    np.testing.assert_allclose(units[1].kl['4'], want, rtol=1e-2)
    self.assertLen(units[1].linears, 7)
    sizes = [
      blocks.kernel_of(MODEL.block_params(1), path).size for path in paths
    ]
    self.assertEqual(units[1].size, sum(sizes))

  def test_bits_count_metadata_and_unfit_groups_are_left_out(self):
    unit = measure(probes=('4',))[0]
    K = blocks.kernel_of(MODEL.block_params(0), 'attention/q_proj').shape[0]
    self.assertNotIn('4g7', unit.bits)
    self.assertEqual(unit.bits['4'], 4 + 32 / K)
    self.assertEqual(unit.bits['4g8'], 4 + 32 / 8)
    self.assertEqual(unit.predicted('4g7'), float('inf'))

  def test_batches_and_methods_with_statistics(self):
    small = {'2': SPECS['2']}

    def of(weights):
      return gptq.gptq(gptq.GptqConfig(weights=weights))

    one = measure(of, small, probes=('2',), batch_size=8, ignore=('re:mlp',))
    two = measure(of, small, probes=('2',), batch_size=2, ignore=('re:mlp',))
    plain = measure(specs=small, probes=('2',), ignore=('re:mlp',))
    self.assertLen(two, 4 * MODEL.num_blocks)
    named = {unit.name: unit for unit in one}
    better = 0
    for unit, rounded in zip(two, plain, strict=True):
      np.testing.assert_allclose(
        unit.kl['2'], named[unit.name].kl['2'], rtol=0.05
      )
      better += unit.error['2'] < rounded.error['2']
    self.assertGreater(better, 0.75 * len(two))

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "unit='layer'; allowed"):
      measure(unit='layer')
    with self.assertRaisesRegex(ValueError, r'probes=\(\); KL must be'):
      measure(probes=())
    with self.assertRaisesRegex(ValueError, '--probes=5: KL is .*allowed are'):
      measure(probes=('5',))
    with self.assertRaisesRegex(ValueError, '8 sequences .* batch_size=3'):
      measure(batch_size=3)


class PredictedTest(absltest.TestCase):
  def test_by_hand(self):
    unit = sensitivity.Unit(
      name='u',
      linears=('u',),
      size=1,
      bits={'2': 2, '3': 3, '4': 4, '8': 8},
      error={'2': 1.0, '3': 0.1, '4': 0.01, '8': 1e-4},
      kl={'2': 4.0, '4': 0.04},
    )
    self.assertEqual(unit.predicted('2'), 4.0)
    self.assertAlmostEqual(unit.predicted('3'), 0.4)  # Between the probes.
    self.assertAlmostEqual(unit.predicted('8'), 4e-4)  # As the error falls.


if __name__ == '__main__':
  absltest.main()

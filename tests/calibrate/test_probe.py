"""Tests of jaxq.calibrate.probe: what it sees beside a calibration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import driver, probe
from jaxq.nn import taps
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  gptq,
  rotate,
  round_to_nearest,
  smoothquant,
)
from jaxq.quant import transform as transform_lib
from models import loading
from tests.calibrate import testing

W4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=16)
A8 = spec_lib.QuantSpec(dtype='int8', granularity='token')
# Two sequences, so that the first batch is what the probe follows.
CONFIG = driver.CalibrationConfig(batch_size=probe.SAMPLES)
OUTLIER = 3  # A channel that the planted norms make large.


def rtn():
  return round_to_nearest.round_to_nearest(
    round_to_nearest.RoundToNearestConfig(weights=W4)
  )


def chained(*before):
  quantize = activations.activations(activations.ActivationsConfig(inputs=A8))
  return transform_lib.chain(*before, rtn(), quantize)


def smooth():
  return smoothquant.smoothquant(smoothquant.SmoothQuantConfig())


def turn():
  return rotate.rotate(rotate.RotateConfig())


class Planted(testing.ArraySource):
  """The small model with one channel of every norm's output a hundredfold."""

  def block(self, i):
    params = super().block(i)
    for norm in ('input_norm', 'post_norm'):
      scale = np.array(params[norm]['scale'])
      scale[OUTLIER] *= 100
      params = taps.set_path(params, f'{norm}/scale', scale)
    return params


def planted():
  model = testing.small_model()
  source = model.source
  source = Planted(source.config, source.outside_params, source.blocks)
  return loading.OpenModel(model.config, source, 'planted')


@functools.cache
def run(name, inputs='quantized', done=0):
  """(model, store, reports); done: blocks that an earlier run left."""
  transform = {
    'gptq': gptq.gptq(gptq.GptqConfig(weights=W4)),
    'rtn': rtn(),
    'w4a8': chained(),
    'smooth': chained(smooth()),
    'rotate': chained(turn()),
  }[name]
  store = testing.MemoryStore()
  if done:
    whole = run(name, inputs)[1]
    store.save_outside(whole.outside)
    for i in range(done):
      store.save_block(i, whole.blocks[i])
  config = dataclasses.replace(CONFIG, inputs=inputs)
  reports = []
  model = planted()
  driver.Calibrator(model, transform, config).run(
    testing.tokens(4), store, reports.append
  )
  return model, store, reports


def float_stream(model):
  """The float model's own activations in front of every block, and behind."""
  x = model.embed(model.outside(), testing.tokens(4)[: probe.SAMPLES])
  xs = [x]
  for i in range(model.num_blocks):
    variables = {'params': model.block_params(i), 'quant': {}}
    xs.append(model.block_at(i).apply(variables, xs[-1]))
  return xs


def sqnr(signal, other):
  noise = np.sum((np.asarray(signal) - np.asarray(other)) ** 2)
  return 10 * np.log10(np.sum(np.asarray(signal) ** 2) / noise)


class ProbeTest(parameterized.TestCase):
  def test_by_hand(self):
    signal = jnp.array([3.0, 4.0])
    self.assertAlmostEqual(
      float(probe.sqnr(signal, signal + 0.5)), 10 * np.log10(50), places=4
    )

  @parameterized.parameters('rtn', 'w4a8')
  def test_rounding_to_nearest_is_its_own_baseline(self, name):
    _, _, reports = run(name)
    # Block 0 is fed the same by both; later ones by the model and by its like.
    self.assertAlmostEqual(
      reports[0].rtn_sqnr_db, reports[0].output_sqnr_db, places=2
    )
    for report in reports[1:]:
      self.assertAlmostEqual(report.rtn_sqnr_db, report.output_sqnr_db, delta=3)

  def test_before_is_the_float_model_whatever_the_method(self):
    model, _, reports = run('rtn')
    xs = float_stream(model)
    for name in ('rtn', 'smooth', 'rotate'):
      for i, report in enumerate(run(name)[2]):
        variables = {'params': model.block_params(i), 'quant': {}}
        tapped = model.block_at(i).tapped(variables, xs[i])
        self.assertLen(report.channels, 4)
        for tap, (before, _) in report.channels.items():
          x = np.asarray(taps.get_path(tapped, tap))
          want = np.abs(x).reshape(-1, x.shape[-1]).max(0)
          np.testing.assert_allclose(before, want, rtol=1e-4, atol=1e-5)
    self.assertEqual(list(reports[0].channels)[0], 'attention/q_proj/in')

  @parameterized.parameters('smooth', 'rotate')
  def test_a_method_against_outliers_takes_them_away(self, name):
    """The claim: largest over median falls tenfold; rounding leaves it."""

    def ratio(channels):
      return np.max(channels) / np.median(channels)

    for report in run(name)[2]:
      before, after = report.channels['attention/q_proj/in']
      self.assertEqual(np.argmax(before), OUTLIER)
      self.assertGreater(ratio(before), 30)
      self.assertLess(ratio(after), ratio(before) / 5)
    before, after = run('w4a8')[2][0].channels['attention/q_proj/in']
    np.testing.assert_allclose(after, before, rtol=1e-5)

  def test_the_baseline_tells_a_better_method(self):
    reports = run('gptq')[2]
    gains = [r.output_sqnr_db - r.rtn_sqnr_db for r in reports]
    self.assertGreater(np.mean(gains), 0.5, gains)

  def test_the_stream_is_compared_with_the_float_models(self):
    model, store, reports = run('w4a8')
    want = float_stream(model)
    got = want[0]
    for i, report in enumerate(reports):
      got = model.block_at(i).apply(store.blocks[i], got)
      level = sqnr(want[i + 1], got)
      self.assertAlmostEqual(report.stream_sqnr_db, level, delta=0.05)

  def test_another_basis_or_float_feeding_has_no_stream(self):
    self.assertTrue(all(r.stream_sqnr_db is None for r in run('rotate')[2]))
    for report in run('rtn', 'float')[2]:
      self.assertIsNone(report.stream_sqnr_db)
      self.assertIsNotNone(report.rtn_sqnr_db)

  @parameterized.parameters('quantized', 'float')
  def test_a_resumed_run_reads_the_same(self, inputs):
    whole = run('smooth', inputs)[2]
    (resumed,) = run('smooth', inputs, done=2)[2]
    self.assertEqual(resumed.rtn_sqnr_db, whole[2].rtn_sqnr_db)
    self.assertEqual(resumed.stream_sqnr_db, whole[2].stream_sqnr_db)
    jax.tree.map(
      np.testing.assert_array_equal, resumed.channels, whole[2].channels
    )

  def test_blocks_of_one_kind_share_compiled_functions(self):
    transform = chained(smooth())
    calibrator = driver.Calibrator(planted(), transform, CONFIG)
    calibrator.run(testing.tokens(4), testing.MemoryStore())
    # Of the float and of the quantized block; of the rounded one.
    self.assertEqual(calibrator._probe._observe._cache_size(), 2)
    self.assertEqual(calibrator._probe._apply._cache_size(), 1)


if __name__ == '__main__':
  absltest.main()

"""Tests of jaxq.calibrate.probe: what it sees beside a calibration."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import driver, probe
from jaxq.nn import blocks, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  gptq,
  llm_fp4,
  outliertune,
  rotate,
  round_to_nearest,
  smoothquant,
)
from jaxq.quant import transform as transform_lib
from models import loading
from tests.calibrate import testing
from tests.quant import testing as quant_testing

W8 = spec_lib.QuantSpec(dtype='int8', granularity='channel')
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


def folding(name, **fields):
  """A method that folds scales and sets input quantizers at once."""
  if name == 'outliertune':
    config = outliertune.OutlierTuneConfig(weights=W8, inputs=A8, **fields)
    return outliertune.outliertune(config)
  config = llm_fp4.LlmFp4Config(weights=W8, inputs=A8, rounds=0, **fields)
  return llm_fp4.llm_fp4(config)


class FoldedTest(parameterized.TestCase):
  @parameterized.parameters('outliertune', 'llm_fp4')
  def test_kernels_are_compared_in_one_scale(self, name):
    """At 8 bits rounding leaves more than 25 dB, whatever was folded."""
    # Without grouped heads, so that v takes the shifts of o as well.
    with mock.patch.object(quant_testing, 'HKV', quant_testing.H):
      block, params = quant_testing.small_block()
    method = folding(name)
    after, quant = quant_testing.run(
      block, params, method, quant_testing.inputs()
    )
    before = {'params': params, 'quant': {}}
    calibrator = driver.Calibrator(planted(), method, CONFIG)
    reports = calibrator._linear_reports(
      0, block, before, {'params': after, 'quant': quant}
    )
    self.assertLen(reports, 7)
    for linear in reports:
      self.assertGreater(linear.sqnr_db, 25, linear.name)
    # Their plain difference says nothing.
    path = 'attention/v_proj'
    got = qarray.dequantize(blocks.kernel_of(after, path))
    plain = probe.sqnr(blocks.kernel_of(params, path), got)
    self.assertLess(float(plain), 10)

  def test_without_rounding_nothing_else_differs(self):
    block, params = quant_testing.small_block()
    method = folding('outliertune', weight='none')
    after, quant = quant_testing.run(
      block, params, method, quant_testing.inputs()
    )
    before = {'params': params, 'quant': {}}
    moved = False
    for lin in block.linears:
      got = probe.folded(
        block, lin.path, before, {'params': after, 'quant': quant}
      )
      want = blocks.kernel_of(after, lin.path)
      np.testing.assert_allclose(got, want, rtol=1e-5)  # Two divisions.
      kernel = blocks.kernel_of(params, lin.path)
      moved |= not np.allclose(kernel, want, rtol=0.1)
    self.assertTrue(moved)

  def test_a_norm_without_a_channel_leaves_its_row(self):
    block, params = quant_testing.small_block()
    scale = params['input_norm']['scale'].at[0].set(0.0)
    params = taps.set_path(params, 'input_norm/scale', scale)
    both = {'params': params, 'quant': {}}
    path = 'attention/q_proj'
    got = probe.folded(block, path, both, both)
    np.testing.assert_array_equal(got, blocks.kernel_of(params, path))


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

  def test_batches_of_one_are_compared_with_the_sample_they_hold(self):
    model, store, reports = planted(), testing.MemoryStore(), []
    config = driver.CalibrationConfig(batch_size=1)
    driver.Calibrator(model, chained(), config).run(
      testing.tokens(4), store, reports.append
    )
    want = [x[:1] for x in float_stream(model)]
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
    # Of the float and the quantized block; of the smoothed and the rounded.
    self.assertEqual(calibrator._probe._observe._cache_size(), 2)
    self.assertEqual(calibrator._probe._apply._cache_size(), 2)


if __name__ == '__main__':
  absltest.main()

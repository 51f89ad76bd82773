"""Tests of jaxq.calibrate.driver."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import driver
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import activations, gptq, rotate, round_to_nearest, smoothquant
from jaxq.quant import transform as transform_lib
from models import decoder
from tests.calibrate import testing
from tests.models import test_decoder

W4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=16)
A8 = spec_lib.QuantSpec(dtype='int8', granularity='token')
CONFIG = driver.CalibrationConfig(batch_size=4)


def rtn():
  return round_to_nearest.round_to_nearest(
    round_to_nearest.RoundToNearestConfig(weights=W4)
  )


def gptq_w4():
  return gptq.gptq(gptq.GptqConfig(weights=W4))


def everything():
  return transform_lib.chain(
    rotate.rotate(rotate.RotateConfig()),
    smoothquant.smoothquant(smoothquant.SmoothQuantConfig()),
    gptq_w4(),
    activations.activations(activations.ActivationsConfig(inputs=A8)),
  )


def watch_streams():
  """Leaves what goes into each block in its `quant`."""

  def apply(block, params, quant, stats):
    del block
    return params, {**quant, 'seen': stats[transform_lib.STREAMS]}

  return transform_lib.Transform(name='watch', apply=apply, streams=True)


def calibrate(transform, config=CONFIG, model=None, store=None):
  model = model or testing.small_model()
  store = store or testing.MemoryStore()
  calibrator = driver.Calibrator(model, transform, config)
  reports = []
  calibrator.run(testing.tokens(), store, reports.append)
  return store, reports, calibrator


class DriverTest(parameterized.TestCase):
  def test_rtn_equals_quantizing_each_kernel(self):
    model = testing.small_model()
    store, reports, _ = calibrate(rtn(), model=model)
    self.assertLen(reports, 3)
    for i in range(3):
      got = store.blocks[i]['params']['mlp']['down_proj']['kernel']
      kernel = model.block_params(i)['mlp']['down_proj']['kernel']
      want = qarray.quantize(jnp.asarray(kernel), W4)
      np.testing.assert_array_equal(got.qvalue, want.qvalue)
    linear = reports[0].linears[0]
    self.assertEqual(linear.bits, 4 + 32 / 16)
    self.assertBetween(linear.sqnr_db, 15, 30)
    self.assertGreater(reports[0].output_sqnr_db, 10)

  def test_compiles_each_function_once_for_all_blocks(self):
    _, _, calibrator = calibrate(everything())
    unused = {'observe_rotate', 'observe_activations', 'forward_float'}
    for name, count in calibrator.compilations.items():
      self.assertEqual(count, 0 if name in unused else 1, name)

  def test_streams_are_those_of_the_float_and_of_the_quantized_model(self):
    model = testing.small_model()
    method = transform_lib.chain(watch_streams(), rtn())
    store, _, _ = calibrate(method, model=model)
    seen = store.blocks[1]['quant']['seen']
    x = model.embed(model.outside(), testing.tokens())
    y = {
      'float': {'params': model.block_params(0), 'quant': {}},
      'quantized': {'params': store.blocks[0]['params'], 'quant': {}},
    }
    for name, variables in y.items():
      want = model.block_at(0).apply(variables, x)
      np.testing.assert_allclose(seen[name], want, rtol=1e-4, atol=1e-4)
    self.assertGreater(np.abs(seen['float'] - seen['quantized']).max(), 1e-3)
    part = testing.MemoryStore()  # Resumed after one block.
    part.outside, part.blocks[0] = store.outside, store.blocks[0]
    calibrate(method, model=model, store=part)
    again = part.blocks[1]['quant']['seen']
    for name, array in seen.items():
      np.testing.assert_array_equal(again[name], array)

  @parameterized.parameters('quantized', 'float')
  def test_a_resumed_run_ends_with_the_same_bits(self, inputs):
    config = dataclasses.replace(CONFIG, inputs=inputs)
    whole, _, _ = calibrate(everything(), config)
    part = testing.MemoryStore()
    part.save_outside(whole.outside)
    for i in range(2):
      part.save_block(i, whole.blocks[i])
    _, reports, _ = calibrate(everything(), config, store=part)
    self.assertLen(reports, 1)
    for a, b in zip(
      jax.tree.leaves(whole.blocks[2]),
      jax.tree.leaves(part.blocks[2]),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)

  def test_inputs_change_what_later_blocks_see(self):
    quantized, _, _ = calibrate(gptq_w4())
    floats, _, _ = calibrate(
      gptq_w4(), dataclasses.replace(CONFIG, inputs='float')
    )

    def codes(store, i):
      return store.blocks[i]['params']['mlp']['up_proj']['kernel'].qvalue

    np.testing.assert_array_equal(codes(quantized, 0), codes(floats, 0))
    self.assertTrue(np.any(codes(quantized, 2) != codes(floats, 2)))

  def test_ignored_linears_stay_float_and_the_rest_still_runs(self):
    config = dataclasses.replace(CONFIG, ignore=('re:blocks.1.*', 'o_proj'))
    store, _, _ = calibrate(gptq_w4(), config)
    kernel = lambda i, a, b: store.blocks[i]['params'][a][b]['kernel']
    self.assertIsInstance(kernel(0, 'mlp', 'up_proj'), qarray.QArray)
    self.assertIsInstance(kernel(0, 'attention', 'o_proj'), np.ndarray)
    self.assertIsInstance(kernel(1, 'mlp', 'up_proj'), np.ndarray)
    variables, runs = decoder.stack(
      store.outside, [store.blocks[i] for i in range(3)]
    )
    self.assertEqual(runs, (1, 1, 1))
    logits, _ = decoder.Decoder(test_decoder.CONFIG, runs).apply(
      variables, jnp.asarray(testing.tokens()[:1])
    )
    self.assertTrue(bool(jnp.all(jnp.isfinite(logits))))

  def test_gptq_beats_rtn_on_the_model_output(self):
    model = testing.small_model()
    tokens = jnp.asarray(testing.tokens())

    def logits(blocks):
      variables, runs = decoder.stack(model.outside(), blocks)
      return decoder.Decoder(model.config, runs).apply(variables, tokens)[0]

    exact = logits([{'params': model.block_params(i)} for i in range(3)])

    def error(transform):
      store, _, _ = calibrate(transform, model=model)
      blocks = [store.blocks[i] for i in range(3)]
      return float(jnp.mean((logits(blocks) - exact) ** 2))

    self.assertLess(error(gptq_w4()), 0.8 * error(rtn()))


class BadInputTest(parameterized.TestCase):
  def test_nan_in_a_weight_names_the_tensor(self):
    model = testing.small_model()
    model.source.blocks[1] = jax.tree.map(np.array, model.source.blocks[1])
    model.source.blocks[1]['mlp']['up_proj']['kernel'][0, 0] = np.nan
    with self.assertRaisesRegex(
      ValueError, r'blocks\.1\.mlp\.up_proj\.kernel: NaN or Inf in the check'
    ):
      calibrate(rtn(), model=model)

  def test_overflowing_activations_name_the_block(self):
    model = testing.small_model()
    block = jax.tree.map(np.array, model.source.blocks[1])
    block['mlp']['gate_proj']['kernel'] *= 1e30
    block['mlp']['up_proj']['kernel'] *= 1e30
    model.source.blocks[1] = block
    with self.assertRaisesRegex(ValueError, r'blocks\.1.*NaN or Inf'):
      calibrate(rtn(), model=model)
    with self.assertRaisesRegex(
      ValueError, r'blocks\.1\.mlp\.down_proj\.in: hessian.*NaN or Inf'
    ):
      calibrate(gptq_w4(), model=model)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'batch_size=0'):
      driver.CalibrationConfig(batch_size=0)
    with self.assertRaisesRegex(ValueError, "inputs='exact'.*'float'"):
      driver.CalibrationConfig(inputs='exact')
    with self.assertRaisesRegex(ValueError, '8 calibration.*batch_size=3'):
      calibrate(rtn(), driver.CalibrationConfig(batch_size=3))
    with self.assertRaisesRegex(ValueError, '--ignore=lm_heads names no'):
      calibrate(rtn(), driver.CalibrationConfig(ignore=('lm_heads',)))
    calibrator = driver.Calibrator(testing.small_model(), rtn(), CONFIG)
    with self.assertRaisesRegex(ValueError, r'shape \(0, 8\)'):
      calibrator.run(np.zeros((0, 8), np.int32), testing.MemoryStore())


if __name__ == '__main__':
  absltest.main()

"""What the methods gain on the outliers they are made for (planted.py)."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, taps
from jaxq.numerics import qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  gptq,
  os_plus,
  outliertune,
  ptq161,
  round_to_nearest,
  smoothquant,
  transform,
)
from tests.quant import planted, test_os_plus, test_outliertune, testing

QuantSpec = spec_lib.QuantSpec
W8, W6 = test_outliertune.W8, test_outliertune.W6
W6_ASYM = test_os_plus.W6
A8, A8_TENSOR = test_outliertune.A8, test_os_plus.A8
A6, TENSOR6 = test_os_plus.A6, test_outliertune.TENSOR6


class OsPlusTest(parameterized.TestCase):
  @parameterized.parameters('layer', 'post', 'parallel')
  def test_shifting_gains_6_db_on_asymmetric_outliers(self, kind):
    block, params = planted.block(kind, planted.SHIFTED)
    block = block.without(('o_proj', 'fc2'), 0)  # They are no sites.
    x = planted.inputs()

    def error(shift):
      method = os_plus.os_plus(test_os_plus.config(shift=shift, bmm=()))
      return planted.error(block, params, method, x)

    self.assertGreater(10 * np.log10(error('never') / error('auto')), 6)

  @parameterized.parameters('layer', 'rms')
  def test_w6a6_order_os_plus_smoothquant_rtn(self, kind):
    plant = planted.Plant(scale=50.0)
    block, params = planted.block(kind, plant)
    x = planted.inputs()
    ours = os_plus.os_plus(test_os_plus.config(bmm=(), n_grid=100))
    smooth = smoothquant.smoothquant(smoothquant.SmoothQuantConfig(alpha=0.5))
    errors = [
      planted.error(block, params, method, x)
      for method in (
        ours,
        transform.chain(smooth, test_os_plus.rtn(W6_ASYM, A6)),
        test_os_plus.rtn(W6_ASYM, A6),
      )
    ]
    print(kind, 'OS+, SmoothQuant, RTN:', errors)
    self.assertLess(errors[0], 0.9 * errors[1])
    self.assertLess(errors[1], 0.8 * errors[2])

  def test_gptq_after_migration_beats_rounding(self):
    block, params = planted.block('layer', planted.SHIFTED)
    w4 = QuantSpec(dtype='int4')
    x = planted.inputs(batch=8)
    migrated = os_plus.os_plus(
      test_os_plus.config(weights=w4, inputs=A8_TENSOR, quantize=False)
    )
    rounding = gptq.gptq(gptq.GptqConfig(weights=w4))
    chained = transform.chain(migrated, rounding)
    made, quant = testing.run(block, params, chained, x)
    self.assertIsInstance(blocks.kernel_of(made, 'mlp/fc1'), qarray.QArray)
    self.assertIsNotNone(taps.get_path(quant, 'mlp/fc1/input'))
    self.assertLess(
      planted.error(block, params, chained, x),
      0.8
      * planted.error(
        block,
        params,
        os_plus.os_plus(test_os_plus.config(weights=w4, inputs=A8_TENSOR)),
        x,
      ),
    )

  def test_token_quantile_ignores_the_massive_token(self):
    plant = planted.Plant(first_token=1000.0)
    block, params = planted.block('layer', plant)
    x = planted.inputs(plant)
    ranges = []
    for fields in ({}, {'clip': 'token_quantile', 'token_quantile': 0.9}):
      _, quant = testing.run(
        block,
        params,
        # A bound beyond all values: nothing is scaled.
        os_plus.os_plus(
          test_os_plus.config(inputs=A8_TENSOR, lower_bound=100.0, **fields)
        ),
        x,
      )
      act = taps.get_path(quant, 'attention/q_proj/input')
      ranges.append(float(act.scale[0, 0]) * 127)
    self.assertGreater(ranges[0], 5)  # About sqrt(C) = 8.
    self.assertLess(ranges[1], 0.8 * ranges[0])

  def test_w8a8_is_near_float(self):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    ours = os_plus.os_plus(
      test_os_plus.config(weights=W8, inputs=A8_TENSOR, bmm=())
    )
    error = planted.error(block, params, ours, x)
    self.assertLess(error, 1e-3)
    nearest = test_os_plus.rtn(W8, A8_TENSOR)
    self.assertLess(error, 0.1 * planted.error(block, params, nearest, x))


class OutlierTuneTest(parameterized.TestCase):
  @parameterized.parameters('layer', 'post', 'parallel')
  def test_symmetrization_gains_on_shifted_channels(self, kind):
    block, params = planted.block(kind, planted.SHIFTED)
    x = planted.inputs()
    plain = planted.error(
      block, params, test_outliertune.method(symmetrize='never', bmm=()), x
    )
    ours = planted.error(block, params, test_outliertune.method(bmm=()), x)
    self.assertGreater(10 * np.log10(plain / ours), 6)

  @parameterized.parameters('layer', 'rms')
  def test_w6a6_order_outliertune_smoothquant_rtn(self, kind):
    plant = planted.Plant(
      scale=8.0, shift=0.0 if kind == 'rms' else planted.SHIFTED.shift
    )
    block, params = planted.block(kind, plant)
    x = planted.inputs()
    smooth = smoothquant.smoothquant(smoothquant.SmoothQuantConfig(alpha=0.5))
    errors = [
      planted.error(block, params, made, x)
      for made in (
        test_outliertune.method(bmm=()),
        transform.chain(smooth, test_outliertune.rtn(W6, TENSOR6)),
        test_outliertune.rtn(W6, TENSOR6),
      )
    ]
    self.assertLess(errors[0], 0.8 * errors[1])
    self.assertLess(errors[1], 0.8 * errors[2])

  def test_symmetrization_balances_the_rows(self):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    ratios = []
    for symmetrize in ('never', 'auto'):
      made, _ = testing.run(
        block, params, test_outliertune.fold(symmetrize=symmetrize), x
      )
      s = params['input_norm']['scale'] / made['input_norm']['scale']
      ratios.append(float(outliertune.imbalance(s)))
    self.assertGreater(ratios[0], 8)
    self.assertLess(ratios[1], 2)

  def test_w8a8_is_near_float(self):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    error = planted.error(
      block, params, test_outliertune.method(weights=W8, inputs=A8), x
    )
    self.assertLess(error, 1e-3)

  def test_searched_scales_gain_on_heavy_tails(self):
    block, params = planted.block('layer')
    block = block.without(('re:attention', 'fc2'), 0)
    x = jax.random.t(jax.random.key(1), 2.5, (2, 192, planted.C))
    a4 = QuantSpec(dtype='int4', granularity='token')
    errors = [
      planted.error(
        block,
        params,
        test_outliertune.method(weights=W8, inputs=a4, scale=scale),
        x,
      )
      for scale in ('mse', 'absmax')
    ]
    self.assertLess(errors[0], 0.7 * errors[1])

  def test_gptq_on_integer_inputs_beats_rounding(self):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs(batch=8)
    w4 = QuantSpec(dtype='int4')
    rounded, solved, chained = (
      planted.error(block, params, made, x)
      for made in (
        test_outliertune.method(weights=w4, inputs=A8),
        test_outliertune.method(weights=w4, inputs=A8, weight='gptq'),
        transform.chain(
          test_outliertune.method(weights=w4, inputs=A8, weight='none'),
          gptq.gptq(gptq.GptqConfig(weights=w4)),
        ),
      )
    )
    self.assertLess(solved, 0.8 * rounded)
    self.assertLess(chained, 0.8 * rounded)


class PTQ161Test(parameterized.TestCase):
  def test_below_two_bits_it_beats_two(self):
    """A fifth of the channels at 4 bits, and learned scales, on outliers."""
    block, params = planted.block('rms', planted.SCALED)
    block = block.without(('re:attention',), 0)  # Half the compilation.
    x = planted.inputs(planted.SCALED, batch=8)
    w2 = QuantSpec(dtype='int2', symmetric=False)
    ours = ptq161.PTQ161Config(
      weights=QuantSpec(dtype='binary'),
      epochs=5,
      batch_size=2,
      lr_alpha=5e-3,
      lr_r=1e-2,
    )
    solver = gptq.GptqConfig(weights=w2, search=ranges.RangeSearch(kind='mse'))
    nearest = round_to_nearest.RoundToNearestConfig(weights=w2)
    learned, solved, rounded = (
      planted.error(block, params, method, x)
      for method in (
        ptq161.ptq161(ours),
        gptq.gptq(solver),
        round_to_nearest.round_to_nearest(nearest),
      )
    )
    self.assertLess(learned, 0.9 * solved)
    self.assertLess(solved, rounded)


if __name__ == '__main__':
  absltest.main()

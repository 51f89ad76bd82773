"""Calibration of decoders that are no Llama: OPT, Gemma 3 and Mixtral.

Experts get their own tokens, or all of them, and are counted; one that no token
reached is rounded to nearest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxq.calibrate import driver
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  gptq,
  os_plus,
  outliertune,
  quant_experts,
  round_to_nearest,
  smoothquant,
)
from models import loading
from tests.calibrate import testing
from tests.models import test_architectures

W4 = spec_lib.QuantSpec(dtype='int4')
W8 = spec_lib.QuantSpec(dtype='int8')
TOKENS = np.random.default_rng(0).integers(0, 40, (4, 12), np.int32)
ROUTED = TOKENS.size * 2  # Each token goes to two experts.
RTN = round_to_nearest.round_to_nearest(
  round_to_nearest.RoundToNearestConfig(weights=W4)
)
GPTQ = gptq.gptq(gptq.GptqConfig(weights=W4))


def open_model(name, change=lambda params: params):
  """A random model; `change` is applied to the parameters of each block."""
  config = test_architectures.config_of(name)
  outside, parts = jax.device_get(test_architectures.random_parts(config))
  parts = [change(part) for part in parts]
  return loading.OpenModel(
    config, testing.ArraySource({}, outside, parts), 'random'
  )


def calibrate(model, transform, tokens=TOKENS, **fields):
  """The store and the reports of a run."""
  store, reports = testing.MemoryStore(), []
  config = driver.CalibrationConfig(batch_size=2, **fields)
  calibrator = driver.Calibrator(model, transform, config)
  calibrator.check(tokens)
  calibrator.run(tokens, store, reports.append)
  return store, reports


@pytest.mark.slow
class DecodersTest(parameterized.TestCase):
  @parameterized.product(
    name=('opt', 'gemma3_text', 'mixtral'), method=('rtn', 'gptq')
  )
  def test_every_linear_is_quantized(self, name, method):
    model = open_model(name)
    store, reports = calibrate(model, RTN if method == 'rtn' else GPTQ)
    self.assertLen(reports, 3)
    for i, report in enumerate(reports):
      self.assertGreater(report.output_sqnr_db, 10)
      params = store.load_block(i)['params']
      for lin in model.block_at(i).linears:
        kernel = blocks.kernel_of(params, lin.path)
        self.assertIsInstance(kernel, qarray.QArray)
      counted = name == 'mixtral' and method == 'gptq'
      self.assertEqual(sum(report.expert_tokens), ROUTED if counted else 0)


@pytest.mark.slow
class ExpertsTest(parameterized.TestCase):
  def test_an_expert_that_no_token_reached_is_rounded(self):
    model = open_model('mixtral', self.without_the_last_expert)
    store, reports = calibrate(model, GPTQ)
    self.assertEqual(reports[0].expert_tokens, (TOKENS.size, TOKENS.size, 0))
    before = model.block_params(0)['mlp']['expert_2']
    after = store.load_block(0)['params']['mlp']['expert_2']
    for name in ('gate_proj', 'up_proj', 'down_proj'):
      np.testing.assert_allclose(
        qarray.dequantize(jax.device_put(after[name]['kernel'])),
        qarray.fake_quant(jnp.asarray(before[name]['kernel']), W4),
        atol=1e-6,
      )

  def test_all_experts_option(self):
    model = open_model('mixtral')
    own, reports = calibrate(model, GPTQ)
    every, others = calibrate(model, GPTQ, experts='all')
    self.assertEqual(reports[0].expert_tokens, others[0].expert_tokens)
    codes = lambda store: (
      store.load_block(0)['params']['mlp']['expert_0']['gate_proj'][
        'kernel'
      ].qvalue
    )
    self.assertTrue(np.any(codes(own) != codes(every)))
    with self.assertRaisesRegex(ValueError, "experts='some'; allowed"):
      driver.CalibrationConfig(experts='some')

  def test_the_norm_of_experts_is_smoothed_by_all_tokens(self):
    transform = smoothquant.smoothquant(smoothquant.SmoothQuantConfig())
    model = open_model('mixtral')
    self.assertEqual(
      sorted(transform.observe(model.block_at(0))),
      ['attention/q_proj/in', 'mlp/in'],
    )
    _, reports = calibrate(model, transform)
    for report in reports:
      self.assertGreater(report.output_sqnr_db, 80)  # The same function.

  @parameterized.parameters('tensor', 'token')
  def test_os_plus_sees_all_tokens_at_the_norm(self, granularity):
    config = os_plus.OsPlusConfig(
      weights=W8,
      inputs=spec_lib.QuantSpec(dtype='int8', granularity=granularity),
      n_grid=4,
      n_max=4,
    )
    transform = os_plus.os_plus(config)
    # Of three experts no token goes to the last.
    model = open_model('mixtral', self.without_the_last_expert)
    seen = set(transform.observe(model.block_at(0)))
    self.assertContainsSubset({'attention/q_proj/in', 'mlp/in'}, seen)
    self.assertNotIn('mlp/expert_0/gate_proj/in', seen)
    _, reports = calibrate(model, transform)
    for report in reports:
      self.assertGreater(report.output_sqnr_db, 20)

  @parameterized.parameters('rtn', 'gptq')
  def test_outliertune_sees_all_tokens_at_the_norm(self, weight):
    config = outliertune.OutlierTuneConfig(
      weights=W8,
      inputs=spec_lib.QuantSpec(dtype='int8', granularity='token'),
      weight=weight,
    )
    model = open_model('mixtral', self.without_the_last_expert)
    transform = outliertune.outliertune(config)
    self.assertEqual(
      sorted(transform.rest[0].observe(model.block_at(0))),
      ['attention/q_proj/in', 'mlp/in'],
    )
    store, reports = calibrate(model, transform)
    for i, report in enumerate(reports):
      self.assertGreater(report.output_sqnr_db, 20)
      expert = store.load_block(i)['quant']['mlp']['expert_1']
      self.assertIsInstance(expert['up_proj']['input'], linear.StepInput)

  def test_quant_experts_in_an_expert_of_few_tokens(self):
    config = quant_experts.QuantExpertsConfig(
      weights=W4,
      base='rtn',
      shared_rank=2,
      num_experts=1,
      expert_rank=1,
      skip_tokens=0,
      share=0.2,
      gram='diagonal',
    )
    sparse = quant_experts.quant_experts(config)
    model = open_model('mixtral', self.without_the_last_expert)
    tokens = np.concatenate([TOKENS, TOKENS[:, ::-1]])  # 96, above 64.
    store, reports = calibrate(model, sparse, tokens)
    _, rounded = calibrate(model, RTN, tokens)
    for ours, alone in zip(reports, rounded, strict=True):
      self.assertGreater(ours.output_sqnr_db, alone.output_sqnr_db)
    terms = store.load_block(0)['quant']['mlp']
    routed = [
      bool(np.any(terms[f'expert_{e}']['up_proj']['low_rank'].b[2:] != 0))
      for e in range(3)
    ]
    self.assertEqual(routed, [True, True, False])

  def without_the_last_expert(self, params):
    """Equal logits: the first two of three experts are chosen."""
    router = np.zeros((16, 3), np.float32)
    return taps.set_path(params, 'mlp/router/kernel', router)


if __name__ == '__main__':
  absltest.main()

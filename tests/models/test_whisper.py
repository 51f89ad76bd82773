"""Tests of models.whisper: caches, runs, sites, calibration, messages."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from jaxq.calibrate import driver, run
from jaxq.nn import blocks
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  awq,
  equivalence,
  gptq,
  rotate,
  round_to_nearest,
  smoothquant,
)
from jaxq.quant import transform as transform_lib
from models import decoder, whisper, whisper_blocks
from tests.calibrate import testing
from tests.io import whisper_files

W4 = spec_lib.QuantSpec(dtype='int4', granularity='channel')
A8 = spec_lib.QuantSpec(dtype='int8', granularity='token')
SIZES = whisper_files.CONFIG


def batch(B=4, T=9, seed=0):
  """Random features and tokens; rows end in padding."""
  rng = np.random.default_rng(seed)
  frames = 2 * SIZES['max_source_positions']
  shape = (B, frames, SIZES['num_mel_bins'])
  lengths = rng.integers(T // 2, T + 1, B)
  return {
    'features': rng.normal(0, 1, shape).astype(np.float32),
    'tokens': rng.integers(0, SIZES['vocab_size'], (B, T)).astype(np.int32),
    'mask': np.arange(T)[None] < lengths[:, None],
  }


class WhisperTestCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.source = str(whisper_files.write_hf(cls.folder / 'hf'))
    cls.opened = models.open_model(cls.source)
    cls.model = models.load(cls.source)

  def apply(self, *arguments, method=None, model=None):
    model = self.model if model is None else model
    return model.module.apply(model.variables, *arguments, method=method)


class WhisperTest(WhisperTestCase):
  def test_shapes(self):
    data = batch()
    logits, _ = self.apply(data['features'], data['tokens'])
    self.assertEqual(logits.shape, (4, 9, SIZES['vocab_size']))
    self.assertEqual(logits.dtype, jnp.float32)
    self.assertEqual(self.opened.num_blocks, 5)
    self.assertEqual(whisper.runs_of(self.model.config, ()), ((2,), (3,)))

  def test_bfloat16(self):
    data = batch()
    model = models.load(self.source, dtype='bfloat16')
    got, _ = self.apply(data['features'], data['tokens'], model=model)
    want, _ = self.apply(data['features'], data['tokens'])
    self.assertEqual(got.dtype, jnp.float32)
    # bfloat16 has 8 bits: a few percent after five blocks.
    self.assertLess(
      float(jnp.abs(got - want).mean() / jnp.abs(want).mean()), 0.1
    )

  @parameterized.parameters(((1, 1, 3),), ((2, 1, 2),))
  def test_runs_change_nothing(self, runs):
    data = batch()
    want, _ = self.apply(data['features'], data['tokens'])
    params = dict(self.model.variables['params'])
    stacks = [params.pop(f'blocks_{half}') for half in (0, 1)]
    layers = [
      jax.tree.map(lambda a, i=i: a[i], stack)
      for stack, count in zip(stacks, (2, 3), strict=True)
      for i in range(count)
    ]
    start = 0
    for i, length in enumerate(runs):
      part = layers[start : start + length]
      params[f'blocks_{i}'] = jax.tree.map(lambda *a: jnp.stack(a), *part)
      start += length
    module = whisper.Whisper(self.model.config, runs)
    got, _ = module.apply({'params': params}, data['features'], data['tokens'])
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_cached_steps_equal_the_whole_sequence(self):
    data = batch(B=2)
    want, _ = self.apply(data['features'], data['tokens'])
    encoded = self.apply(data['features'], method='encode')
    cross = self.apply(encoded, method='cross_caches')
    caches = whisper.init_caches(self.model.config, (), 2, 16)
    for t, width in ((0, 4), (4, 1), (5, 1), (6, 3)):
      tokens = data['tokens'][:, t : t + width]
      positions = jnp.broadcast_to(jnp.arange(t, t + width)[None], tokens.shape)
      x, caches = self.apply(tokens, positions, caches, cross, method='hidden')
      got = self.apply(x, method='logits')
      # Two orders of summation of float32 values of about 1.
      np.testing.assert_allclose(got, want[:, t : t + width], atol=1e-4)

  def test_padding_is_not_seen(self):
    data = batch()
    spec = self.opened.block_at(3)
    params = self.opened.block_params(3)
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (4, 9, 32)).astype(np.float32)
    encoded = rng.normal(0, 1, (4, 12, 32)).astype(np.float32)
    carry = {'x': x, 'encoded': encoded, 'mask': data['mask']}
    out = spec.apply({'params': params}, carry)['x']
    noise = np.where(data['mask'][..., None], 0, 100).astype(np.float32)
    other = spec.apply({'params': params}, {**carry, 'x': x + noise})['x']
    keep = data['mask']
    np.testing.assert_array_equal(out[keep], other[keep])
    tapped = spec.tapped({'params': params}, {**carry, 'x': x + noise})
    for name in ('attention', 'cross', 'mlp'):
      for linear, taps in tapped[name].items():
        seen = np.asarray(taps['in'])
        if seen.shape[1] == 9:  # Not the encoded audio.
          self.assertEqual(np.abs(seen[~keep]).max(), 0, linear)

  def test_sites_keep_the_function(self):
    rng = np.random.default_rng(2)
    for i in (0, 3):
      spec, params = self.opened.block_at(i), self.opened.block_params(i)
      params = jax.tree.map(jnp.asarray, params)
      carry = {
        'x': jnp.asarray(rng.normal(0, 1, (2, 7, 32)), jnp.float32),
        'encoded': jnp.asarray(rng.normal(0, 1, (2, 12, 32)), jnp.float32),
        'mask': jnp.ones((2, 7), bool),
      }
      want = spec.apply({'params': params}, carry)['x']
      self.assertLen(spec.sites, 3 if i == 0 else 5)
      for site in spec.sites:
        size = 32
        s = jnp.asarray(rng.uniform(0.5, 2, size), jnp.float32)
        moved = equivalence.divide_producer(params, site, s)
        got = spec.apply({'params': moved}, carry)['x']
        np.testing.assert_allclose(got, want, atol=1e-4)

  def test_linears_are_the_kernels(self):
    for i in (0, 3):
      spec, params = self.opened.block_at(i), self.opened.block_params(i)
      paths = [linear.path for linear in spec.linears]
      self.assertLen(paths, 6 if i == 0 else 10)
      for path in paths:
        self.assertEqual(blocks.kernel_of(params, path).ndim, 2)
    self.assertEqual(self.opened.block_at(0), self.opened.block_at(1))
    self.assertNotEqual(self.opened.block_at(1), self.opened.block_at(2))


# Every weight method, as experiments.recipe makes it.
METHODS = {
  'rtn': lambda: round_to_nearest.round_to_nearest(
    round_to_nearest.RoundToNearestConfig(weights=W4)
  ),
  'gptq': lambda: gptq.gptq(gptq.GptqConfig(weights=W4)),
  'awq': lambda: awq.awq(
    awq.AwqConfig(weights=W4, grid=4, clip_grid=4, sample_sequences=2)
  ),
  'smoothquant': lambda: transform_lib.chain(
    smoothquant.smoothquant(smoothquant.SmoothQuantConfig(sites='all')),
    round_to_nearest.round_to_nearest(
      round_to_nearest.RoundToNearestConfig(weights=W4)
    ),
    activations.activations(activations.ActivationsConfig(inputs=A8)),
  ),
}


class CalibrationTest(WhisperTestCase):
  @classmethod
  @functools.cache
  def calibrated(cls, name):
    """What a method made of the model: store, reports, compilations."""
    store, reports = testing.MemoryStore(), []
    calibrator = driver.Calibrator(
      cls.opened, METHODS[name](), driver.CalibrationConfig(batch_size=4)
    )
    calibrator.run(batch(B=8), store, reports.append)
    return store, reports, calibrator.compilations

  def error(self, name):
    """Squared error of the logits on the calibration data, relative."""
    data = batch(B=8)
    store, _, _ = self.calibrated(name)
    variables, runs = decoder.stack(
      store.outside, [store.blocks[i] for i in range(5)]
    )
    self.assertEqual(runs, (2, 3))
    module = whisper.Whisper(self.model.config, runs)
    got, _ = module.apply(variables, data['features'], data['tokens'])
    want, _ = self.apply(data['features'], data['tokens'])
    got, want = np.asarray(got)[data['mask']], np.asarray(want)[data['mask']]
    return float(np.mean((got - want) ** 2) / np.mean(want**2))

  @parameterized.parameters(sorted(METHODS))
  def test_every_method_runs_on_both_halves(self, name):
    store, reports, compilations = self.calibrated(name)
    self.assertLen(reports, 5)
    self.assertEqual(sorted(store.blocks), list(range(5)))
    for i, block in store.blocks.items():
      for linear in self.opened.block_at(i).linears:
        kernel = blocks.kernel_of(block['params'], linear.path)
        self.assertIsInstance(kernel, qarray.QArray)
      self.assertGreater(reports[i].output_sqnr_db, 5)
    # One compilation for each half, whatever the number of blocks.
    for function, count in compilations.items():
      self.assertLessEqual(count, 2, function)
    self.assertBetween(self.error(name), 1e-6, 0.2)

  def test_gptq_beats_rounding_on_its_own_data(self):
    self.assertLess(self.error('gptq'), 0.8 * self.error('rtn'))

  def test_directory_is_read_back(self):
    output = self.folder / 'quantized'
    run.calibrate(
      self.opened,
      METHODS['rtn'](),
      batch(),
      output,
      config=driver.CalibrationConfig(batch_size=4, ignore=('re:cross',)),
    )
    model = models.load(str(output))
    self.assertEqual(model.config, self.model.config)
    self.assertEqual(model.family, 'whisper')
    data = batch()
    got, _ = self.apply(data['features'], data['tokens'], model=model)
    want, _ = self.apply(data['features'], data['tokens'])
    self.assertLess(float(jnp.mean((got - want) ** 2) / jnp.mean(want**2)), 0.2)

  def test_rotation_is_refused(self):
    calibrator = driver.Calibrator(
      self.opened,
      rotate.rotate(rotate.RotateConfig()),
      driver.CalibrationConfig(batch_size=4),
    )
    with self.assertRaisesRegex(NotImplementedError, 'rotate: .*bias'):
      calibrator.check(batch())


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'encoder_layers': 0}, 'encoder_layers=0; it must be at least 1'),
    ({'decoder_heads': 3}, 'hidden_size=32, decoder_heads=3; heads must'),
    ({'suppress_tokens': (9999,)}, r'token ids .*\.\.9999 .*allowed are 0\.\.'),
  )
  def test_refused(self, changes, message):
    config = whisper_blocks.WhisperConfig.from_hf(SIZES)
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(config, **changes)

  def test_sharding_rules(self):
    config = whisper_blocks.WhisperConfig.from_hf(SIZES)
    self.assertNotEmpty(whisper.sharding_rules(config, 2))
    with self.assertRaisesRegex(ValueError, 'encoder_intermediate_size=64 is'):
      whisper.sharding_rules(config, 3)


if __name__ == '__main__':
  absltest.main()

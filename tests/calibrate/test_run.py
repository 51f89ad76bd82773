"""Tests of jaxq.calibrate.run."""

import dataclasses
import hashlib
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

import models
from jaxq.calibrate import driver, run
from jaxq.io import checkpoint, compressed_tensors, ct_export
from jaxq.nn import taps
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  llm_fp4,
  mergequant,
  os_plus,
  outliertune,
  ptq161,
  quant_experts,
  rotate,
  round_to_nearest,
  transform,
)
from tests.calibrate import testing
from tests.io import test_trees
from tests.models import test_decoder

CONFIG = driver.CalibrationConfig(batch_size=4)


def rtn(bits=4):
  weights = spec_lib.QuantSpec(dtype=f'int{bits}')
  return round_to_nearest.round_to_nearest(
    round_to_nearest.RoundToNearestConfig(weights=weights)
  )


def os_plus_w6a6():
  # Shifted, so that biases that were not there are saved and loaded.
  config = os_plus.OsPlusConfig(
    weights=spec_lib.QuantSpec(dtype='int6'),
    inputs=spec_lib.QuantSpec(dtype='int6', granularity='tensor'),
    shift='always',
    allow_new_bias=True,
    n_grid=4,
    n_max=4,
  )
  return os_plus.os_plus(config)


def outliertune_w6a6():
  config = outliertune.OutlierTuneConfig(
    weights=spec_lib.QuantSpec(dtype='int6'),
    inputs=spec_lib.QuantSpec(dtype='int6', granularity='token'),
    symmetrize='always',
    allow_new_bias=True,
  )
  return outliertune.outliertune(config)


def mergequant_w4a4():
  # Copies of channels, and kept terms: kernels and leaves of other shapes.
  config = mergequant.MergeQuantConfig(
    weights=spec_lib.QuantSpec(dtype='int4'),
    inputs=spec_lib.QuantSpec(dtype='int4', granularity='token'),
    multiple=8,
    rank=2,
    compensate='keep',
    epochs=1,
    sample_sequences=2,
  )
  return mergequant.mergequant(config)


def llm_fp4_w4a4():
  config = llm_fp4.LlmFp4Config(
    weights=spec_lib.QuantSpec(dtype='int4'),
    inputs=spec_lib.QuantSpec(dtype='int4', granularity='token'),
    rounds=1,
    n_grid=3,
    embed_bits=4,
  )
  return llm_fp4.llm_fp4(config)


def ptq161_w1():
  config = ptq161.PTQ161Config(
    weights=spec_lib.QuantSpec(dtype='binary', granularity='channel'),
    epochs=1,
    samples=4,
    batch_size=4,
  )
  return ptq161.ptq161(config)


def quant_experts_w4a8():
  # Terms in int8: arrays within arrays.
  config = quant_experts.QuantExpertsConfig(
    weights=spec_lib.QuantSpec(dtype='int4', symmetric=False),
    inputs=spec_lib.QuantSpec(dtype='int8', granularity='token'),
    base='rtn',
    shared_rank=2,
    expert_rank=1,
    num_experts=2,
    router='importance',
    dtype='int8',
    share=0.1,
    skip_tokens=0,
    sample_sequences=8,
  )
  return quant_experts.quant_experts(config)


def os_plus_w8a8():
  config = os_plus.OsPlusConfig(
    weights=spec_lib.QuantSpec(dtype='int8'),
    inputs=spec_lib.QuantSpec(dtype='int8', granularity='tensor'),
    n_grid=2,
    n_max=2,
    bmm=(),
  )
  return os_plus.os_plus(config)


def outliertune_w8a8():
  config = outliertune.OutlierTuneConfig(
    weights=spec_lib.QuantSpec(dtype='int8', symmetric=False),
    inputs=spec_lib.QuantSpec(dtype='int8', granularity='token'),
    bmm=(),
  )
  return outliertune.outliertune(config)


# Each method, in a form that shows all of it, and why compressed-tensors cannot
# hold that.
METHODS = {
  os_plus_w6a6: "has 'bias' .*architecture nor the format",
  outliertune_w6a6: 'its dynamic int6 inputs are clipped by 1',
  mergequant_w4a4: 'low-rank term of its float input',
  llm_fp4_w4a4: 'its weights are fpx4; compressed-tensors has',
  ptq161_w1: 'it holds signs and some rows in more bits',
  quant_experts_w4a8: 'low-rank term of its float input',
}


def model():
  opened = testing.small_model()
  c = test_decoder.CONFIG
  opened.source.config = {
    'model_type': 'llama',
    'vocab_size': c.vocab_size,
    'hidden_size': c.hidden_size,
    'intermediate_size': c.intermediate_size,
    'num_hidden_layers': c.num_layers,
    'num_attention_heads': c.num_heads,
    'num_key_value_heads': c.num_kv_heads,
    'head_dim': c.head_dim,
    'rms_norm_eps': c.norm_eps,
    'tie_word_embeddings': True,
  }
  words = {f'w{i}': i for i in range(c.vocab_size)}
  opened.source.tokenizer = lambda: Tokenizer(
    tokenizer_models.WordLevel(words, unk_token='w0')
  )
  return opened


def digest(directory):
  total = hashlib.sha256()
  for path in sorted(pathlib.Path(directory).rglob('*')):
    if path.is_file():
      total.update(str(path.relative_to(directory)).encode())
      total.update(path.read_bytes())
  return total.hexdigest()


class RunTest(parameterized.TestCase):
  def new_path(self):
    parent = tempfile.TemporaryDirectory()
    self.addCleanup(parent.cleanup)
    return parent.name + '/model'

  def calibrate(self, output, method=None, config=CONFIG, **how):
    method = rtn() if method is None else method
    return run.calibrate(
      model(), method, testing.tokens(), output, config=config, **how
    )

  def test_what_it_writes_loads_and_runs(self):
    output = self.new_path()
    reports = []
    self.assertTrue(self.calibrate(output, on_block=reports.append))
    self.assertLen(reports, 3)
    loaded = models.load(output)
    self.assertEqual(
      loaded.quantization,
      {'methods': [{'method': 'round_to_nearest'}], 'ignore': []},
    )
    logits, _ = loaded.module.apply(
      loaded.variables, jnp.asarray(testing.tokens()[:1])
    )
    self.assertTrue(bool(jnp.all(jnp.isfinite(logits))))
    self.assertFalse(self.calibrate(output))

  def test_a_rotated_tied_model_loads_with_its_own_head(self):
    output = self.new_path()
    turn = rotate.rotate(rotate.RotateConfig())
    self.calibrate(output, transform.chain(turn, rtn(8)))
    loaded = models.load(output)
    self.assertFalse(loaded.config.tie_embeddings)
    tokens = jnp.asarray(testing.tokens()[:1])
    logits, _ = loaded.module.apply(loaded.variables, tokens)
    exact = model()
    blocks = [{'params': exact.block_params(i)} for i in range(3)]
    variables, _ = test_decoder.decoder.stack(exact.outside(), blocks)
    expected, _ = test_decoder.decoder.Decoder(exact.config).apply(
      variables, tokens
    )
    # int8 kernels: about 1 % of the logits' range.
    np.testing.assert_allclose(logits, expected, atol=0.02)

  @parameterized.parameters('config', 'settings', 'data')
  def test_another_run_is_refused(self, what):
    output = self.new_path()
    self.calibrate(output)
    if what == 'config':
      config = dataclasses.replace(CONFIG, inputs='float')
      with self.assertRaisesRegex(ValueError, 'differs.*flags'):
        self.calibrate(output, config=config)
    elif what == 'settings':
      with self.assertRaisesRegex(ValueError, 'differs.*flags'):
        self.calibrate(output, settings={'methods': ['other']})
    else:
      with self.assertRaisesRegex(ValueError, 'differs.*data'):
        run.calibrate(model(), rtn(), testing.tokens(4), output, config=CONFIG)

  def test_quantized_models_are_no_source(self):
    output = self.new_path()
    self.calibrate(output)
    self.assertTrue(checkpoint.is_checkpoint(output))
    opened = models.open_model(output)
    with self.assertRaisesRegex(ValueError, 'quantized already'):
      run.calibrate(
        opened, rtn(), testing.tokens(), self.new_path(), config=CONFIG
      )


@pytest.mark.slow  # One JAX is enough: other tests run each method on both.
class MethodsTest(parameterized.TestCase):
  """Each method, calibrated once: stopped, stored, loaded and exported."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    parent = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.root = pathlib.Path(parent)
    cls.made = {}

  def calibrate(self, output, make, **how):
    return run.calibrate(
      model(), make(), testing.tokens(), output, config=CONFIG, **how
    )

  def finished(self, make):
    """A finished directory, and the blocks as they were handed to the disk."""
    if make not in self.made:
      output, kept = self.root / make.__name__, {}
      save = checkpoint.Writer.save_block

      def record(writer, i, tree):
        kept[i] = jax.tree.map(np.array, tree)
        save(writer, i, tree)

      with mock.patch.object(checkpoint.Writer, 'save_block', record):
        self.calibrate(output, make)
      self.made[make] = output, kept
    return self.made[make]

  def logits(self, directory):
    loaded = models.load(str(directory))
    tokens = jnp.asarray(testing.tokens()[:1])
    return loaded.module.apply(loaded.variables, tokens)[0]

  @parameterized.parameters(rtn, *METHODS)
  def test_stopped_runs_end_with_the_same_bytes(self, make):
    whole, _ = self.finished(make)
    part = self.root / f'{make.__name__}_in_parts'

    def stop(report):
      raise KeyboardInterrupt

    for done in range(3):
      with self.assertRaises(KeyboardInterrupt):
        self.calibrate(
          part,
          make,
          on_start=lambda n, done=done: self.assertEqual(n, done),
          on_block=stop,
        )
    self.assertTrue(self.calibrate(part, make))
    self.assertEqual(digest(whole), digest(part))

  @parameterized.parameters(*METHODS)
  def test_what_is_stored_is_what_was_made(self, make):
    directory, kept = self.finished(make)
    opened = models.open_model(str(directory))
    self.assertEqual(sorted(kept), list(range(opened.num_blocks)))
    for i, tree in kept.items():
      test_trees.assert_same(self, opened.block_variables(i), tree)
    self.assertTrue(bool(jnp.all(jnp.isfinite(self.logits(directory)))))

  @parameterized.parameters(*METHODS)
  def test_what_compressed_tensors_cannot_hold_is_refused(self, make):
    source = models.open_model(str(self.finished(make)[0])).source
    out = self.root / 'refused'
    with self.assertRaisesRegex(
      ValueError, f'model.layers.0.* cannot be written .*{METHODS[make]}'
    ) as caught:
      ct_export.export(source, out)
    self.assertNotIn('\n', str(caught.exception))
    self.assertFalse(out.exists())

  @parameterized.parameters(os_plus_w8a8, outliertune_w8a8)
  def test_what_it_can_hold_is_exported(self, make):
    """Without shifts and outputs: static scales, those of steps are one."""
    directory, _ = self.finished(make)
    source = models.open_model(str(directory)).source
    out = ct_export.export(source, self.root / f'{make.__name__}_exported')
    exported = models.open_model(str(out)).source
    for i in range(3):
      block, found = source.block(i), exported.block(i)
      jax.tree.map(
        np.testing.assert_array_equal, found['params'], block['params']
      )
      for path, act in taps.leaves(block['quant']):
        act = compressed_tensors.stored_input(act)
        scale = taps.get_path(found['quant'], path).scale
        np.testing.assert_array_equal(scale, act.scale)
    exact = self.logits(directory)
    error = jnp.linalg.norm(self.logits(out) - exact) / jnp.linalg.norm(exact)
    # The format's step of a token is 0.4 % smaller.
    self.assertLess(float(error), 0.05)


if __name__ == '__main__':
  absltest.main()

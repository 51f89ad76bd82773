"""Tests of jaxq.calibrate.run."""

import dataclasses
import hashlib
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

import models
from jaxq.calibrate import driver, run
from jaxq.io import checkpoint
from jaxq.numerics import spec as spec_lib
from jaxq.quant import rotate, round_to_nearest, transform
from tests.calibrate import testing
from tests.models import test_decoder

CONFIG = driver.CalibrationConfig(batch_size=4)


def rtn(bits=4):
  weights = spec_lib.QuantSpec(dtype=f'int{bits}')
  return round_to_nearest.round_to_nearest(
    round_to_nearest.RoundToNearestConfig(weights=weights)
  )


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

  def test_stopped_runs_end_with_the_same_bytes(self):
    whole = self.new_path()
    self.calibrate(whole)
    part = self.new_path()

    def stop(report):
      raise KeyboardInterrupt

    for done in range(3):
      with self.assertRaises(KeyboardInterrupt):
        self.calibrate(
          part,
          on_start=lambda n, done=done: self.assertEqual(n, done),
          on_block=stop,
        )
    self.assertTrue(self.calibrate(part))
    self.assertEqual(digest(whole), digest(part))

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


if __name__ == '__main__':
  absltest.main()

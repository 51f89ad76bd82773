"""Tests of experiments.harness and experiments.lm_eval_adapter."""

import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from experiments import harness
from tests.decode import testing
from tests.experiments import lm_eval_tasks

TEXT = 'Five hexing wizard bots jump quickly, and caf\u00e9s close. ' * 20

# lm-eval and what it imports do not live by the strict rules.
pytestmark = pytest.mark.loose_promotion


class MissingTest(absltest.TestCase):
  def test_message(self):
    with mock.patch.dict(sys.modules, {'lm_eval': None}):
      with self.assertRaisesRegex(ValueError, r"pip install 'jaxq\[eval\]'"):
        harness.command_line()


class AdapterTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    lm_eval_tasks.require()
    from experiments import lm_eval_adapter

    cls.adapter = lm_eval_adapter
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(folder)
    cls.saved = testing.save(testing.model(), cls.folder / 'model')
    lm_eval_tasks.write(cls.folder, TEXT, num=6, words=8)

  def make(self, **fields):
    return self.adapter.JaxqLM(path=self.saved, **fields)

  def test_all_three_tasks(self):
    out = lm_eval_tasks.evaluate(self.make(batch_size=4), self.folder)
    self.assertCountEqual(out['results'], lm_eval_tasks.TASKS)
    self.assertLen(out['samples']['jaxq_choice'], 6)
    self.assertGreater(
      out['results']['jaxq_rolling']['bits_per_byte,none'], 4.0
    )

  def test_arguments_of_the_model_win_over_flags(self):
    made = self.adapter.JaxqLM.create_from_arg_string(
      f'path={self.saved},batch_size=3,max_length=64,mesh=data:1+model:1',
      {'batch_size': '1', 'device': None},
    )
    self.assertEqual(made._config.batch_size, 3)
    self.assertEqual(made.max_length, 64)

  def test_a_long_text_is_scored_once(self):
    whole, cut = self.make(max_length=256), self.make(max_length=32)

    def rolling(made):
      request = mock.Mock(args=(TEXT[:100],))
      return made.loglikelihood_rolling([request], disable_tqdm=True)[0]

    self.assertLess(rolling(whole), 0.0)
    # Each token is counted once, some with less context.
    self.assertAlmostEqual(rolling(cut) / rolling(whole), 1.0, delta=0.3)

  @parameterized.parameters(
    ({}, 0.0, 0),
    ({'temperature': 0.7}, 0.7, 0),
    ({'do_sample': False, 'temperature': 0.7}, 0.0, 0),
    ({'do_sample': True, 'top_k': 5}, 1.0, 5),
  )
  def test_sampling(self, settings, temperature, top_k):
    made = self.adapter.sampling(settings)
    self.assertEqual(made.temperature, temperature)
    self.assertEqual(made.top_k, top_k)

  def test_messages(self):
    made = self.make()
    with self.assertRaisesRegex(ValueError, r"\['num_beams'\]; jaxq takes"):
      made._generate([[1]], {'num_beams': 2}, None)
    with self.assertRaisesRegex(ValueError, 'batch_size=auto; a whole number'):
      self.make(batch_size='auto')
    with self.assertRaisesRegex(ValueError, 'max_length=999; .*at most 256'):
      self.make(max_length=999)

  @pytest.mark.slow
  def test_command(self):
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'experiments.harness'),
        *('--model', 'jaxq', '--tasks', 'jaxq_choice'),
        *('--include_path', str(self.folder)),
        *('--model_args', f'path={self.saved},batch_size=4'),
      ],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'},
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    self.assertRegex(done.stdout, r'jaxq_choice\s*\|.*acc')


if __name__ == '__main__':
  absltest.main()

"""Tests of benchmarks.reduction_rows, and of training what its rows need."""

import dataclasses
import pathlib
import subprocess
import tempfile
from typing import Any
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import reduction_checks, reduction_rows
from experiments import training
from experiments.reducer_training import registry
from jaxq.tokens import interface
from tests.experiments import mosaic_models

TRAINED = training.Trained(
  data=mosaic_models.DATA, model=mosaic_models.MODEL, params={}
)
FLAGS = pathlib.Path(__file__).parents[2] / 'experiments' / 'flags'


class RowsTest(parameterized.TestCase):
  def test_every_row_without_training_has_a_method_at_its_budgets(self):
    missing = []
    for name in reduction_rows.METHODS:
      if name in reduction_rows.TRAINED:
        continue
      for ratio in reduction_rows.budgets(name):
        method = reduction_rows.method(name, ratio, TRAINED, None)
        if method is None:
          missing.append((name, ratio))
        else:
          self.assertEqual(method.config.budget, ratio)
    self.assertEqual({name for name, _ in missing}, {'dycoke', 'average_pool'})

  def test_prumerge_is_adaptive_where_it_chooses_its_number(self):
    adaptive = {}
    for name in ('prumerge', 'prumerge_plus', *reduction_checks.OWN_NUMBER):
      method = reduction_rows.method(name, 0.5, TRAINED, None)
      assert method is not None
      config: Any = method.config
      self.assertEqual(config.plus, name.startswith('prumerge_plus'))
      adaptive[name] = config.adaptive
    self.assertEqual(list(adaptive.values()), [False, False, True, True])

  @parameterized.parameters(*reduction_rows.TRAINED)
  def test_a_trained_row_has_a_flagfile_and_fields_that_fit(self, name):
    row = reduction_rows.TRAINED[name]
    lines = (FLAGS / f'mosaicqa_{row.folder}.flags').read_text('utf-8')
    (text,) = (
      line.partition('=')[2]
      for line in lines.splitlines()
      if line.startswith('--token_reducer')
    )
    _, config = registry.parse(text)
    for ratio in reduction_rows.budgets(name):
      changed = dataclasses.replace(config, budget=ratio, **row.fields)
      self.assertIsInstance(changed, interface.Config)
    self.assertIsNone(reduction_rows.method(name, 0.5, TRAINED, None))

  def test_rows_of_other_videos_or_trainings_are_made_again(self):
    made = {'videos': 288, 'model': 'a', 'data': 'b'}
    metric = {'name': 'accuracy', 'value': 0.5, 'conventions': made}
    row = {'metrics': [metric], 'trained': {'reducer': 'tome'}}
    how = row['trained']
    for expected, *args in (
      (False, how, {'videos': 288, 'model': 'a'}),
      (False, how, None),
      (True, how, {'videos': 384, 'model': 'a'}),
      (True, None, {'videos': 288}),
    ):
      self.assertEqual(reduction_rows.differs(row, *args), expected, args)

  def test_auc_by_hand(self):
    scores = np.array([[0.1, 0.4], [0.4, 0.9]])
    positive = np.array([[False, True], [False, True]])
    # Of four pairs three are in order, and one is a tie.
    self.assertEqual(reduction_rows.auc(scores, positive), 3.5 / 4)
    self.assertEqual(reduction_rows.auc(scores, ~positive), 0.5 / 4)


class TrainMissingTest(absltest.TestCase):
  def test_each_folder_is_trained_once_and_those_there_are_not(self):
    with tempfile.TemporaryDirectory() as root:
      with (
        mock.patch.object(subprocess, 'run') as run,
        mock.patch.object(
          reduction_rows,
          'found',
          lambda _, name: root if name == 'embedlens' else None,
        ),
      ):
        reduction_rows.train_missing(
          'MODEL',
          root,
          ['uniform', 'embedlens', 'qtsplus', reduction_checks.SHARE],
        )
      (call,) = run.call_args_list
      self.assertContainsSubset(
        {
          '--model=MODEL',
          f'--output={root}/qtsplus',
          '--flagfile=experiments/flags/mosaicqa_qtsplus.flags',
        },
        call.args[0],
      )

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, '--train_missing without --reduc'):
      reduction_rows.train_missing('MODEL', None, ['qtsplus'])


if __name__ == '__main__':
  absltest.main()

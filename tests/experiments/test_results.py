"""Results are written whole, read back checked, and laid out as tables."""

import dataclasses
import json
import math
import os
import pathlib
import tempfile
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from experiments import results


def perplexity(value, low=None, high=None, **conventions):
  return results.Metric(
    name='perplexity',
    value=value,
    low=low,
    high=high,
    unit='per token',
    conventions=conventions,
  )


def example():
  run = results.RunInfo(
    jax='0.10.2',
    python='3.11.7',
    device='cpu x 1',
    commit='abc',
    command='python -m experiments.evaluate',
    flags={'bits': 4, 'ignore': ['head'], 'clip': 0.9, 'mesh': None},
  )
  rows = (
    results.Row(
      name='float', metrics=(perplexity(24.8, 23.5, 26.25, window=2048),)
    ),
    results.Row(
      name='W4A16',
      metrics=(
        perplexity(31.4, window=2048),
        results.Metric(name='size', value=12345678, unit='bytes'),
      ),
    ),
  )
  return results.Result(run=run, rows=rows)


class FileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / 'new' / 'result.json'

  def edit(self, change):
    results.save(self.path, example())
    data = json.loads(self.path.read_text())
    change(data)
    self.path.write_text(json.dumps(data))

  def test_what_was_saved_is_loaded(self):
    results.save(self.path, example())
    self.assertEqual(results.load(self.path), example())
    self.assertEqual(os.listdir(self.path.parent), ['result.json'])

  @parameterized.parameters(math.nan, math.inf, -math.inf)
  def test_a_diverged_number_survives_in_strict_json(self, value):
    row = results.Row(name='a', metrics=(perplexity(value),))
    result = dataclasses.replace(example(), rows=(row,))
    results.save(self.path, result)

    def refuse(name):
      self.fail(f'{name} is not JSON')

    json.loads(self.path.read_text(), parse_constant=refuse)
    loaded = results.load(self.path).rows[0]['perplexity'].value
    self.assertEqual(str(loaded), str(value))

  def test_a_failed_write_leaves_the_old_file_and_nothing_else(self):
    results.save(self.path, example())
    with mock.patch.object(os, 'fsync', side_effect=OSError(28, 'full')):
      with self.assertRaisesRegex(OSError, 'full'):
        results.save(self.path, dataclasses.replace(example(), rows=()))
    self.assertEqual(results.load(self.path), example())
    self.assertEqual(os.listdir(self.path.parent), ['result.json'])

  @parameterized.parameters(
    (lambda d: d.update(schema_version=9), 'schema_version=9; this jaxq reads'),
    (lambda d: d.pop('schema_version'), 'schema_version=None; this jaxq reads'),
    (lambda d: d.update(extra=1), r"unknown fields \['extra'\]"),
    (lambda d: d.pop('run'), r"missing fields \['run'\]"),
    (lambda d: d['run'].pop('jax'), r"run: .*missing fields \['jax'\]"),
    (lambda d: d.update(rows={}), 'rows: a dict; allowed is a list'),
    (lambda d: d['rows'].append(3), r'rows\[2\]: a int; allowed is an object'),
    (
      lambda d: d['rows'][0]['metrics'][0].update(value='x'),
      r'rows\[0\].metrics\[0\]: .*value is a str; allowed is a Python number',
    ),
  )
  def test_another_schema_is_refused(self, change, message):
    self.edit(change)
    with self.assertRaisesRegex(ValueError, f'result.json.*{message}'):
      results.load(self.path)

  def test_a_cut_file_is_refused(self):
    results.save(self.path, example())
    self.path.write_text(self.path.read_text()[:100])
    with self.assertRaisesRegex(ValueError, 'not JSON .*; a result file is'):
      results.load(self.path)


class SchemaTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'name': ''}, ValueError, "name=''; allowed is a text"),
    ({'value': None}, TypeError, 'value is a NoneType; allowed is a Python'),
    ({'value': True}, TypeError, 'value is a bool; allowed is a Python'),
    ({'low': 1.0}, ValueError, 'low=1.0, high=None; an interval has both'),
    ({'low': 2.0, 'high': 1.0}, ValueError, 'low=2.0 is above high=1.0'),
  )
  def test_a_wrong_metric_is_refused(self, fields, error, message):
    with self.assertRaisesRegex(error, message):
      results.Metric(**{'name': 'a', 'value': 1.0, **fields})

  def test_a_metric_stands_once_in_a_row(self):
    with self.assertRaisesRegex(
      ValueError, r"\['perplexity'\] are given twice"
    ):
      results.Row(name='a', metrics=(perplexity(1.0), perplexity(2.0)))

  def test_an_unknown_metric_lists_those_there_are(self):
    with self.assertRaisesRegex(KeyError, r"'loss'.*\['perplexity'\]"):
      example().rows[0]['loss']

  def test_run_info_describes_this_process(self):
    info = results.run_info({'bits': 4})
    self.assertEqual(info.jax, jax.__version__)
    self.assertEqual(info.flags, {'bits': 4})
    self.assertRegex(info.device, r' x \d+$')
    self.assertRegex(info.commit, r'^(unknown|[0-9a-f]{40}(-dirty)?)$')


class TableTest(absltest.TestCase):
  def test_the_table_has_intervals_units_and_conventions(self):
    self.assertEqual(
      results.to_markdown(example().rows),
      '|       | perplexity (per token) | size (bytes) |\n'
      '| ----- | ---------------------: | -----------: |\n'
      '| float |   24.80 [23.50, 26.25] |              |\n'
      '| W4A16 |                  31.40 |   12,345,678 |\n'
      '\n'
      'perplexity: window=2048.\n',
    )

  def test_conventions_that_differ_are_told_apart(self):
    rows = [
      results.Row(name='a', metrics=(perplexity(1.0, window=2048),)),
      results.Row(name='b', metrics=(perplexity(2.0, window=512),)),
    ]
    text = results.to_markdown(rows)
    self.assertIn('perplexity of a: window=2048.\n', text)
    self.assertIn('perplexity of b: window=512.\n', text)

  def test_numbers_have_four_digits(self):
    values = (
      0.0,
      0.012345,
      1.0,
      24.808,
      483.27,
      54321.0,
      3.2e9,
      1e-7,
      math.inf,
    )
    row = results.Row(
      name='a',
      metrics=tuple(
        results.Metric(name=str(i), value=v) for i, v in enumerate(values)
      ),
    )
    line = results.to_markdown([row]).splitlines()[2]
    cells = [cell.strip() for cell in line.strip('|').split('|')][1:]
    self.assertEqual(
      cells,
      ['0', '0.01235', '1.000', '24.81', '483.3', '54,321']
      + ['3.2e+09', '1e-07', 'inf'],
    )

  def test_no_rows_is_an_empty_table(self):
    self.assertEqual(results.to_markdown([]), '|     |\n| --- |\n')


if __name__ == '__main__':
  absltest.main()

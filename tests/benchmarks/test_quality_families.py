"""Tests of quality_families: what runs, and the page, without a model."""

import json
import pathlib
import sys
import tempfile
from unittest import mock

from absl import flags
from absl.testing import absltest, parameterized

from benchmarks import quality, quality_families

COSINE, KL = 'cosine to float', 'KL'


def metric(name, value, half=0.01):
  """A stored metric, its interval `half` to both sides."""
  low, high = value - half, value + half
  return {'name': name, 'value': value, 'low': low, 'high': high}


def stored(name, value, measure=COSINE):
  """What is stored of one measured row."""
  return {
    'flags': ['--scheme=W4A4'],
    'run': 'JAX 0.10.2',
    'float': {'name': 'float', 'metrics': []},
    'row': {
      'name': name,
      'metrics': [
        metric(measure, value),
        *(
          {'name': cost, 'value': 3.0, 'low': None, 'high': None}
          for cost in quality.COST
        ),
      ],
    },
  }


def pair(model, ours, beside, values, measure=COSINE):
  """Two stored rows of a model."""
  names = (f'{model}, {ours}', f'{model}, {beside}')
  return {
    name: stored(name, value, measure)
    for name, value in zip(names, values, strict=True)
  }


class PageTest(parameterized.TestCase):
  @parameterized.parameters(
    ('minilm-l6', COSINE, (0.9, 0.8), 'yes'),
    ('minilm-l6', COSINE, (0.8, 0.9), '**no**'),
    ('minilm-l6', COSINE, (0.9, 0.905), 'not told apart'),
    ('whisper-base', KL, (0.1, 0.2), 'yes'),
    ('whisper-base', KL, (0.2, 0.1), '**no**'),
  )
  def test_a_claim_goes_by_the_intervals(self, model, measure, values, says):
    ours, beside = quality_families.CLAIMS[0]
    rows = pair(model, ours, beside, values, measure)
    (line,) = (
      line
      for line in quality_families.section(rows, model).splitlines()
      if line.startswith(f'| {ours} | {values[0]:.4g} [')
    )
    self.assertEndsWith(line, f'| {says} |')

  def test_a_claim_with_one_row_is_left_out(self):
    ours, beside = quality_families.CLAIMS[0]
    rows = pair('minilm-l6', ours, beside, (0.9, 0.8))
    del rows[f'minilm-l6, {beside}']
    self.assertNotIn('claim', quality_families.section(rows, 'minilm-l6'))

  def test_a_refused_row_says_why(self):
    name = 'minilm-l6, W4A4, rotation'
    rows = pair('minilm-l6', 'W4A4, RTN', 'W4, GPTQ', (0.5, 0.9))
    rows[name] = {'flags': ['--method=rotate'], 'refused': 'rotate: it cannot.'}
    page = quality_families.page(rows)
    self.assertRegex(page, r'(?m)^\| W4A4, rotation +\|[ |]+$')
    self.assertIn('- W4A4, rotation is refused: rotate: it cannot.\n', page)
    self.assertIn(f'| {name} | `--method=rotate` |', page)
    # The cost is in the yardstick of this model, and of measured rows only.
    self.assertIn('| minilm-l6, W4A4, RTN | 8,192 | 3 | 3 | 1.00 |', page)
    self.assertNotIn(f'| {name} | 8,192', page)

  def test_claims_and_yardsticks_are_of_rows_that_there_are(self):
    names = {f'{m}, {s}, {method}' for m, s, method, _ in quality_families.ROWS}
    self.assertLen(names, len(quality_families.ROWS))
    for claim in quality_families.CLAIMS:
      for name in claim:
        self.assertIn(f'minilm-l6, {name}', names)
    for model in quality_families.MODELS:
      self.assertIn(f'{model}, W4, GPTQ', names)


class RunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.store = pathlib.Path(folder) / 'stored.json'
    self.flags = flags.FlagValues()  # Other benchmarks have some of that name.
    quality.define_flags(str(self.store), '', self.flags)
    self.flags(['quality'])
    self.enterContext(mock.patch.object(quality, 'FLAGS', self.flags))

  def run_rows(self, rows, made=None):
    """quality.run with measure replaced; the names that it was called for."""
    made = made or {'row': {}}
    with mock.patch.object(quality, 'measure', return_value=made) as measure:
      quality.run(rows)
    return [call.args[0] for call in measure.call_args_list]

  def test_a_stored_row_is_not_run_again(self):
    rows = {'W4, RTN': ['--a'], 'W4, GPTQ': ['--b']}
    self.assertEqual(self.run_rows(rows), list(rows))
    self.assertEqual(self.run_rows(rows), [])
    self.assertEqual(self.run_rows(rows | {'W4, RTN': ['--c']}), ['W4, RTN'])
    self.flags.rerun, self.flags.row = True, ['W4, GPTQ']
    self.assertEqual(self.run_rows(rows), ['W4, GPTQ'])

  def test_a_refused_row_is_tried_again(self):
    rows = {'W4A4, rotation': ['--a']}
    self.run_rows(rows, {'refused': 'rotate: it cannot.'})
    saved = json.loads(self.store.read_text())['W4A4, rotation']
    self.assertEqual(saved, {'flags': ['--a'], 'refused': 'rotate: it cannot.'})
    self.assertEqual(self.run_rows(rows), list(rows))

  def test_only_goes_by_a_part_of_the_name(self):
    rows = {'minilm-l6, W4, RTN': [], 'vit-s14, W4, RTN': []}
    self.flags.only = ['vit-s14']
    self.assertEqual(self.run_rows(rows), ['vit-s14, W4, RTN'])
    self.flags.only = ['W4']
    self.assertEqual(self.run_rows(rows), list(rows)[:1])

  def test_an_unknown_row_is_refused(self):
    message = r"--row='W5, RTN'; allowed \['W4, RTN'\]. Use one of them"
    self.flags.row = ['W5, RTN']
    with self.assertRaisesRegex(ValueError, message):
      quality.run({'W4, RTN': []})

  def test_only_a_method_refuses(self):
    measure = lambda *flags_: quality.measure('W4A4, rotation', list(flags_))
    rotate = '--method=rotate,gptq'
    with mock.patch.object(quality, '_call', return_value='rotate: no.'):
      self.assertEqual(measure(rotate), {'refused': 'rotate: no.'})
      with self.assertRaisesRegex(ValueError, 'W4A4, rotation: rotate: no.'):
        measure('--method=awq')
    with (
      mock.patch.object(quality, '_call', return_value='out/x: no such file.'),
      self.assertRaisesRegex(ValueError, 'W4A4, rotation: out/x: no such'),
    ):
      measure(rotate)

  def test_a_run_of_other_flags_or_code_has_another_directory(self):
    directory = lambda *flags_: quality._directory('W4, RTN', list(flags_))
    self.assertRegex(directory('--a'), '^W4__RTN_[0-9a-f]{8}$')
    self.assertEqual(directory('--a'), directory('--a'))
    self.assertNotEqual(directory('--a'), directory('--b'))
    before = directory('--a')
    with mock.patch.object(quality.files, 'code_hash', return_value='other'):
      self.assertNotEqual(directory('--a'), before)

  def test_an_error_in_one_line_is_a_refusal_and_a_crash_is_not(self):
    say = 'import sys; print("error: x: no.", file=sys.stderr); sys.exit({})'
    call = lambda code: quality._call([sys.executable, '-c', say.format(code)])
    self.assertEqual(call(1), 'x: no.')
    self.assertEqual(call(0), '')
    with self.assertRaisesRegex(Exception, 'exit status 2'):
      call(2)


if __name__ == '__main__':
  absltest.main()

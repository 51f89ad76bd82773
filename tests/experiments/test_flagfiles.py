"""Every flagfile is a run that can start, and says what it is."""

import contextlib
import pathlib
import re

from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from experiments import recipe
from jaxq.quant import schemes
from tests.experiments import testing

FOLDER = testing.ROOT / 'experiments' / 'flags'
FILES = sorted(path.stem for path in FOLDER.glob('*.flags'))
# method: schemes of its paper's settings, and chains, which have a flagfile.
SETTINGS = {
  'llm_fp4': ('W4A4', 'W4A8', 'W8A8', 'rotate,llm_fp4'),
  'mergequant': ('W4A4', 'W6A6', 'W8A8', 'rotate,mergequant'),
  'os_plus': (
    'W8A8_STATIC',
    'W6A6_STATIC',
    'W6A6',
    'W5A5',
    'W4A4',
    'os_plus,gptq',
  ),
  'outliertune': ('W8A8', 'W6A6'),
  'ptq161': ('W1A16',),
  'quant_experts': ('W4A8', 'W4A6', 'W3A16'),
}


def text_of(name):
  return (FOLDER / f'{name}.flags').read_text('utf-8')


def values(name, flag):
  """The values of a flag in a flagfile."""
  return re.findall(rf'^--{flag}=(.*)$', text_of(name), re.MULTILINE)


class FlagfilesTest(parameterized.TestCase):
  @parameterized.parameters(*FILES)
  def test_it_is_a_run(self, name):
    head = [line for line in text_of(name).splitlines() if line[:1] == '#']
    command = re.compile(
      r'# python -m experiments\.(\w+) '
      rf'--flagfile=experiments/flags/{re.escape(name)}\.flags$'
    )
    found = [m for m in map(command.match, head) if m]
    self.assertLen(found, 1, 'its head names one command')
    testing.entry_point(found[0][1])  # Now its flags are those of absl.
    with flagsaver.flagsaver(), contextlib.chdir(testing.ROOT):
      flags.FLAGS.unparse_flags()
      rest = flags.FLAGS([name, f'--flagfile={FOLDER / name}.flags'])
      self.assertEqual(rest, [name], 'only flags are taken')
      if not {'method', 'scheme', 'set', 'group_size'} <= set(flags.FLAGS):
        return
      scheme = schemes.parse(
        flags.FLAGS.scheme,
        group_size=flags.FLAGS.group_size,
        symmetric=flags.FLAGS.symmetric,
        input_clip=flags.FLAGS.input_clip,
        input_symmetric=flags.FLAGS.input_symmetric,
        input_group_size=flags.FLAGS.input_group_size,
      )
      recipe.build(flags.FLAGS.method, scheme, flags.FLAGS.set)

  @parameterized.parameters(*sorted(SETTINGS))
  def test_every_setting_of_a_paper_has_one_and_is_linked(self, method):
    page = (testing.ROOT / 'docs' / 'methods.md').read_text('utf-8')
    schemes_, methods = set(), set()
    for name in FILES:
      chains = values(name, 'method')
      if not any(method in chain.split(',') for chain in chains):
        continue
      self.assertIn(f'experiments/flags/{name}.flags)', page)
      schemes_ |= set(values(name, 'scheme'))
      methods |= set(chains)
    self.assertContainsSubset(SETTINGS[method], schemes_ | methods)

  def test_outputs_are_their_own(self):
    outputs = [value for name in FILES for value in values(name, 'output')]
    self.assertLen(set(outputs), len(outputs))
    self.assertTrue(all(pathlib.Path(out).parts[0] == 'out' for out in outputs))


if __name__ == '__main__':
  absltest.main()

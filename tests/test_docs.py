"""The documentation: Python blocks are run, commands and links looked up.

Pages are run one by one, in a folder that holds what they speak of: my-llama, a
small random model, my-llama-awq, text.txt and held_out.txt. A block is run
after those before it on its page; what a line `print(...)  # this` says, or
comments that end a block, must be printed. What users of another library would
write is fenced as `text` and not looked at.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import io
import pathlib
import re
import shlex
import shutil
import tempfile
from unittest import mock

import pytest
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

import jaxq
from experiments import recipe
from jaxq.numerics import chips
from jaxq.quant import recommend, schemes
from tests.decode import testing as decode_testing
from tests.experiments import testing
from tests.io import test_hf_quantized

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = sorted(path.name for path in (ROOT / 'docs').glob('*.md'))
PAGES = ['README.md', 'CONTRIBUTING.md', *(f'docs/{name}' for name in DOCS)]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# print(...)  # this, or comments that end a block.
PRINTED = re.compile(r'^ *print\(.*\)  # (.+)$', re.MULTILINE)
ENDING = re.compile(r'(?:^# .*\n)+\Z', re.MULTILINE)
COMMAND = re.compile(r'^ *((?:\.venv/bin/)?python3? -m .*)$')
# Flags of everything that absl starts.
EVERYWHERE = {'flagfile', 'help', 'traceback'}


def python_blocks(page):
  """Yields (line number, code) of a page."""
  text = (ROOT / page).read_text('utf-8')
  for match in FENCE.finditer(text):
    if match[1] == 'python':
      yield text[: match.start()].count('\n') + 1, match[2]


def commands(page):
  """The arguments of each `python -m` of a page, continued lines joined."""
  text = (ROOT / page).read_text('utf-8').replace('\\\n', ' ')
  for line in text.splitlines():
    if match := COMMAND.match(line):
      yield shlex.split(match[1], comments=True)[2:]


def printed(code):
  """The lines that a block must print, in order."""
  found = PRINTED.findall(code)
  if match := ENDING.search(code):
    found += [line[2:] for line in match[0].splitlines()]
  return found


def imported(code):
  """Top-level names of the modules that code imports."""
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Import):
      yield from (alias.name.partition('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield (node.module or '').partition('.')[0]


def slug(heading):
  """What a heading's link is called."""
  return re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')


def write_inputs(folder):
  """Writes the files that the pages speak of."""
  config = dataclasses.replace(
    decode_testing.CONFIG,
    hidden_size=128,
    intermediate_size=256,
    head_dim=32,
  )
  with mock.patch.object(decode_testing, 'CONFIG', config):
    decode_testing.save(decode_testing.model(), folder / 'my-llama')
  test_hf_quantized.write(folder / 'my-llama-awq', 'awq')
  (folder / 'text.txt').write_text(testing.TEXT, 'utf-8')
  (folder / 'held_out.txt').write_text(testing.TEXT[::-1], 'utf-8')


class SnippetTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls._inputs = tempfile.TemporaryDirectory()
    cls.addClassCleanup(cls._inputs.cleanup)
    write_inputs(pathlib.Path(cls._inputs.name))

  @pytest.mark.loose_promotion  # As users run it.
  @parameterized.parameters(
    *(page for page in PAGES[1:] if list(python_blocks(page)))
  )
  def test_page_runs_as_written(self, page):
    blocks = list(python_blocks(page))
    needed = {name for _, code in blocks for name in imported(code)}
    missing = [n for n in sorted(needed) if not importlib.util.find_spec(n)]
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    shutil.copytree(self._inputs.name, folder, dirs_exist_ok=True)
    self.enterContext(contextlib.chdir(folder))
    # Pages have much in common.
    self.enterContext(testing.every_compilation_is_kept())
    names = {'__name__': '__main__'}
    for line, code in blocks:
      # Empty lines in front, so that a traceback names the page's line.
      compiled = compile('\n' * line + code, ROOT / page, 'exec')
      if missing:
        continue
      with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compiled, names)
      lines = iter(out.getvalue().splitlines())
      for expected in printed(code):
        # In order; other lines may stand between.
        self.assertIn(expected, lines, f'{page}:{line}:\n{out.getvalue()}')
    if missing:
      self.skipTest(f'{page} needs {missing}; it was only compiled')


class CommandTest(parameterized.TestCase):
  @parameterized.parameters(*(page for page in PAGES if list(commands(page))))
  def test_modules_and_flags_exist(self, page):
    for module, *arguments in commands(page):
      with self.subTest(module=module, arguments=arguments):
        self.assertIsNotNone(importlib.util.find_spec(module), module)
        top, _, name = module.partition('.')
        if top == 'experiments' and name != 'harness':  # That is lm-eval's.
          testing.entry_point(name)  # Now its flags are those of absl.
          self.check(arguments)
        elif top in ('benchmarks', 'launch', 'tools'):
          self.check_source(importlib.util.find_spec(module), arguments)

  def check(self, arguments):
    """Every flag and its value, as the entry point's parser takes them."""
    given = [a for a in arguments if a != '...']
    with flagsaver.flagsaver(), contextlib.chdir(ROOT):
      flags.FLAGS.unparse_flags()
      rest = flags.FLAGS(['docs', *given])
      self.assertEqual(rest, ['docs'], 'only flags are taken')
      if {'scheme', 'method', 'group_size', 'set'} <= set(flags.FLAGS):
        scheme = schemes.parse(
          flags.FLAGS.scheme, group_size=flags.FLAGS.group_size
        )
        recipe.build(flags.FLAGS.method, scheme, flags.FLAGS.set)

  def check_source(self, spec, arguments):
    """Every flag is defined somewhere in the module."""
    source = pathlib.Path(spec.origin).read_text('utf-8')
    if spec.name.startswith('launch.'):  # They share flags.
      source += (ROOT / 'launch' / 'cli.py').read_text('utf-8')
    for argument in arguments:
      match = re.match(r'--(?:no)?(\w+)', argument)
      if match and match[1] not in EVERYWHERE:
        self.assertRegex(source, rf"""['"](--)?{match[1]}['"]""")


class LinkTest(parameterized.TestCase):
  @parameterized.parameters(*PAGES)
  def test_links_lead_somewhere(self, page):
    path = ROOT / page
    text = FENCE.sub('', path.read_text('utf-8'))
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)', text):
      file, _, anchor = target.partition('#')
      found = (path.parent / file).resolve() if file else path
      self.assertTrue(found.exists(), target)
      if anchor:
        headings = re.findall(r'^#+ (.*)$', found.read_text('utf-8'), re.M)
        self.assertIn(anchor, [slug(heading) for heading in headings], target)

  def test_every_page_is_reached_from_the_index(self):
    found, left = set(), ['README.md']
    while left:
      name = left.pop()
      found.add(name)
      text = (ROOT / 'docs' / name).read_text('utf-8')
      linked = set(re.findall(r'\]\((\w+\.md)[)#]', text))
      left += sorted((linked & set(DOCS)) - found)
    self.assertEqual(sorted(found), DOCS)


class SchemeTableTest(absltest.TestCase):
  def test_it_says_what_the_code_says(self):
    text = (ROOT / 'docs' / 'choosing_a_scheme.md').read_text('utf-8')
    goals = ('latency', 'memory', 'throughput', 'quality')
    self.assertEqual(sorted(goals), sorted(recommend.GOALS))
    rows = re.findall(r'^\| ([\w]+) \| (.*) \|$', text, re.MULTILINE)
    told = {chip: rest.split(' | ') for chip, rest in rows}
    for chip in sorted(chips._NATIVE_FORMATS):
      if chip in ('gpu', 'tpu'):  # Those without a row of their own.
        continue
      formats, *answers = told[chip]
      self.assertEqual(formats, ', '.join(chips.native_formats(chip)))
      self.assertEqual(answers, [jaxq.recommend(chip, g) for g in goals])


if __name__ == '__main__':
  absltest.main()

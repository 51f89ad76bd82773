"""Writes the BUILD files from the imports, or checks that they agree.

One py_library per module and one py_test per test, whose deps are exactly what
the file imports, wherever in the file the import stands. The build graph is
then a page of documentation that cannot be wrong: it says of each file what it
rests on. `tests/test_build_files.py` keeps it so.

  python -m tools.build_files --write   (or `make build-files`)
  python -m tools.build_files --check
"""

import ast
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator

from absl import app, flags

_WRITE = flags.DEFINE_bool('write', False, 'Write the BUILD files.')
_CHECK = flags.DEFINE_bool('check', False, 'Say where they differ; exit 1.')

ROOTS = (
  'benchmarks',
  'experiments',
  'jaxq',
  'launch',
  'models',
  'pallas_kernels',
  'tests',
  'tools',
)
FIX = 'Run `make build-files`.'
# Imported name: name on the package index, where they differ.
DISTRIBUTIONS = {
  'PIL': 'pillow',
  'absl': 'absl-py',
  'orbax': 'orbax-checkpoint',
  'sklearn': 'scikit-learn',
  'yaml': 'pyyaml',
}
_HEAD = '# Written from the imports by `make build-files`; do not edit.\n'
_LOAD = 'load("@rules_python//python:{0}.bzl", "{0}")'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """One rule of a BUILD file.

  Attributes:
    rule: 'py_library' or 'py_test'.
    label: '//folder:module'.
    deps: sorted labels, '//folder:module' or '@pypi//name'.
  """

  rule: str
  label: str
  deps: tuple[str, ...]

  @property
  def name(self) -> str:
    return self.label.rpartition(':')[2]


def expected(root: pathlib.Path) -> dict[str, list[Target]]:
  """What the imports say: {folder of a BUILD file: its targets, by name}.

  Args:
    root: the repository's root.

  Raises:
    ValueError: a file does not parse, or imports a module that is not there.
  """
  targets: dict[str, list[Target]] = {}
  for path in source_files(root):
    folder = path.parent.relative_to(root).as_posix()
    is_test = path.parts[-1].startswith('test_')
    deps = {_label(root, module) for module, _ in imports(root, path)}
    label = f'//{folder}:{path.stem}'
    target = Target(
      rule='py_test' if is_test else 'py_library',
      label=label,
      deps=tuple(sorted(deps - {label, ''})),
    )
    targets.setdefault(folder, []).append(target)
  return {
    folder: sorted(found, key=lambda target: target.name)
    for folder, found in targets.items()
  }


def differences(root: pathlib.Path) -> list[str]:
  """One sentence per target or file that is not what the imports say."""
  problems = []
  wanted_files = expected(root)
  for folder, targets in wanted_files.items():
    path = root / folder / 'BUILD'
    if not path.exists():
      problems.append(f'{folder}/BUILD is missing. {FIX}')
      continue
    text = path.read_text()
    found = {target.label: target for target in parse(text, folder)}
    wanted = {target.label: target for target in targets}
    before = len(problems)
    for label in sorted(found.keys() - wanted.keys()):
      problems.append(f'{label} has no source file. {FIX}')
    for label, target in wanted.items():
      if label not in found:
        problems.append(f'{label} is missing. {FIX}')
      elif found[label] != target:
        problems.append(_compare(found[label], target))
    if len(problems) == before and text != render(targets):
      problems.append(f'{folder}/BUILD is laid out differently. {FIX}')
  for path in _walk(root, 'BUILD'):
    folder = path.parent.relative_to(root).as_posix()
    if folder not in wanted_files:
      problems.append(f'{folder}/BUILD has no modules beside it. Delete it.')
  return problems


def write(root: pathlib.Path) -> list[str]:
  """Writes the BUILD files that differ; returns their folders."""
  changed = []
  for folder, targets in expected(root).items():
    path, text = root / folder / 'BUILD', render(targets)
    if not path.exists() or path.read_text() != text:
      path.write_text(text)
      changed.append(folder)
  return changed


def render(targets: Iterable[Target]) -> str:
  """The text of a BUILD file, laid out as buildifier does."""
  targets = list(targets)
  loads = [_LOAD.format(rule) for rule in sorted({t.rule for t in targets})]
  blocks = [
    _HEAD + '\n'.join(loads),
    'package(default_visibility = ["//visibility:public"])',
  ]
  for target in targets:
    deps = [f'        "{dep}",' for dep in target.deps]
    if len(deps) == 1:
      lines = [f'    deps = ["{target.deps[0]}"],']
    else:
      lines = ['    deps = [', *deps, '    ],'] if deps else []
    blocks.append(
      '\n'.join(
        [
          f'{target.rule}(',
          f'    name = "{target.name}",',
          f'    srcs = ["{target.name}.py"],',
          *lines,
          ')',
        ]
      )
    )
  return '\n\n'.join(blocks) + '\n'


def parse(text: str, folder: str) -> list[Target]:
  """The targets of a BUILD file, which is Python as far as the parser sees."""
  targets = []
  for node in ast.walk(ast.parse(text)):
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
      continue
    if node.func.id in ('py_library', 'py_test'):
      fields = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
      targets.append(
        Target(
          rule=node.func.id,
          label=f'//{folder}:{fields.get("name")}',
          deps=tuple(sorted(fields.get('deps', ()))),
        )
      )
  return targets


def imports(
  root: pathlib.Path, path: pathlib.Path
) -> Iterator[tuple[str, int]]:
  """Yields (module, line) for what `path` imports, the library's own aside.

  `from a import b` yields a.b where that is a module, else a. Standard modules
  are left out; third-party ones are given by their full dotted name.
  """
  try:
    tree = ast.parse(path.read_text(encoding='utf-8'))
  except SyntaxError as e:
    raise ValueError(
      f'{path}:{e.lineno}: {e.msg}; a file that parses is needed. Mend it.'
    ) from e
  package = path.parent.relative_to(root).parts
  for node in ast.walk(tree):
    names: set[str] = set()
    if isinstance(node, ast.Import):
      names = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = package[: len(package) - node.level + 1] if node.level else ()
      base = '.'.join([*above, *([node.module] if node.module else [])])
      for alias in node.names:
        inner = f'{base}.{alias.name}'
        names.add(inner if _is_local(root, inner) else base)
    else:
      continue
    for name in sorted(names):
      top = name.partition('.')[0]
      if top in ROOTS and not _is_local(root, name):
        raise ValueError(
          f'{path}:{node.lineno}: imports {name}, which is no module of this '
          'repository. Correct the import, or add the module.'
        )
      if top not in sys.stdlib_module_names:
        yield name, node.lineno


def distribution(module: str) -> str:
  """The name on the package index that a third-party module comes from."""
  top = module.partition('.')[0]
  return DISTRIBUTIONS.get(top, top)


def source_files(root: pathlib.Path) -> list[pathlib.Path]:
  """All Python files of the repository, sorted."""
  return _walk(root, '*.py')


def _walk(root: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  paths = (path for top in ROOTS for path in (root / top).rglob(pattern))
  return sorted(
    path
    for path in paths
    if not any(part.startswith('.') for part in path.relative_to(root).parts)
  )


def _is_local(root: pathlib.Path, module: str) -> bool:
  parts = module.split('.')
  if parts[0] not in ROOTS:
    return False
  path = root.joinpath(*parts)
  return path.with_suffix('.py').exists() or path.is_dir()


def _label(root: pathlib.Path, module: str) -> str:
  """The label of a module; '' for a folder without `__init__.py`."""
  parts = module.split('.')
  if not _is_local(root, module):
    name = distribution(module).lower().replace('-', '_')
    return f'@pypi//{name}'
  path = root.joinpath(*parts)
  if path.with_suffix('.py').exists():
    return f'//{"/".join(parts[:-1])}:{parts[-1]}'
  if (path / '__init__.py').exists():
    return f'//{"/".join(parts)}:__init__'
  return ''


def _compare(found: Target, wanted: Target) -> str:
  if found.rule != wanted.rule:
    return f'{found.label} is a {found.rule}, not a {wanted.rule}. {FIX}'
  lacks = sorted(set(wanted.deps) - set(found.deps))
  extra = sorted(set(found.deps) - set(wanted.deps))
  return f'{found.label}: deps lack {lacks}, have unused {extra}. {FIX}'


def main(argv: list[str]) -> int:
  """Writes or checks; the exit code is 1 where something differs."""
  if len(argv) > 1 or _WRITE.value == _CHECK.value:
    print('error: give one of --write and --check.', file=sys.stderr)
    return 1
  root = pathlib.Path(__file__).resolve().parents[1]
  try:
    lines = write(root) if _WRITE.value else differences(root)
  except ValueError as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  for line in lines:
    print(f'wrote {line}/BUILD' if _WRITE.value else line)
  return int(_CHECK.value and bool(lines))


if __name__ == '__main__':
  app.run(main)

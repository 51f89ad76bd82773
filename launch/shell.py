"""Shell text from Python: quoted command lines, and scripts with @HOLES@."""

import re
import shlex
from collections.abc import Sequence

_HOLE = re.compile(r'@([A-Z_]+)@')


def lines(words: Sequence[str], indent: int = 2) -> str:
  """A command line, quoted, each flag on a line of its own.

  Args:
    words: the command and its arguments.
    indent: spaces before each continued line.
  """
  out = shlex.quote(words[0])
  for word in words[1:]:
    gap = f' \\\n{" " * indent}' if word.startswith('--') else ' '
    out += gap + shlex.quote(word)
  return out


def fill(text: str, **values: str) -> str:
  """Puts values into the holes of a script, in one pass.

  Args:
    text: with @NAME@ where a value belongs.
    **values: one for each name, and no other.

  Raises:
    ValueError: the names are not those of the holes.
  """
  holes = set(_HOLE.findall(text))
  if holes != set(values):
    raise ValueError(
      f'shell.fill: the text has the holes {sorted(holes)} and was given '
      f'{sorted(values)}; give one value for each hole.'
    )
  return _HOLE.sub(lambda match: values[match[1]], text)

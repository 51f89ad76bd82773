"""How every entry point starts, fails and explains itself.

`run(main)` is `absl.app.run` with three promises. A user's mistake (a wrong
flag, value, file or shape; a full disk or memory) ends in one line on stderr
and exit code 1; `--traceback` shows where it came from. Any other exception is
a bug and keeps its traceback. `--help` shows the entry point's docstring and
its own flags, nothing of the libraries below it.

  if __name__ == '__main__':
    cli.run(main)  # main(argv) -> None | int
"""

import difflib
import errno
import functools
import json
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from experiments import interrupts, job, results
from jaxq.parallel import preemption

FLAGS = flags.FLAGS

flags.DEFINE_bool(
  'traceback', False, 'On an error, print the Python traceback as well.'
)

# Flags of these modules are about how to run, not about what is computed.
_OWN = ('experiments.cli', 'experiments.job')
_HELP = frozenset({'help', 'helpshort', '?', 'h'})
_WIDTH = 80
_QUOTE = "'"
_REQUIRED = re.compile(r'Flag --(\S+) must have a value other than None')
_ADDED = re.compile(r'^<[^>]*>: |; repeat this option to specify a .*$')
_PLAIN = {  # How Python puts it: how a user of flags would.
  r'invalid literal for int\(\).*': 'a whole number is needed',
  r"\('Non-boolean argument.*\)": 'true or false is needed',
  r'could not convert string to float.*': 'a number is needed',
}
_HINTS = {
  errno.ENOSPC: 'free some space, then run the same command again',
  errno.EDQUOT: 'free some space, then run the same command again',
  errno.ENOENT: 'give a path that exists',
  errno.EACCES: 'give a path that this user may read and write',
  errno.EPERM: 'give a path that this user may read and write',
  errno.EROFS: 'give a path on a file system that can be written',
  errno.ENOTDIR: 'give a path whose parents are folders',
  errno.EISDIR: 'give a file',
  errno.EEXIST: 'give a path that is not taken',
}


def run(main: Callable[[Sequence[str]], int | None]) -> None:
  """Parses the flags, calls `main(argv)` and exits with what it returns.

  Args:
    main: takes the arguments that are no flags (only the program's name: any
      other is refused), returns an exit code or None for 0.

  Raises:
    SystemExit: always. 0: done; 1: one line on stderr says what was wrong, or
      that the run was interrupted; 143: that it was stopped by SIGTERM.
  """
  sys.unraisablehook = _unraisable
  try:
    interrupts.end()
    app.run(functools.partial(_call, main), flags_parser=_parse)
  except (_Interrupted, KeyboardInterrupt) as e:
    # Everything is unwound. Interpreters that go down regularly while XLA is
    # compiling in a thread may crash, and then the exit code is another one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(e.code or 0) if isinstance(e, _Interrupted) else 1)


def resolved_flags(modules: Sequence[str] | None = None) -> dict[str, Any]:
  """The values in force, {flag name: value}, sorted by name.

  Args:
    modules: names of the modules whose flags are meant. None: the entry point
      and the modules of experiments/ it shares flags with, as in `--help`.
  """
  return {flag.name: flag.value for flag in _flags(modules)}


def write_flagfile(
  path: str | os.PathLike, modules: Sequence[str] | None = None
) -> None:
  """Writes the values in force as a flagfile that repeats this run.

  Args:
    path: the file; written atomically.
    modules: as for `resolved_flags`.
  """
  lines = [f'# {line}' for line in results.command().splitlines()]
  for flag in _flags(modules):
    if flag.value is None:
      continue
    text = flag.serialize()
    values = flag.value if isinstance(flag.value, list) else [flag.value]
    if any('\n' in value for value in values if isinstance(value, str)):
      text = f'# --{flag.name}={json.dumps(flag.value)} (a line break)'
    if text:
      lines.append(text)
  results.write_text(path, '\n'.join(lines) + '\n')


def help_text() -> str:
  """The entry point's docstring, its usage line and its flags by group."""
  main = sys.modules['__main__']
  spec = getattr(main, '__spec__', None)
  program = f'-m {spec.name}' if spec else os.path.basename(sys.argv[0])
  parts = [
    (main.__doc__ or '').strip(),
    f'Usage: python {program} [--flagfile=FILE] [--flag=value ...]',
  ]
  for module in _modules():
    found = [_flag_help(flag) for flag in _flags([module])]
    if found:
      parts.append('\n'.join([f'{_title(module)}:', *found]))
  parts.append(
    'Every command:\n'
    + _entry('--flagfile=...', 'read flags from this file; later flags win')
    + '\n'
    + '\n'.join(_flag_help(flag) for flag in _flags(_OWN))
  )
  return '\n\n'.join(part for part in parts if part) + '\n'


class _Interrupted(SystemExit):
  """The exit code after Ctrl-C or SIGTERM."""


def _unraisable(lost: Any) -> None:
  """Sends a Ctrl-C again that Python had to ignore.

  It does where the signal arrives in a callback of the garbage collector, of
  which JAX has one.
  """
  if not isinstance(lost.exc_value, KeyboardInterrupt):
    sys.__unraisablehook__(lost)
    return
  again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
  again.daemon = True
  again.start()


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses flags for `app.run`; a mistake is one line and exit code 1."""
  for arg in argv[1:]:
    if arg == '--':
      break
    if arg.startswith('-') and arg.lstrip('-') in _HELP:
      print(help_text(), end='')
      sys.exit(0)
  try:
    rest = FLAGS(list(argv))
  except flags.Error as e:
    _fail(_flag_error(e))
  verbosity = FLAGS['verbosity']
  if verbosity.using_default_value:
    # Else `app.run` chooses INFO, and the libraries log every step.
    verbosity.value = logging.WARNING
    verbosity.using_default_value = False
  return rest


def _call(
  main: Callable[[Sequence[str]], int | None], argv: Sequence[str]
) -> int | None:
  """Calls main; turns what a user can cause into one line."""
  try:
    if len(argv) > 1:
      raise ValueError(
        f'unexpected argument {argv[1]!r}; options are given as --flag=value. '
        '--help lists them.'
      )
    with job.running(resolved_flags):
      code = main(argv)
    sys.stdout.flush()
    return code
  except BrokenPipeError:
    # The reader went away (`| head`): there is nobody to tell.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    job.leave('error', 'nobody reads the output any more.')
    sys.exit(1)
  except KeyboardInterrupt:
    _fail(
      'stopped by Ctrl-C; run the same command again to resume.',
      'interrupted',
      _Interrupted,
    )
  except preemption.Preempted as e:
    _fail(str(e), 'stopped', _Interrupted, preemption.EXIT_CODE)
  except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as e:
    job.leave_with_bug(e)
    raise  # Misuse of JAX is a bug of ours, although it is a TypeError.
  except MemoryError as e:
    _fail(_out_of_memory('host', str(e)))
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      job.leave_with_bug(e)
      raise
    _fail(_out_of_memory('device', str(e)))
  except OSError as e:
    _fail(_os_error(e))
  except (ValueError, TypeError, NotImplementedError) as e:
    _fail(str(e) or type(e).__name__)
  except Exception as e:
    job.leave_with_bug(e)
    raise


def _fail(
  message: str,
  label: str = 'error',
  how: type[SystemExit] = SystemExit,
  code: int = 1,
) -> NoReturn:
  """Prints one line (after the traceback, if asked for) and exits."""
  if FLAGS.is_parsed() and FLAGS.traceback:
    traceback.print_exc()
  sys.stdout.flush()
  job.leave(label, message, code)  # Returns if this process is alone.
  print(f'{label}: {" ".join(message.split())}', file=sys.stderr)
  raise how(code)


def _out_of_memory(where: str, detail: str) -> str:
  detail = detail.strip().split('\n')[0]
  return (
    f'out of {where} memory{f" ({detail})" if detail else ""}; use a smaller '
    'batch, shorter windows or more devices (--help lists the flags).'
  )


def _os_error(e: OSError) -> str:
  """Our own messages as they are; the system's with path, reason, way out."""
  if e.errno is None or e.strerror is None:
    return str(e)
  path = f'{e.filename}: ' if e.filename is not None else ''
  hint = _HINTS.get(e.errno)
  return f'{path}{e.strerror}{f"; {hint}" if hint else ""}.'


def _flag_error(e: flags.Error) -> str:
  """What absl complains of, as: what was given; what is allowed or meant."""
  message = str(e)
  if isinstance(e, flags.UnrecognizedFlagError):
    known = sorted(flag.name for flag in _flags(None)) + ['flagfile']
    near = difflib.get_close_matches(e.flagname, known, n=1, cutoff=0.5)
    hint = f'did you mean --{near[0]}? ' if near else ''
    return f'unknown flag --{e.flagname}; {hint}--help lists the flags.'
  missing = re.findall(
    r'Flag --(\S+) must have a value other than None', message
  )
  if missing:
    named = ', '.join(f'--{name}' for name in missing)
    given = ' '.join(f'--{name}=VALUE' for name in missing)
    return f'{named} not given; a value is required. Add {given}.'
  if isinstance(e, flags.CantOpenFlagFileError):
    cause = e.__context__
    name = cause.filename if isinstance(cause, OSError) else ''
    reason = cause.strerror if isinstance(cause, OSError) else message
    return f'--flagfile={name}: {reason}; give a flagfile that can be read.'
  for pattern, plain in _PLAIN.items():
    message = re.sub(pattern, plain, message)
  return f'{message}; --help lists the flags and their values.'


def _modules() -> list[str]:
  """The entry point, then the modules of experiments/ that share flags.

  Another entry point (a module with a `main`) may be imported for its
  functions; its flags are its own business.
  """
  shared = [
    name
    for name in sorted(FLAGS.flags_by_module_dict())
    if name.startswith('experiments.')
    and name not in _OWN
    and not hasattr(sys.modules.get(name), 'main')
  ]
  return [sys.argv[0], *shared]  # absl's name of __main__ is sys.argv[0].


def _flags(modules: Sequence[str] | None) -> list[flags.Flag]:
  """The flags defined by `modules` or declared key there, sorted by name."""
  found = {}
  for module in _modules() if modules is None else modules:
    for flag in FLAGS.get_key_flags_for_module(module):
      found[flag.name] = flag
  return [found[name] for name in sorted(found)]


def _title(module: str) -> str:
  if module == sys.argv[0]:
    return 'Flags'
  doc = (sys.modules[module].__doc__ or module).strip()
  return doc.split('\n')[0].rstrip('.')


def _flag_help(flag: flags.Flag) -> str:
  """`--name=...`, what it does, its choices and its default, wrapped."""
  values = getattr(flag.parser, 'enum_values', None)
  if flag.boolean:
    head = f'--[no]{flag.name}'
  elif values:
    head = f'--{flag.name}={"|".join(values)}'
  else:
    head = f'--{flag.name}=...'
  notes = ['repeatable'] if isinstance(flag, flags.MultiFlag) else []
  if any(_REQUIRED.search(v.message) for v in flag.validators):
    notes.append('required')
  if flag.default not in (None, '', []):
    notes.append(f'default: {str(flag.default_as_str).strip(_QUOTE)}')
  text = _ADDED.sub('', ' '.join((flag.help or '').split()))
  return _entry(head, text + (f' ({"; ".join(notes)})' if notes else ''))


def _entry(head: str, text: str) -> str:
  body = textwrap.fill(
    text, _WIDTH, initial_indent=' ' * 6, subsequent_indent=' ' * 6
  )
  return f'  {head}\n{body}'

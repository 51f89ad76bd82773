"""Runs `experiments.calibrate` on a tiny model, in this process or its own."""

import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import subprocess
import sys
import types
from unittest import mock

import jax
from absl import flags
from absl.testing import flagsaver

from experiments import cli
from tests.decode import testing

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = 'Five hexing wizard bots jump quickly, and 12 caf\u00e9s close.\n' * 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What a run returned and printed."""

  code: int
  out: str
  err: str

  @property
  def errors(self) -> list[str]:
    """The lines of stderr that are no progress."""
    lines = self.err.replace('\r', '\n').splitlines()
    return [x for x in lines if x.startswith(('error: ', 'interrupted: '))]


@contextlib.contextmanager
def every_compilation_is_kept():
  """Each run compiles anew; with JAX's cache (tests/conftest.py), only once."""
  name = 'jax_persistent_cache_min_compile_time_secs'
  before = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update(name, 0.0)
  try:
    with mock.patch.dict(os.environ, {name.upper(): '0'}):
      yield
  finally:
    jax.config.update(name, before)


def write_inputs(folder: pathlib.Path, num_layers: int = 2) -> None:
  """Writes folder/model, a Hugging Face directory, and folder/text.txt."""
  config = dataclasses.replace(testing.CONFIG, num_layers=num_layers)
  with mock.patch.object(testing, 'CONFIG', config):
    testing.save(testing.model(), folder / 'model')
  (folder / 'text.txt').write_text(TEXT, 'utf-8')


def arguments(folder: pathlib.Path) -> list[str]:
  """Flags of a run over `write_inputs(folder)`; later flags win."""
  return [
    f'--model={folder / "model"}',
    f'--output={folder / "out"}',
    f'--data={folder / "text.txt"}',
    f'--eval_data={folder / "text.txt"}',
    '--scheme=W4A16',
    '--group_size=16',
    '--method=gptq',
    '--sequences=4',
    '--batch_size=4',
    '--sequence_length=16',
    '--eval_window=32',
    '--eval_tokens=128',
  ]


# The flags of each entry point that was imported, {name: flag}.
_OWN_FLAGS: dict[str, dict[str, flags.Flag]] = {}


def entry_point(name: str) -> types.ModuleType:
  """The module experiments.NAME; of all entry points, only its flags exist.

  Those of another have the same names. So no test imports one at its top.
  """
  for other in _OWN_FLAGS.values():
    for flag in other:
      if flag in flags.FLAGS:
        delattr(flags.FLAGS, flag)
  module = importlib.import_module(f'experiments.{name}')
  if name not in _OWN_FLAGS:
    own = flags.FLAGS.flags_by_module_dict().get(module.__name__, [])
    _OWN_FLAGS[name] = {flag.name: flag for flag in own}
  for flag_name, flag in _OWN_FLAGS[name].items():
    if flag_name not in flags.FLAGS:
      flags.FLAGS[flag_name] = flag
      flags.FLAGS.register_flag_by_module(module.__name__, flag)
  return module


def call(*args: str, name: str = 'calibrate') -> Outcome:
  """As `python -m experiments.NAME ARGS`, in this process."""
  module = entry_point(name)
  argv = [f'experiments.{name}', *args]
  out, err = io.StringIO(), io.StringIO()
  with (
    flagsaver.flagsaver(),
    mock.patch.object(sys, 'argv', argv),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    flags.FLAGS.unparse_flags()
    try:
      code = cli._call(module.main, cli._parse(argv)) or 0
    except SystemExit as e:
      code = int(e.code or 0)
  return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


def start(*args: str, **env: str) -> subprocess.Popen:
  """As `call`, in a process of its own."""
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.calibrate', *args],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **env},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> Outcome:
  """Waits for a process."""
  out, err = process.communicate(timeout=120)
  return Outcome(code=process.returncode, out=out, err=err)

"""How a command runs: as how many processes, until when, traced or not.

`running` is around every entry point's `main` (experiments.cli). Alone, it only
listens for SIGTERM. As one process of a job it joins the others, compares code
and flags with theirs, silences all but process 0, and makes sure that they end
together, with one reason.
"""

import contextlib
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import flags

from jaxq.io import files
from jaxq.parallel import distributed, preemption, watch

_COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address',
  None,
  'HOST:PORT of process 0 of a job of several processes. Not needed on Cloud '
  'TPU, GKE and Slurm, which tell all processes.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Processes of the job, where the platform tells none.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Number of this process, from 0, likewise.'
)
_START_TIMEOUT = flags.DEFINE_integer(
  'start_timeout',
  300,
  'Seconds in which all processes must have come.',
  lower_bound=1,
)
_PEER_TIMEOUT = flags.DEFINE_integer(
  'peer_timeout',
  30,
  'Seconds without a sign of life after which a process counts as dead, and '
  'the job ends.',
  lower_bound=5,
)
_GRACE_SECONDS = flags.DEFINE_float(
  'grace_seconds',
  30.0,
  'Seconds between a SIGTERM and the end of the machine.',
  lower_bound=0.0,
)
_PROFILE = flags.DEFINE_string(
  'profile', None, 'Folder for an XProf trace, of process 0.'
)
_PROFILE_SECONDS = flags.DEFINE_float(
  'profile_seconds',
  60.0,
  'How much of the beginning --profile traces.',
  lower_bound=0.1,
)

_watch: watch.Watch | None = None  # Of this process's job, if it has one.


@contextlib.contextmanager
def running(resolved: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
  """Joins the job, if there is one; leaves it when the block is through.

  A block that raises does not leave: `leave` or `leave_with_bug` does then.

  Args:
    resolved: gives the flags that all processes must share.

  Raises:
    ValueError, OSError: the processes do not find each other, or run different
      things.
    preemption.Preempted: a SIGTERM came.
  """
  if not flags.FLAGS.is_parsed():  # No command: main is called as a function.
    yield
    return
  with contextlib.ExitStack() as stack:
    _join()
    if threading.current_thread() is threading.main_thread():
      stack.enter_context(preemption.listening(_GRACE_SECONDS.value, _cut_off))
    if _watch is not None:
      _check_same(resolved())
    stack.enter_context(_profiled())
    yield
  if _watch is not None:
    distributed.barrier()
    _watch.stop()
    jax.distributed.shutdown()


def leave(label: str, message: str, code: int = 1) -> None:
  """Ends the whole job with a line on process 0; returns if there is none."""
  if _watch is not None:
    _watch.leave(label, message, code)


def leave_with_bug(error: Exception) -> None:
  """The same with a traceback, unless the error is of another's making."""
  if _watch is None:
    return
  if isinstance(error, jax.errors.JaxRuntimeError | distributed.Elsewhere):
    _watch.verdict()
  traceback.print_exception(error, file=sys.__stderr__)
  _watch.leave('error', f'{type(error).__name__}: {error}')


def _join() -> None:
  """Starts or finds the other processes, and watches them from then on."""
  global _watch
  config = distributed.JobConfig(
    coordinator_address=_COORDINATOR_ADDRESS.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    start_timeout=_START_TIMEOUT.value,
  )
  if not distributed.start(config):
    return
  _watch = watch.Watch(_PEER_TIMEOUT.value)
  _silence()


def _silence() -> None:
  """Only process 0 prints, and of it only Python: gloo greets on stdout."""
  sys.stdout.flush()
  nowhere = open(os.devnull, 'w')  # noqa: SIM115
  if distributed.is_first():
    sys.stdout = open(os.dup(1), 'w', buffering=1)  # noqa: SIM115
  else:
    sys.stdout = sys.stderr = nowhere
  os.dup2(nowhere.fileno(), 1)


def _check_same(resolved: Mapping[str, Any]) -> None:
  """Refuses to start where hosts differ in code or flags."""
  code = {'jaxq': files.code_hash(), 'jax': jax.__version__}
  distributed.check_same('code', code)
  given = {f'--{name}': str(value) for name, value in resolved.items()}
  given['--num_processes'] = str(_NUM_PROCESSES.value)
  distributed.check_same('flags', given)


def _cut_off(reason: str) -> None:
  """Ends this process, and its job, from another thread."""
  leave('stopped', reason, preemption.EXIT_CODE)
  print(f'stopped: {reason}', file=sys.stderr, flush=True)
  os._exit(preemption.EXIT_CODE)


@contextlib.contextmanager
def _profiled() -> Iterator[None]:
  """Traces the beginning of the block, on process 0, if asked for."""
  if _PROFILE.value is None or not distributed.is_first():
    yield
    return
  pathlib.Path(_PROFILE.value).mkdir(parents=True, exist_ok=True)
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # It would drown the scopes.
  jax.profiler.start_trace(_PROFILE.value, profiler_options=options)
  once = threading.Lock()

  def stop() -> None:
    if once.acquire(blocking=False):
      jax.profiler.stop_trace()

  timer = threading.Timer(_PROFILE_SECONDS.value, stop)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    stop()

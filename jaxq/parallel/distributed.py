"""The processes of a job: how they start together, agree and wait.

The engine is JAX's own: `jax.distributed.initialize` finds the processes (by
itself on Cloud TPU, GKE and Slurm), its coordination service holds the few
words that they exchange outside of computations:

  start        all processes of the job, or a sentence about who is missing
  check_same   all of them run one thing, or a sentence about who does not
  on_first     what one process does for all: open an output, commit a block
  barrier      nobody goes on before all are there

A process alone runs through all of this as if it were not there.
"""

import dataclasses
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed as runtime

# The wait for a process that works is ended by parallel.watch, not by time.
_PATIENCE_MS = 24 * 3600 * 1000
_RETRY = 0.2  # Seconds.
_AFTER = 60  # Seconds that JAX is given beyond our own patience.
_STARTED = 'must be called before'  # What JAX says of a late start.
_NO_CLUSTER = ('should be defined', 'must be defined')

# What processes may differ in: what to do about it.
HINTS = {
  'code': 'all hosts must run one version. Install the same image on all.',
  'flags': 'all hosts must be given the same command.',
  'data': 'all hosts must read the same. The cache of that host may be stale: '
  'empty $JAXQ_CACHE there, or give all the same files.',
}

_calls = itertools.count()  # The same call has the same number everywhere.


class Elsewhere(Exception):
  """Another process failed; it says why, and this one leaves with it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
  """How the processes of a job find each other.

  coordinator_address: host:port of process 0; None: the platform knows.
  num_processes, process_id: of the job, of this process; None: likewise.
  start_timeout: seconds in which all of them must have come.
  """

  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  start_timeout: int = 300

  def __post_init__(self):
    given = [
      f'--{name}'
      for name in ('coordinator_address', 'num_processes', 'process_id')
      if getattr(self, name) is not None
    ]
    if given and self.coordinator_address is None:
      raise ValueError(
        f'{" and ".join(given)} without --coordinator_address; the processes '
        'of a job need one address to find each other. Give HOST:PORT of '
        'process 0, or none of these flags where the platform knows them '
        '(Cloud TPU, GKE, Slurm).'
      )
    if self.coordinator_address is None:
      return
    host, _, port = self.coordinator_address.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
      raise ValueError(
        f'--coordinator_address={self.coordinator_address}; HOST:PORT of '
        'process 0 is needed, as in 10.0.0.2:1234.'
      )
    n, i = self.num_processes, self.process_id
    if n is not None and (n < 1 or (i is not None and not 0 <= i < n)):
      raise ValueError(
        f'--num_processes={n} --process_id={i}; process_id must be in '
        '0..num_processes-1. Give every process its own.'
      )

  @property
  def is_explicit(self) -> bool:
    """Whether nothing is left for the platform to tell."""
    return None not in (
      self.coordinator_address,
      self.num_processes,
      self.process_id,
    )


def start(config: JobConfig) -> bool:
  """Joins the job that this process is of, before JAX computes anything.

  Args:
    config: what is not given there, the platform must know.

  Returns:
    Whether there are other processes.

  Where processes do not come in time this one ends, with a line on stderr.

  Raises:
    OSError: the coordinator does not answer, or its port is taken.
    ValueError: flags that contradict what the other processes were given.
  """
  if jax.distributed.is_initialized():
    return jax.process_count() > 1
  if config.coordinator_address is None and _is_lone_pod():
    return False
  if config.is_explicit and config.process_id:
    _wait_for_coordinator(config)
  # A notice of preemption is parallel.preemption's.
  jax.config.update('jax_enable_preemption_service', False)
  # JAX would end the process with a stack trace of its own.
  clock = threading.Timer(config.start_timeout, _give_up, [config])
  clock.daemon = True
  clock.start()
  try:
    jax.distributed.initialize(
      config.coordinator_address,
      config.num_processes,
      config.process_id,
      # What is complete is not to be completed: a GPU host keeps all its GPUs.
      cluster_detection_method='deactivate' if config.is_explicit else None,
      initialization_timeout=config.start_timeout + _AFTER,
    )
  except ValueError as e:
    if not any(text in str(e) for text in _NO_CLUSTER):
      raise
    if config.coordinator_address is None:
      return False
    raise ValueError(
      f'--coordinator_address={config.coordinator_address} without '
      '--num_processes and --process_id; this platform does not tell them. '
      'Give both.'
    ) from e
  except RuntimeError as e:
    if config.coordinator_address is None and _STARTED in str(e):
      return False  # Within a program that computes already.
    raise _cannot_start(config, e) from e
  finally:
    clock.cancel()
  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this is the process that prints and writes."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def client() -> Any:
  """The job's coordination service, as JAX's own modules use it."""
  return runtime.global_state.client


def name(process: int, host: str) -> str:
  """How a process is called in messages."""
  return f'process {process} ({host})'


def on_first(function: Callable[[], Any]) -> Any:
  """What a function returns on process 0, on every process.

  Args:
    function: called on process 0 only; returns JSON data.

  Raises:
    Elsewhere: on the other processes, where it raised.
  """
  if jax.process_count() == 1:
    return function()
  key = f'jaxq/first/{next(_calls)}'
  if jax.process_index() == 0:
    try:
      value = function()
    except BaseException:
      client().key_value_set(key, json.dumps({'failed': True}))
      raise
    client().key_value_set(key, json.dumps({'value': value}))
    return value
  answer = json.loads(client().blocking_key_value_get(key, _PATIENCE_MS))
  if 'failed' in answer:
    raise Elsewhere('process 0 failed.')
  return answer['value']


def barrier() -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    key = f'jaxq/barrier/{next(_calls)}'
    client().wait_at_barrier(key, timeout_in_ms=_PATIENCE_MS)


def check_same(what: str, marks: Mapping[str, str]) -> None:
  """Refuses a job whose processes do not run the same thing.

  Args:
    what: the marks are of, one of HINTS.
    marks: name -> value.

  Raises:
    ValueError: on all processes, about the first one that differs.
  """
  if jax.process_count() == 1:
    return
  key = f'jaxq/same/{next(_calls)}/'
  mine = json.dumps([socket.gethostname(), dict(marks)])
  client().key_value_set(f'{key}{jax.process_index()}', mine)
  client().wait_at_barrier(f'{key}all', timeout_in_ms=_PATIENCE_MS)

  def compare() -> str:
    found = {
      int(k.rsplit('/', 1)[1]): json.loads(value)
      for k, value in client().key_value_dir_get(key)
    }
    return difference(what, found)

  message = on_first(compare)
  if message:
    raise ValueError(f'{message}; {HINTS[what]}')


def difference(what: str, found: Mapping[int, Any]) -> str:
  """A sentence about the first process unlike process 0; '' if all are alike.

  Args:
    what: the marks are of.
    found: process -> (host, {name: value}).
  """
  _, first = found[0]
  for process in sorted(found):
    host, marks = found[process]
    for key in sorted(first.keys() | marks.keys()):
      if first.get(key) != marks.get(key):
        return (
          f'{name(process, host)} runs other {what}: {key}='
          f'{_short(marks.get(key))} there, {_short(first.get(key))} on '
          'process 0'
        )
  return ''


def _short(value: str | None) -> str:
  if value is None:
    return 'nothing'
  return value if len(value) <= 64 else f'{value[:24]}..{value[-12:]}'


def _is_lone_pod() -> bool:
  """Whether Kubernetes runs this, but not as one of a job's pods."""
  return 'KUBERNETES_SERVICE_HOST' in os.environ and not any(
    key in os.environ
    for key in ('JOB_COMPLETION_INDEX', 'TPU_WORKER_HOSTNAMES')
  )


def _wait_for_coordinator(config: JobConfig) -> None:
  """Returns when somebody listens at the coordinator's address."""
  address = str(config.coordinator_address)
  host, _, port = address.rpartition(':')
  deadline = time.monotonic() + config.start_timeout
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), 2.0).close()
      return
    except OSError as e:
      if time.monotonic() > deadline:
        raise OSError(
          f'--coordinator_address={address} does not answer within '
          f'{config.start_timeout} s ({e.strerror or e}); process 0 must run '
          'there. Start it, mend the address, or raise --start_timeout.'
        ) from e
    time.sleep(_RETRY)


def _give_up(config: JobConfig) -> None:
  """Ends a process whose peers do not come."""
  number = config.num_processes or 'expected'
  where = config.coordinator_address or 'the coordinator of this platform'
  print(
    f'error: not all of the {number} processes came to {where} within '
    f'{config.start_timeout} s; start the others with the same command, or '
    'raise --start_timeout.',
    file=sys.__stderr__,
    flush=True,
  )
  os._exit(1)


def _cannot_start(config: JobConfig, error: Exception) -> Exception:
  """What JAX says of a start that failed, as a sentence."""
  text = ' '.join(str(error).split())
  where = config.coordinator_address or 'the coordinator of this platform'
  if 'bind' in text.lower() or 'address already in use' in text.lower():
    return OSError(
      f'{where} cannot be listened at ({text[:120]}); another program may use '
      'the port. Give another --coordinator_address to all processes.'
    )
  return ValueError(
    f'the processes of the job cannot start together at {where} '
    f'({text[:200]}); every process needs the same --coordinator_address and '
    '--num_processes, and a --process_id of its own.'
  )

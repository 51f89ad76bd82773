"""SIGTERM, the notice that this machine will be taken away.

Cloud schedulers send it some seconds before they stop a machine: to one process
of a job or to all, in the middle of anything.

  with preemption.listening(grace_seconds):
    ...                            SIGTERM here raises Preempted
    with preemption.finishing():
      ...                          here it waits for the next `check`
      preemption.check('block 3 is saved')

`check` is a small collective: all processes stop at the same one, whichever of
them was told. What does not come to a check within the grace period is cut off;
a checkpoint is written so that nothing is lost by that but the last step. The
library only listens where an entry point asked it to.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # Not 0: the job is not done.
_MARGIN = 2.0  # Seconds of the grace period that are left for leaving.
_RESUME = 'run the same command again to go on.'


class Preempted(Exception):
  """The job was told to stop, and did."""


class _Notice:
  """What is known of a SIGTERM."""

  def __init__(self, grace_seconds: float, cut_off: Callable[[str], Any]):
    self.given = threading.Event()
    self.finishing = False
    self._grace = grace_seconds
    self._cut_off = cut_off

  def take(self) -> None:
    """Starts the clock; called once, from any thread."""
    if self.given.is_set():
      return
    self.given.set()
    if self.finishing:
      text = f'SIGTERM: stopping when this step is saved, or in {self._grace} s'
      print(text, file=sys.stderr, flush=True)
    clock = threading.Timer(max(0.0, self._grace - _MARGIN), self._late)
    clock.daemon = True
    clock.start()

  def _late(self) -> None:
    self._cut_off(
      f'SIGTERM, and the step was not done within {self._grace} s; it will be '
      f'done again: {_RESUME}'
    )


_notice: _Notice | None = None


@contextlib.contextmanager
def listening(
  grace_seconds: float, cut_off: Callable[[str], Any]
) -> Iterator[None]:
  """Takes SIGTERM while the block runs; in the main thread only.

  Args:
    grace_seconds: between the notice and the end of the machine.
    cut_off: called with a reason, from a thread, shortly before that end; it
      must end the process.
  """
  global _notice
  _notice = notice = _Notice(grace_seconds, cut_off)
  # Python runs handlers when the main thread comes back from what it computes;
  # the byte that it writes here at once is for a thread that does not compute.
  ours, theirs = socket.socketpair()
  ours.setblocking(False)
  before = signal.signal(signal.SIGTERM, _handler)
  wakeup = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
  thread = threading.Thread(target=_read, args=(theirs, notice), daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGTERM, before)
    _notice = None
    ours.close()
    thread.join()
    theirs.close()


@contextlib.contextmanager
def finishing() -> Iterator[None]:
  """A SIGTERM in this block waits for the next `check`."""
  if _notice is None:
    yield
    return
  _notice.finishing = True
  try:
    yield
  finally:
    _notice.finishing = False


def check(done: str) -> None:
  """Stops here if any process of the job was told to.

  Args:
    done: what is safe now, for the message; as in 'block 3 is saved'.

  Raises:
    Preempted: on all processes.
  """
  if _notice is None:
    return
  told = np.int32(_notice.given.is_set())
  if jax.process_count() > 1:
    told = np.max(multihost_utils.process_allgather(told))
  if told:
    raise Preempted(f'stopped by SIGTERM; {done}; {_RESUME}')


def _handler(signum: int, frame: Any) -> None:
  del signum, frame
  if _notice is None:
    os._exit(EXIT_CODE)
  _notice.take()
  if not _notice.finishing:
    raise Preempted(f'stopped by SIGTERM; {_RESUME}')


def _read(pipe: socket.socket, notice: _Notice) -> None:
  """Takes the notice as soon as the signal is there."""
  while numbers := pipe.recv(64):
    if signal.SIGTERM in numbers:
      notice.take()

"""One dead process ends the job: with a reason, everywhere and soon.

A collective waits for every process, so when one is gone the others would hang.
Each process therefore gives signs of life to the job's coordination service,
from a thread of its own:

  alive/I   a number that grows, from process I
  end/I     why process I ends the job
  gone/I    process I has read that, and leaves

Process 0 judges: whose number stands still for `timeout` seconds is dead. Who
reads an `end` leaves at once, whatever its main thread waits for, and process 0
prints the reason. When process 0 itself is gone so is the service, and the
others leave because of that. What was saved before is whole; the same command
goes on from there.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxq.parallel import distributed

_ROOT = 'jaxq/watch/'
_PERIOD = 1.0  # Seconds, for up to 64 processes; of more each speaks less.
_UNREACHABLE = 10.0  # Seconds without an answer of the service.
_RESUME = 'Run the same command again on all hosts to go on.'


class Watch:
  """The thread of one process."""

  def __init__(
    self, timeout: float, end: Callable[[int], Any] = os._exit
  ) -> None:
    """Starts watching.

    Args:
      timeout: seconds without a sign of life after which a process is dead.
      end: ends this process with an exit code, from any thread.
    """
    self._timeout = timeout
    self._end = end
    self._index = jax.process_index()
    self._count = jax.process_count()
    self._host = socket.gethostname()
    self._client = distributed.client()
    self._period = _PERIOD * max(1.0, self._count / 64)
    self._over = threading.Event()
    self._leaving = threading.Lock()
    self._seen: dict[int, tuple[str, float]] = {}
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Stops watching: the job is done."""
    self._over.set()
    self._thread.join()

  def leave(self, label: str, message: str, code: int = 1) -> None:
    """Ends this process, and with it the job; the others say and do the same.

    Args:
      label: 'error', as in 'error: message'.
      message: why.
      code: exit code of all processes.
    """
    self._leaving.acquire()  # For good: only one thread says why.
    if self._index == 0:
      _print(label, message)
    else:
      message = f'{distributed.name(self._index, self._host)}: {message}'
    try:
      end = json.dumps([label, message, code])
      self._set(f'end/{self._index}', end)
      self._set(f'gone/{self._index}', '')
      if self._index == 0:
        self._wait_for_others()
    except jax.errors.JaxRuntimeError:
      if self._index != 0:  # Nobody is left to print it.
        _print(label, message)
    self._end(code)

  def verdict(self) -> None:
    """Waits for the thread to end this process, after a computation failed.

    What JAX says of a peer that is gone is no sentence. Returns if all are
    there: then the failure is this process's own.
    """
    self._over.wait(self._timeout + 5 * self._period)

  def _run(self) -> None:
    beat, answered = 0, time.monotonic()
    while not self._over.wait(self._period):
      beat += 1
      try:
        self._set(f'alive/{self._index}', f'{beat} {self._host}')
        self._follow()
        if self._index == 0:
          self._judge()
        answered = time.monotonic()
      except jax.errors.JaxRuntimeError:
        silent = time.monotonic() - answered
        if not self._over.is_set() and silent > _UNREACHABLE:
          self.leave(
            'error',
            'process 0, which coordinates the job, is gone or cannot be '
            f'reached. {_RESUME}',
          )

  def _follow(self) -> None:
    """Leaves if another process ends the job."""
    ends = self._get('end')
    if not ends:
      return
    self._leaving.acquire()  # Unless this process is about to say why itself.
    label, message, code = json.loads(ends[min(ends)])
    self._set(f'gone/{self._index}', '')
    if self._index == 0:
      _print(label, message)
      self._wait_for_others()
    self._end(code)

  def _judge(self) -> None:
    """Ends the job if a process is dead."""
    now = time.monotonic()
    for i, text in self._get('alive').items():
      if self._seen.get(i, ('', 0.0))[0] != text:
        self._seen[i] = (text, now)
    silent = [
      distributed.name(i, self._seen[i][0].partition(' ')[2] or 'never seen')
      for i in range(1, self._count)
      if now - self._seen.setdefault(i, ('', now))[1] > self._timeout
    ]
    if silent:
      more = f' and {len(silent) - 4} more' if len(silent) > 4 else ''
      self.leave(
        'error',
        f'{", ".join(silent[:4])}{more} gave no sign of life for '
        f'{self._timeout:.0f} s: killed, or its host is gone. {_RESUME}',
      )

  def _wait_for_others(self) -> None:
    """Until everybody alive has read the reason, or had the time to."""
    deadline = time.monotonic() + 4 * self._period
    while time.monotonic() < deadline:
      if len(self._get('gone')) >= self._count:
        return
      time.sleep(self._period / 10)

  def _set(self, key: str, value: str) -> None:
    self._client.key_value_set(_ROOT + key, value, allow_overwrite=True)

  def _get(self, folder: str) -> dict[int, str]:
    """{process: value} of a folder."""
    found = self._client.key_value_dir_get(f'{_ROOT}{folder}/')
    return {
      int(match[1]): value
      for key, value in found
      if (match := re.search(r'/(\d+)$', key))
    }


def _print(label: str, message: str) -> None:
  """A line of its own, on what was stderr when the process started.

  The main thread may have left a progress bar there without an end of line.
  """
  line = f'\n{label}: {" ".join(message.split())}'
  print(line, file=sys.__stderr__, flush=True)

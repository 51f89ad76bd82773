"""Ctrl-C while an entry point is still being imported.

JAX takes seconds to import, and a Ctrl-C in that time would show a traceback of
whatever was being imported. `python -m experiments.NAME` imports the package
`experiments` before all else, so that is where `begin` is called: until the
entry point calls `end`, a Ctrl-C is one line and exit code 1, as it is later.
Whoever imports the package otherwise keeps their own handler.
"""

import os
import signal
import sys
from typing import Any


def begin() -> None:
  """Takes over Ctrl-C if `python -m` is on its way to an entry point."""
  # What the first argument is while Python still looks for the module.
  started = getattr(sys, 'argv', [])[:1] == ['-m']
  # A background job may ignore Ctrl-C: that is left.
  default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
  if started and default:
    signal.signal(signal.SIGINT, _stop)


def end() -> None:
  """Gives it back to Python; from here on it is a KeyboardInterrupt."""
  if signal.getsignal(signal.SIGINT) is _stop:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(signum: int, frame: Any) -> None:
  del signum, frame
  # Nothing was begun, so nothing has to be unwound, nor should it be: modules
  # that are half imported may not expect it.
  text = 'interrupted: stopped by Ctrl-C while starting; nothing was done.\n'
  os.write(2, text.encode())
  os._exit(1)

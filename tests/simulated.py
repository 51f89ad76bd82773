"""Runs a module of tests in a process with simulated devices.

Their number is fixed when JAX starts, so it cannot be set within a test.
"""

import json
import os
import subprocess
import sys
from typing import Any


def rows(module: Any, *arguments: str, devices: int = 8) -> list[Any]:
  """What `python -m module arguments...` prints: a JSON value per line."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  done = subprocess.run(
    [sys.executable, '-m', module.__name__, *arguments],
    env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return [json.loads(line) for line in done.stdout.splitlines()]

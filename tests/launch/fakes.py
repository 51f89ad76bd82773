"""Stands in for the clouds: tools that note how they were called, and jobs."""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping

from launch import job as job_lib
from launch import topology

IMAGE = 'europe-docker.pkg.dev/my-project/images/jaxq:1'
ARGUMENTS = (
  '--model=smollm2-135m',
  '--set=gptq.search=mse',
  '--ignore=re:it\'s|"x y"',
)


def job(where: str = 'v5e:4x4', /, **fields) -> job_lib.Job:
  """A job on a topology; other fields may be given."""
  values = dict(
    name='smollm2-w4',
    arguments=ARGUMENTS,
    topology=topology.parse(where),
    image=IMAGE,
    bucket='gs://my-bucket/runs',
    max_restarts=3,
  )
  return job_lib.Job(**{**values, **fields})


class Tools:
  """A folder of fake tools in front of PATH.

  Every call is a line of `calls`: the tool's name and its arguments.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._bin = folder / 'bin'
    self._bin.mkdir()
    self._log = folder / 'calls'

  def add(self, name: str, body: str = '') -> None:
    """Adds a tool; `body` is bash, run after the call was noted."""
    path = self._bin / name
    path.write_text(
      f'#!/bin/bash\necho {name} "$@" >>"{self._log}"\n'
      f'cd "{self.folder}"\n{body}\n'
    )
    path.chmod(0o755)

  @property
  def calls(self) -> list[str]:
    return self._log.read_text().splitlines() if self._log.exists() else []

  def env(self, **extra: str) -> Mapping[str, str]:
    path = f'{self._bin}:{os.environ["PATH"]}'
    return {**os.environ, 'PATH': path, **extra}

  def bash(self, script: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a script among the tools."""
    path = self.folder / 'script.sh'
    path.write_text(script)
    return subprocess.run(
      ['bash', str(path)],
      env=self.env(**env),
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )


def shellcheck(script: str) -> str | None:
  """What shellcheck has to say of a bash script; None where it is missing."""
  tool = shutil.which(
    'shellcheck',
    path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
  )
  if tool is None:
    return None
  done = subprocess.run(
    [tool, '--shell=bash', '-'],
    input=script,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout + done.stderr

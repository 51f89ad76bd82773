"""Compiles cases of static_schedule and prints what the compiler scheduled.

A process of its own: libtpu takes its flags when it starts. Reads a JSON list
of cases from standard input and prints a JSON line for each, with its counts or
the compiler's words. Dumps go to the folder of the flags and are removed as
read.

K is one block, so that the body is that of a step. There are enough column
blocks that the weight stays in HBM, as a real one does.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
  ahead_of_time,
  attention_schedule,
  schedule_dump,
  token_schedule,
)
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.quantized_matmul import pallas_mosaic_tpu as quantized_tpu
from pallas_kernels.weight_only_matmul import api as weight_only
from pallas_kernels.weight_only_matmul import pallas_mosaic_tpu as weight_tpu

_COLUMN_BLOCKS = 32


def main() -> None:
  """One line for each case."""
  flags = os.environ['LIBTPU_INIT_ARGS']
  match = re.search(r'--xla_jf_dump_to=(\S+)', flags)
  assert match is not None  # static_schedule sets it.
  folder = pathlib.Path(match[1])
  for case in json.load(sys.stdin):
    row = {'name': case['name']}
    try:
      compile_case(case)
      counts = schedule_dump.read(folder, case['op'])
      row |= dataclasses.asdict(counts)
    except Exception as e:  # The table says what a compiler refuses, and why.
      row['error'] = ' '.join(str(e).split())[:300]
    print(json.dumps(row), flush=True)
    for path in folder.iterdir():
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    jax.clear_caches()


def compile_case(case: dict[str, Any]) -> None:
  """Compiles the kernel of a case; the dumps are what is left."""
  if case['op'] == attention_schedule.OP:
    attention_schedule.compile_case(case)
    return
  if case['op'] in token_schedule.OPS:
    token_schedule.compile_case(case)
    return
  fields, M = dict(case['block']), case['M']
  bits, group_size = case['bits'], case['group_size']
  K, N = fields['bk'], _COLUMN_BLOCKS * fields['bn']
  groups = K // group_size if group_size > 0 else 1
  codes: Any = jnp.int8 if bits == 8 and case['symmetric'] else jnp.uint8
  options = {
    'bits': bits,
    'group_size': group_size,
    'implementation': 'pallas_mosaic_tpu',
    'chip': case['chip'],
    'out_dtype': jnp.bfloat16,
  }
  x: Any = ((M, K), jnp.bfloat16)
  f: Any
  if case['op'] == 'weight_only':
    f = functools.partial(
      weight_only.weight_only_matmul,
      block=weight_tpu.Block(bm=-(-M // 16) * 16, **fields),
      **options,
    )
  else:
    g: Any = functools.partial(
      quantized.quantized_matmul,
      block=quantized_tpu.Block(bm=-(-M // 32) * 32, **fields),
      **options,
    )
    if case['x_format'] != 'int8':
      codes = case['x_format']
    f = functools.partial(g, x_format=case['x_format'])
    if not case['dynamic']:
      f = lambda x, q, s, z: g(x, q, s, z, x_scale=jnp.ones((1, 1)))
      x = ((M, K), case['x_format'])
  zero = None if case['symmetric'] else ((groups, N), jnp.uint8)
  weight = ((K * bits // 8, N), codes)
  shapes = [x, weight, ((groups, N), jnp.float32), zero]
  ahead_of_time.compile_for(case['chip'], f, shapes)


if __name__ == '__main__':
  main()

r"""The Hopper kernels: right, and how fast, beside what users have today.

  python -m benchmarks.gpu_kernels --output_dir=docs
  python -m benchmarks.gpu_kernels --output_dir=docs --only=llama3_70b_up
  python -m benchmarks.gpu_kernels --output_dir=docs --render

On a card: every kernel on every arg_spec whose name contains --only is checked
against base.py in float32 and timed, its peers (gpu_peers.py) in the same run.
Times are of the device alone (CUPTI), the median of --iterations; weights
rotate among as many sets as fill the L2 three times; padding, quantization and
sums by XLA count. Beside each stands the floor: the bytes that must move at the
bandwidth that a copy reaches in the same run, or the multiply-adds at the
card's peak, whichever is longer. gpu_kernels.json is written after every
case, so that a run that is cut off keeps what it has; what is stored is
measured again only with --again. benchmarks.md is written at the end.

--render measures nothing: it writes benchmarks.md from gpu_kernels.json, or
says there that nothing was measured yet.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import gpu_peers, gpu_row_cases
from experiments import cli, results
from pallas_kernels import hopper, planar, rows, targets
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.quantized_matmul import arg_specs as quantized_specs
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu as quantized_gpu
from pallas_kernels.weight_only_matmul import api as weight_only
from pallas_kernels.weight_only_matmul import arg_specs as weight_only_specs
from pallas_kernels.weight_only_matmul import (
  pallas_mosaic_gpu as weight_only_gpu,
)

FLAGS = flags.FLAGS
flags.DEFINE_string('output_dir', 'out/gpu_kernels', 'Where to write.')
flags.DEFINE_string('only', '', 'Part of the names of the cases.')
flags.DEFINE_integer('iterations', 20, 'Of a measurement.', lower_bound=1)
flags.DEFINE_bool('again', False, 'Measure cases that are stored, too.')
flags.DEFINE_bool('render', False, 'Write the page and measure nothing.')

KERNEL = 'pallas_mosaic_gpu'
_OURS = (KERNEL, 'fused', 'apart', 'xla', 'float')
MOST_ERROR = 4e-3  # Of bfloat16 outputs, as a ratio of norms.
_L2 = 50e6
_PEAK = {'bfloat16': 989e12, 'int8': 1979e12, 'float8_e4m3fn': 1979e12}
_OPS = {
  'weight_only': 'weight_only_matmul',
  'quantized': 'quantized_matmul',
  'norm': 'norm_quantize',
  'hadamard': 'hadamard_quantize',
}
_HEAD = """# Kernels on a GPU

Written by `python -m benchmarks.gpu_kernels --render`; do not edit.
"""
_NOT_YET = """
**Not measured yet.** The kernels for Hopper have not run on a card in this
form: their tests lower them for CUDA and run them in Pallas's GPU interpreter,
which measures no time. On an H100 or H200,

    python -m benchmarks.gpu_kernels --output_dir=docs

checks every kernel against its base, times it beside its peers, and puts the
table here.
"""
_MEASURED = """
{device}, JAX {jax}, commit {commit}. Device time in microseconds, medians;
inputs random and larger than the L2; padding, quantization and sums by XLA
included. `floor us`: the bytes that must move at the copy bandwidth of the same
run, {bandwidth:.2f} TB/s, or the multiply-adds at the card's peak, whichever is
longer. `of floor`: floor / time. `error`: of the kernel against float32 (of
codes: against those of its base, times scales), as a ratio of norms. Losses are
in the table.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One call to be measured, in all its forms.

  Attributes:
    name: 'weight_only/llama3_8b_up_w4g128_m16'.
    M, K, N: of the product.
    nbytes: what must move.
    kind: dtype of the products: a key of _PEAK.
    draw: key -> the weights of one set, in the forms that `forms` take.
    forms: name -> function of x and a set.
    reference: x and a set -> what `values` makes (M, N) of.
    values: what a form gives -> (M, N), for its error.
    rotated: bytes of a set; 0: all but x and y.
  """

  name: str
  M: int
  K: int
  N: int
  nbytes: int
  kind: str
  draw: Callable[[jax.Array], dict[str, Any]]
  forms: dict[str, Callable[[jax.Array, dict[str, Any]], jax.Array]]
  reference: Callable[[jax.Array, dict[str, Any]], Any]
  values: Callable[[Any], jax.Array] = lambda y: y
  rotated: int = 0

  def floor_us(self, bandwidth: float) -> float:
    """The longer of bytes and multiply-adds."""
    work = 2 * self.M * self.K * self.N / _PEAK[self.kind]
    return 1e6 * max(self.nbytes / bandwidth, work)


def main(argv: Sequence[str]) -> int | None:
  """Measures, or renders."""
  del argv
  folder = pathlib.Path(FLAGS.output_dir)
  path = folder / 'gpu_kernels.json'
  stored = results.load(path) if path.exists() else None
  if FLAGS.render:
    results.write_text(folder / 'benchmarks.md', page(stored))
    return None
  if reason := hopper.why_not(targets.current()):
    print(
      f'gpu_kernels: nothing to measure on: {reason} --render needs no GPU.'
    )
    return 1
  result = measure(path, None if FLAGS.again else stored)
  results.write_text(folder / 'benchmarks.md', page(result))
  print(results.to_markdown(result.rows))
  late = slow_choices(result.rows)
  print('\n'.join(late) or 'no choice is 10 % slower than the best form')
  wrong = [row.name for row in result.rows if not _is_right(row)]
  print('\n'.join(f'wrong: {name}' for name in wrong))
  return int(bool(wrong))


def measure(
  path: pathlib.Path, stored: results.Result | None
) -> results.Result:
  """Every case that is not stored, saved as it goes."""
  found = {row.name: row for row in stored.rows} if stored else {}
  bandwidth = copy_bandwidth()
  metric = results.Metric(name='TB/s', value=bandwidth / 1e12)
  found['copy'] = results.Row(name='copy', metrics=(metric,))
  info = results.run_info(cli.resolved_flags())
  for case in cases(FLAGS.only):
    if case.name not in found:
      found[case.name] = row_of(case, bandwidth)
      print(results.to_markdown([found[case.name]]), flush=True)
    result = results.Result(run=info, rows=tuple(found.values()))
    results.save(path, result)
  return results.Result(run=info, rows=tuple(found.values()))


def row_of(case: Case, bandwidth: float) -> results.Row:
  """Error, floor, and the time of every form; nan where one cannot run."""
  key_x, *keys = jax.random.split(jax.random.key(0), 1 + _sets(case))
  x = jax.random.normal(key_x, (case.M, case.K), jnp.bfloat16)
  sets = [jax.jit(case.draw)(key) for key in keys]
  with jax.default_matmul_precision('highest'):
    want = case.values(case.reference(x, sets[0])).astype(jnp.float32)
  # Where the kernel does not serve, the error is that of the choice.
  ours = KERNEL if KERNEL in case.forms else 'chosen'
  got = case.values(case.forms[ours](x, sets[0])).astype(jnp.float32)
  error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
  del want, got
  floor = case.floor_us(bandwidth)
  times = {
    name: time_us(form, x, sets, FLAGS.iterations)
    for name, form in case.forms.items()
  }
  return results.Row(
    name=case.name,
    metrics=(
      results.Metric(name='error', value=float(error)),
      results.Metric(name='floor us', value=floor),
      results.Metric(name='of floor', value=floor / times[ours]),
      *(results.Metric(name=k, value=v, unit='us') for k, v in times.items()),
    ),
  )


def time_us(
  form: Callable[..., Any], x: jax.Array, sets: Sequence[Any], iterations: int
) -> float:
  """Median device time of one call; nan where the form cannot serve."""
  if isinstance(form, gpu_peers.TorchForm):
    return form.time_us(x, sets, iterations)
  from jax.experimental.mosaic.gpu import profiler

  run = jax.jit(lambda x, sets: [form(x, w) for w in sets])
  try:
    jax.block_until_ready(run(x, sets))
  except (NotImplementedError, jax.errors.JaxRuntimeError) as e:
    print(f'cannot run: {str(e).splitlines()[0]}')
    return float('nan')
  measured: Any = profiler.measure(run, aggregate=False, iterations=iterations)
  _, timings = measured(x, sets)
  per_run = timings if iterations > 1 else [timings]
  totals = [sum(ms for _, ms in kernels) for kernels in per_run]
  return 1e3 * statistics.median(totals) / len(sets)


def copy_bandwidth() -> float:
  """Bytes a second, read and written, of a copy of 1 GiB."""
  x = jax.random.bits(jax.random.key(0), (2**28,), jnp.uint32)
  us = time_us(lambda x, _: x ^ jnp.uint32(1), x, [None], FLAGS.iterations)
  return 2 * x.nbytes / us * 1e6


def slow_choices(rows: Sequence[results.Row]) -> list[str]:
  """Rows whose chosen form is more than 10 % slower than another of ours."""
  late = []
  for row in rows:
    times = {m.name: m.value for m in row.metrics if m.unit == 'us'}
    ours = [times[k] for k in _OURS if k in times]
    best = min((t for t in ours if t == t), default=math.inf)  # Not nan.
    if 'chosen' in times and times['chosen'] > 1.1 * best:
      late.append(
        f'{row.name}: chosen {times["chosen"]:.1f}, best {best:.1f} us'
      )
  return late


def page(result: results.Result | None) -> str:
  """docs/benchmarks.md."""
  if result is None:
    return _HEAD + _NOT_YET
  bandwidth = next(r['TB/s'].value for r in result.rows if r.name == 'copy')
  text = _MEASURED.format(
    device=result.run.device,
    jax=result.run.jax,
    commit=result.run.commit,
    bandwidth=bandwidth,
  )
  parts = [_HEAD, text]
  for op, title in _OPS.items():
    mine = [r for r in result.rows if r.name.startswith(f'{op}/')]
    if mine:
      parts += [f'\n## {title}\n\n', results.to_markdown(mine)]
  return ''.join(parts)


def cases(only: str) -> Iterator[Case]:
  """Cases whose name contains `only`."""
  for spec in weight_only_specs.SPECS.values():
    if spec.bits > 1 and only in f'weight_only/{spec.name}':
      yield weight_only_case(spec)
  for wide in quantized_specs.SPECS.values():
    if only in f'quantized/{wide.name}':
      yield quantized_case(wide)
  for made in gpu_row_cases.cases():
    if only in made['name']:
      yield Case(**made)


def weight_only_case(spec: weight_only_specs.ArgSpec) -> Case:
  """A weight of random codes: stored, packed, and in bfloat16 for a peer."""
  layout = planar.Planar(
    bits=spec.bits,
    K=spec.K,
    group_size=spec.group_size,
    signed=spec.symmetric,
  )
  groups = 1 if spec.group_size < 0 else spec.K // spec.group_size
  call = functools.partial(
    weight_only.weight_only_matmul,
    bits=spec.bits,
    group_size=spec.group_size,
  )

  def draw(key):
    w = _codes_and_scale(key, spec.K * spec.bits // 8, groups, spec.N)
    if spec.bits == 8 and spec.symmetric:
      w['q'] = jax.lax.bitcast_convert_type(w['q'], jnp.int8)
    w['zero'] = None
    if not spec.symmetric:
      drawn = jax.random.randint(key, w['scale'].shape, 0, 2**spec.bits)
      w['zero'] = drawn.astype(jnp.uint8)
    w['packed'] = hopper.pack_words(w['q'], layout)
    w['float'] = jax.random.normal(key, (spec.K, spec.N), jnp.bfloat16)
    return w

  def form(name, packed):
    return lambda x, w: call(
      x,
      w['packed' if packed else 'q'],
      w['scale'],
      w['zero'],
      implementation=name,
    )

  forms: dict[str, Any] = {
    'chosen': form(None, True),
    'xla': form('xla', False),
  }
  if weight_only_gpu.most_rows(spec.bits) >= spec.M:
    forms[KERNEL] = form(KERNEL, True)
  forms['bf16'] = lambda x, w: gpu_peers.bfloat16_matmul(x, w['float'])
  if spec.bits == 4 and spec.group_size > 0 and spec.symmetric:
    forms['torch int4'] = gpu_peers.TorchInt4(
      K=spec.K, N=spec.N, group_size=spec.group_size
    )
  moved = spec.K * spec.N * spec.bits // 8 + groups * spec.N * (
    2 + (not spec.symmetric)
  )
  return Case(
    name=f'weight_only/{spec.name}',
    M=spec.M,
    K=spec.K,
    N=spec.N,
    nbytes=moved + 2 * spec.M * (spec.K + spec.N),
    kind='bfloat16',
    draw=draw,
    forms=forms,
    reference=lambda x, w: call(
      x.astype(jnp.float32),
      w['q'],
      w['scale'],
      w['zero'],
      implementation='xla',
    ),
  )


def quantized_case(spec: quantized_specs.ArgSpec) -> Case:
  """Weights of 8 bits, int8 or fp8, as rows; of 4 bits as words."""
  bits, G = spec.bits, spec.group_size
  layout = planar.Planar(bits=bits, K=spec.K, group_size=G)
  groups = 1 if G < 0 else spec.K // G
  call = functools.partial(
    quantized.quantized_matmul,
    bits=bits,
    group_size=G,
    x_format=spec.x_format,
  )

  def draw(key):
    w = _codes_and_scale(key, spec.K * bits // 8, groups, spec.N)
    drawn = jax.random.normal(key, (spec.K, spec.N), jnp.float32) * 40.0
    if bits == 8:
      w['q'] = rows.encode(drawn, spec.x_format)
      w['packed'] = hopper.pack_rows(w['q'], layout)
    else:
      w['packed'] = hopper.pack_words(w['q'], layout)
    if G < 0:  # For XLA, along K and as wide as it multiplies.
      w['rows'] = hopper.pack_rows(w['q'], layout).reshape(spec.N, spec.K)
    w['float'] = drawn.astype(jnp.bfloat16)
    return w

  def form(name, packed):
    return lambda x, w: call(
      x, w['packed' if packed else 'q'], w['scale'], implementation=name
    )

  def few(x, w, fused):
    block = quantized_gpu.pick_few_block(spec.M, spec.N, layout, fused=fused)
    return call(x, w['packed'], w['scale'], implementation=KERNEL, block=block)

  forms: dict[str, Any] = {'chosen': form(None, True)}
  if G < 0 or spec.M <= quantized_gpu.MOST_ROWS:
    forms[KERNEL] = form(KERNEL, True)
  if spec.M <= quantized_gpu.MOST_ROWS:  # x quantized there, and before.
    forms |= {
      name: functools.partial(few, fused=name == 'fused')
      for name in ('fused', 'apart')
    }
  forms['float'] = form('float', False)
  if G < 0:
    forms['xla chain'] = lambda x, w: gpu_peers.quantized_chain(
      x, w['rows'], w['scale'], spec.x_format
    )
  if bits == 4 and weight_only_gpu.most_rows(bits) >= spec.M:
    forms['weight only'] = lambda x, w: weight_only.weight_only_matmul(
      x, w['packed'], w['scale'], bits=bits, group_size=G
    )
  forms['bf16'] = lambda x, w: gpu_peers.bfloat16_matmul(x, w['float'])
  moved = spec.K * spec.N * bits // 8 + 2 * groups * spec.N
  return Case(
    name=f'quantized/{spec.name}',
    M=spec.M,
    K=spec.K,
    N=spec.N,
    nbytes=moved + 2 * spec.M * (spec.K + spec.N),
    kind='int8' if spec.x_format == 'int4' else spec.x_format,
    draw=draw,
    forms=forms,
    reference=lambda x, w: call(
      x, w['q'], w['scale'], implementation='xla', out_dtype=jnp.float32
    ),
  )


def _codes_and_scale(key, stored_rows, groups, N):
  bits = jax.random.bits(key, (stored_rows, N), jnp.uint8)
  scale = jax.random.uniform(key, (groups, N), minval=1e-3, maxval=2e-2)
  return {'q': bits, 'scale': scale.astype(jnp.bfloat16)}


def _sets(case):
  """Sets of weights that fill the L2 three times; at least three."""
  weight = case.rotated or case.nbytes - 2 * case.M * (case.K + case.N)
  weight = max(weight, 1)
  return max(3, min(48, -(-int(3 * _L2) // weight)))


def _is_right(row):
  return row.name == 'copy' or row['error'].value <= MOST_ERROR


if __name__ == '__main__':
  cli.run(main)

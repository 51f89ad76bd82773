"""Calibrates small models on one device and on a 2 x 4 mesh, and compares.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
    python -m tests.parallel.sharded_calibration HEADS METHOD...

Prints one JSON line per method (see `compare`). A process of its own, since the
number of devices is fixed when JAX starts.

With inputs='float' every block sees the float blocks' outputs: what differs in
block i comes of float rounding within that block, and not of a tie some blocks
below. With inputs='quantized' a tie reaches all blocks above it, and a rounded
activation is a tie of its own kind.
"""

import collections
import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxq.calibrate import driver
from jaxq.nn import blocks, routed_low_rank, taps
from jaxq.numerics import binary, qarray
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import (
  activations,
  awq,
  gptq,
  llm_fp4,
  mergequant,
  os_plus,
  outliertune,
  ptq161,
  quant_experts,
  rotate,
  smoothquant,
)
from jaxq.quant import transform as transform_lib
from models import decoder
from tests.calibrate import testing

W4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=16)
W8 = spec_lib.QuantSpec(dtype='int8', granularity='channel')
A8 = spec_lib.QuantSpec(dtype='int8', granularity='token')
# (H, Hkv): all of a block is sharded; attention is replicated.
HEADS = {'8/4': (8, 4), '9/3': (9, 3)}


# In steps. Hessians agree to 1e-6; with damping 0.01 a factor of them amplifies
# that by no more than a hundred.
TIE = 1e-4
GPTQ_W4 = gptq.GptqConfig(weights=W4)
GPTQ_W8 = gptq.GptqConfig(weights=W8)
MERGEQUANT = mergequant.MergeQuantConfig(weights=W8, inputs=A8, multiple=16)
# name -> transform, the config of the GPTQ in it, what feeds the next block.
METHODS = {
  'gptq': (gptq.gptq(GPTQ_W4), GPTQ_W4, 'float'),
  'gptq_prefix': (gptq.gptq(GPTQ_W4), None, 'quantized'),
  'w8a8': (
    transform_lib.chain(
      smoothquant.smoothquant(smoothquant.SmoothQuantConfig()),
      gptq.gptq(GPTQ_W8),
      activations.activations(activations.ActivationsConfig(inputs=A8)),
    ),
    GPTQ_W8,
    'float',
  ),
  'rotate': (
    transform_lib.chain(
      rotate.rotate(rotate.RotateConfig()), gptq.gptq(GPTQ_W4)
    ),
    GPTQ_W4,
    'float',
  ),
  'os_plus_gptq': (
    transform_lib.chain(
      os_plus.os_plus(
        os_plus.OsPlusConfig(
          weights=W8, inputs=A8, n_grid=10, n_max=10, quantize=False
        )
      ),
      gptq.gptq(GPTQ_W8),
    ),
    GPTQ_W8,
    'float',
  ),
  'outliertune': (
    outliertune.outliertune(
      outliertune.OutlierTuneConfig(weights=W8, inputs=A8)
    ),
    None,
    'float',
  ),
  'mergequant': (
    mergequant.mergequant(MERGEQUANT),
    MERGEQUANT.solver,
    'float',
  ),
  'llm_fp4': (
    llm_fp4.llm_fp4(
      llm_fp4.LlmFp4Config(weights=W8, inputs=A8, rounds=1, n_grid=4)
    ),
    None,
    'float',
  ),
  # One step of its optimizer, on one batch.
  'ptq161': (
    ptq161.ptq161(
      ptq161.PTQ161Config(
        weights=spec_lib.QuantSpec(dtype='binary'),
        epochs=1,
        samples=4,
        batch_size=4,
        scale_dtype='float32',
      )
    ),
    None,
    'quantized',
  ),
  'quant_experts': (
    quant_experts.quant_experts(
      quant_experts.QuantExpertsConfig(
        weights=W4,
        inputs=A8,
        base='gptq',
        shared_rank=4,
        expert_rank=2,
        num_experts=2,
        share=0.1,
        skip_tokens=0,
        sample_sequences=8,
        dtype='float32',  # In bfloat16 a term has ties of its own.
      )
    ),
    gptq.GptqConfig(weights=W4),
    'float',
  ),
  'awq': (
    awq.awq(awq.AwqConfig(weights=W4, grid=5, clip_grid=5)),
    None,
    'float',
  ),
}


def model(heads):
  """A random decoder of two blocks."""
  H, Hkv = HEADS[heads]
  config = decoder.DecoderConfig(
    vocab_size=testing.VOCAB,
    hidden_size=48,
    intermediate_size=128,
    num_layers=2,
    num_heads=H,
    num_kv_heads=Hkv,
    head_dim=16,
  )
  return testing.small_model(config)


class Seen:
  """What the steps of a run were given and returned.

  Attributes:
    shardings: 'step path' -> the PartitionSpecs seen there, as text.
    replicated: whether all statistics were.
    solved: (params, stats) of every stage applied, in order.
    outputs: of the blocks, by float and by quantized ones, in order.
  """

  def __init__(self):
    self.shardings = collections.defaultdict(set)
    self.replicated = True
    self.solved = []
    self.outputs = []

  def note(self, step, tree):
    """Records how the larger arrays of a nested dict lie."""
    for path, leaf in taps.leaves(tree):
      for array in jax.tree.leaves(leaf):
        if array.ndim and isinstance(array.sharding, NamedSharding):
          spec = tuple(array.sharding.spec)
          spec += (None,) * (array.ndim - len(spec))
          self.shardings[f'{step} {path}'].add(str(spec))


def watch(steps):
  """Wraps the functions of `steps`, so that a Seen fills as they run."""
  seen = Seen()

  def forward(run, block, variables, x):
    y, ok = run(block, variables, x)
    seen.note('forward', {'x': x, 'y': y, **variables['params']})
    seen.outputs.append(np.asarray(y))
    return y, ok

  def observe(run, block, variables, x, states):
    states = run(block, variables, x, states)
    seen.note('observe', {'x': x, **variables['params']})
    seen.replicated &= all(
      leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(states)
    )
    return states

  def apply(run, block, params, quant, stats):
    seen.solved.append((params, stats))
    made = run(block, params, quant, stats)
    seen.note('apply', params)
    seen.note('apply', made[0])
    return made

  steps.forward = functools.partial(forward, steps.forward)
  steps.forward_float = functools.partial(forward, steps.forward_float)
  steps.observe = [functools.partial(observe, f) for f in steps.observe]
  steps.apply = [functools.partial(apply, f) for f in steps.apply]
  return seen


def quantized(variables):
  """(path, QArray or BinaryArray) of the kernels of a block."""
  return [
    (path, leaf)
    for path, leaf in taps.leaves(variables['params'])
    if isinstance(leaf, qarray.QArray | binary.BinaryArray)
  ]


def codes(q):
  """Codes (K, N) int32; of a BinaryArray its signs, as bits."""
  if isinstance(q, binary.BinaryArray):
    return np.unpackbits(np.asarray(q.bits)).astype(np.int32)
  return np.asarray(qarray.codes(q)).astype(np.int32)


def distance_from_tie(kernel, hessian, q, config):
  """How far each value was from the boundary between two codes when rounded.

  Args:
    kernel: (K, N) before GPTQ.
    hessian: (K, K) of its input.
    q: what GPTQ made of it.
    config: GptqConfig.

  Returns:
    (K, N) in steps, rows in the order of rounding; and that order (K,).
  """
  fb = gptq.feedback(jnp.asarray(hessian), config)
  order = np.asarray(fb.order)
  w = np.asarray(kernel, np.float64)[order]
  K, groups = len(w), q.scale.shape[0]
  scale = np.repeat(np.asarray(q.scale, np.float64), K // groups, axis=0)[order]
  # Row j is rounded from w_j + sum over earlier rows i of F[i, j] E_i.
  x = w + np.asarray(fb.matrix, np.float64).T @ (w - codes(q)[order] * scale)
  return np.abs(np.abs(x / scale) % 1 - 0.5), order


def ties(opened, a, b, i, solved, config):
  """Counts the columns of block i that differ; [] of those unexplained.

  In such a column the first code to differ, in the order of rounding, must do
  so by one and have been at a tie; the rest made up for another error.

  Args:
    opened: the model.
    a, b: stores of the two runs.
    i: the block.
    solved: (params, stats) of the stage that rounded it in the first run.
    config: GptqConfig.
  """
  touched, unexplained = 0, []
  for path, q in quantized(a.blocks[i]):
    difference = codes(q) - codes(taps.get_path(b.blocks[i]['params'], path))
    columns = np.flatnonzero(np.any(difference, axis=0))
    touched += len(columns)
    if not len(columns):
      continue
    linear = opened.block_at(0).linear(path.removesuffix('/kernel'))
    params, stats = solved
    hessian = stats[linear.tap]['hessian'].mean
    kernel = blocks.kernel_of(params, linear.path)
    far, order = distance_from_tie(kernel, hessian, q, config)
    for n in columns:
      j = np.flatnonzero(difference[order, n])[0]
      if abs(difference[order[j], n]) != 1 or far[j, n] > TIE:
        unexplained.append(f'blocks.{i}.{path} column {n}: {far[j, n]:.1e}')
  return touched, unexplained


def scale_error(a, b):
  """Largest relative difference of steps, over all blocks."""
  worst = 0.0
  for i, block in a.blocks.items():
    for path, q in quantized(block):
      other = taps.get_path(b.blocks[i]['params'], path)
      worst = max(worst, float(np.max(np.abs(other.scale / q.scale - 1))))
  return worst


def logits(opened, store):
  """Of the quantized model on the calibration tokens, on one device."""
  module_config = opened.config_of(store.outside)
  parts = [store.blocks[i] for i in range(opened.num_blocks)]
  variables, runs = decoder.stack(store.outside, parts)
  out, _ = decoder.Decoder(module_config, runs).apply(
    variables, jnp.asarray(testing.tokens())
  )
  return np.asarray(out, np.float64)


def choices(block, variables, x):
  """{path: (experts, codes)} of a block's routed linears.

  experts (B, T): which one each token goes to. codes (B, T, K): its input
  rounded per token.
  """
  tapped = block.tapped(variables, x)
  found = {}
  for path, term in taps.leaves(variables['quant']):
    if not isinstance(term, routed_low_rank.RoutedLowRank):
      continue
    path = path.removesuffix('/low_rank')
    seen = taps.get_path(tapped, f'{path}/in')
    g = routed_low_rank.gates(seen, term.router, term.weight, term.top_k)
    q = qarray.quantize(seen.reshape(-1, seen.shape[-1]), A8)
    codes_ = np.asarray(qarray.codes(q)).reshape(seen.shape)
    found[path] = np.asarray(jnp.argmax(g, axis=-1)), codes_
  return found


def tokens_apart(opened, a, b):
  """Where two quantized models differ on the calibration tokens, and why.

  Both run on one device, each on its own stream.

  Returns:
    counts: {'rerouted', 'tied', 'untouched', 'tokens'}. Rerouted tokens go to
      another expert somewhere, tied ones have a code that is rounded otherwise
      (activations differ in their last bits, and may do so at a tie), untouched
      ones are neither, nor are those that they attend to.
    error: (B, T), relative, of the last block's output.
    untouched: (B, T) bool.
  """
  tokens = jnp.asarray(testing.tokens())
  stores = a, b
  xs = [opened.embed(jax.device_put(s.outside), tokens) for s in stores]
  rerouted, tied = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
  for i in range(opened.num_blocks):
    block, seen = opened.block_at(i), []
    for n, store in enumerate(stores):
      variables = jax.device_put(store.blocks[i])
      seen.append(choices(block, variables, xs[n]))
      xs[n] = block.apply(variables, xs[n])
    for path, (experts, own) in seen[0].items():
      rerouted |= experts != seen[1][path][0]
      tied |= np.any(own != seen[1][path][1], axis=-1)
  untouched = ~np.logical_or.accumulate(rerouted | tied, axis=1)
  x, y = (np.asarray(x, np.float64) for x in xs)
  error = np.linalg.norm(x - y, axis=-1) / np.linalg.norm(x, axis=-1)
  counts = {
    'rerouted': int(rerouted.sum()),
    'tied': int(tied.sum()),
    'untouched': int(untouched.sum()),
    'tokens': tokens.size,
  }
  return counts, error, untouched


def with_a_token_moved(opened, store):
  """A copy of a store whose first router sends a token the other way.

  That whose two best experts are nearest, at the first block's down_proj; with
  it go those that are like it.
  """
  path, block = 'mlp/down_proj', store.blocks[0]
  term = taps.get_path(block['quant'], f'{path}/low_rank')
  x = opened.embed(jax.device_put(store.outside), jnp.asarray(testing.tokens()))
  tapped = opened.block_at(0).tapped(jax.device_put(block), x)
  seen = np.asarray(taps.get_path(tapped, f'{path}/in'), np.float64)
  u = seen / np.linalg.norm(seen, axis=-1, keepdims=True)  # (B, T, K)
  router = np.asarray(term.router, np.float32)
  logits = np.sort(u @ router, axis=-1)
  gap = logits[..., -1] - logits[..., -2]
  where = np.unravel_index(np.argmin(gap), gap.shape)
  last = np.argsort(u[where] @ router)[-2]
  router[:, last] += 1.1 * gap[where] * u[where]
  moved = dataclasses.replace(term, router=router)
  quant = taps.set_path(block['quant'], f'{path}/low_rank', moved)
  copy = testing.MemoryStore()
  copy.outside = store.outside
  copy.blocks = {**store.blocks, 0: {**block, 'quant': quant}}
  return copy


def apart(opened, one, many):
  """Rows for the test, of two runs and of a control (with_a_token_moved)."""
  rows = {}
  control = with_a_token_moved(opened, one)
  for name, other in (('devices', many), ('control', control)):
    counts, error, untouched = tokens_apart(opened, one, other)
    rows[name] = {
      **counts,
      'error': float(np.max(error)),
      'untouched_error': float(np.max(error, where=untouched, initial=0.0)),
    }
  return rows


def perplexity(out):
  """Of next-token prediction from logits (B, T, V)."""
  tokens = testing.tokens()[:, 1:, None]
  logp = np.asarray(jax.nn.log_softmax(out[:, :-1]))
  return float(np.exp(-np.mean(np.take_along_axis(logp, tokens, axis=-1))))


def compare(heads, method):
  """One row of results for the test: plain numbers and strings."""
  mesh = mesh_lib.make_mesh('data:2,model:4')
  opened = model(heads)
  transform, config, inputs = METHODS[method]
  how = driver.CalibrationConfig(batch_size=4, inputs=inputs)
  stores, runs = [], []
  for where in (None, mesh):
    calibrator = driver.Calibrator(opened, transform, how, where)
    runs.append(watch(calibrator.steps))
    stores.append(testing.MemoryStore())
    calibrator.run(testing.tokens(), stores[-1])
  (one, many), seen, solved = stores, runs[1], runs[0].solved
  stages = len(solved) // opened.num_blocks
  num_codes = different = touched = 0
  unexplained = []
  for i in range(opened.num_blocks):
    for path, q in quantized(one.blocks[i]):
      other = taps.get_path(many.blocks[i]['params'], path)
      num_codes += q.shape[0] * q.shape[1]
      different += int(np.sum(codes(q) != codes(other)))
    if config is not None:
      stage = next(
        s
        for s in solved[i * stages : (i + 1) * stages]
        if any('hessian' in named for named in s[1].values())
      )
      found = ties(opened, one, many, i, stage, config)
      touched += found[0]
      unexplained += found[1]
  a, b = logits(opened, one), logits(opened, many)
  return {
    'heads': heads,
    'method': method,
    'codes': num_codes,
    'different': different,
    'columns': touched,
    'unexplained': unexplained,
    'scale_error': scale_error(one, many),
    'output_error': max(
      float(np.linalg.norm(x - y) / np.linalg.norm(x))
      for x, y in zip(runs[0].outputs, seen.outputs, strict=True)
    ),
    'logit_error': float(np.max(np.abs(a - b)) / np.max(np.abs(a))),
    'perplexities': [perplexity(a), perplexity(b)],
    'apart': apart(opened, one, many) if method == 'quant_experts' else None,
    'replicated': seen.replicated,
    'shardings': {k: sorted(v) for k, v in seen.shardings.items()},
  }


def main(argv):
  """Prints a JSON line for each method."""
  for method in argv[2:]:
    print(json.dumps(compare(argv[1], method)), flush=True)


if __name__ == '__main__':
  main(sys.argv)

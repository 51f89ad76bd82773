"""The probe: the untouched model on a few samples, beside the calibration.

  float     y = block(x)                   x of the float model itself
  nearest   block rounded to nearest, x    the same formats, no method
  after     the quantized block            fed as the calibration feeds it

It answers what one asks of a method: what its outputs would be without it, how
far the noise has come through all blocks so far, and which input channels were
outliers before and are after. Nothing of it flows back into the calibration.
The float stream is its own, so that a rotated model is compared with the model
as it was.

Costs four forward passes of a block over two samples (one per part of a batch
on a mesh), and where stages come before the rounding one, the memory of one
more float block.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.calibrate import observers
from jaxq.calibrate import steps as steps_lib
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import binary, formats, fpx, qarray
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import transform as transform_lib

SAMPLES = 2

Params = Mapping[str, Any]
Channels = Mapping[str, tuple[np.ndarray, np.ndarray]]


class ProbedModel(Protocol):
  """What the probe needs of a model (driver.CalibrationModel has it)."""

  def block_at(self, i: int) -> blocks.BlockSpec: ...

  def outside(self) -> Params: ...

  def embed(self, outside: Params, batch: Any) -> blocks.Carry: ...

  def block_params(self, i: int) -> Params: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """What the probe saw at one block.

  Attributes:
    output_sqnr_db: of the block's output, quantized against float as the
      methods before the rounding one left it, both fed the calibration's input.
    rtn_sqnr_db: of the block's output, rounded to nearest against float, both
      fed the float model's activations; None where a kernel is not a QArray
      that rounding makes.
    stream_sqnr_db: of the stream behind the block against the float model's;
      None where the two are not in one basis, or float blocks feed the next.
    channels: {tap: (before, after)}, absmax (K,) float32 of each channel of the
      linears' inputs.
  """

  output_sqnr_db: float
  rtn_sqnr_db: float | None
  stream_sqnr_db: float | None
  channels: Channels


class Probe:
  """Follows a calibration, block by block and in order."""

  def __init__(
    self, model: ProbedModel, steps: steps_lib.Steps, batch_size: int
  ):
    self._model = model
    self._steps = steps
    self._x: Any = None
    self._taken: Any = None
    mesh = steps.mesh
    size = steps.batch_shards
    self._samples = size if size > 1 else min(SAMPLES, batch_size)
    unchanged = transform_lib.Transform._field_defaults['outside']
    self._one_basis = all(s.outside is unchanged for s in steps.stages)
    batch = steps.batch
    whole = None if mesh is None else mesh_lib.replicated(mesh)
    # Of its own, as a rotated embedding may have another structure.
    self._embed = jax.jit(model.embed, out_shardings=batch)
    self._head = jax.jit(
      lambda carry: jax.tree.map(lambda a: a[: self._samples], carry),
      out_shardings=batch,
    )
    # A partial is a function of its own, with a cache of its own.
    self._observe = jax.jit(
      functools.partial(_observe),
      static_argnames='block',
      out_shardings=(batch, whole),
    )
    self._apply = jax.jit(
      functools.partial(_apply), static_argnames='block', out_shardings=batch
    )

  def start(self, outside: Params, data: Any) -> None:
    """Embeds the first samples with the float model.

    Args:
      outside: of the float model, placed.
      data: what `embed` takes, all samples, on the host.
    """
    few = jax.tree.map(lambda a: a[: self._samples], data)
    self._x = self._embed(outside, self._steps.place_batch(few))

  def bridge(self, i: int) -> None:
    """The bridge in front of block i, of the float model."""
    outside = self._steps.place(self._model.outside())
    self._x = self._steps.bridge(i, outside, self._x)

  def take(self, variables: Params) -> None:
    """Keeps the next block's float variables, placed, until it is passed."""
    self._taken = variables

  def skip(self, i: int) -> None:
    """Passes a block that an earlier run quantized."""
    self._x, _ = self._look(self._model.block_at(i), self._float(i), self._x)

  def read(
    self,
    i: int,
    before: Params,
    variables: Params,
    x: blocks.Carry,
    y: blocks.Carry | None,
  ) -> Reading:
    """Passes block i and compares.

    Args:
      i: its index.
      before: {'params', 'quant'} of the block while it was float, placed.
      variables: those of the quantized block.
      x: the first batch in front of the quantized block.
      y: behind it; None where the float block feeds the next one.
    """
    spec = self._model.block_at(i)
    x = self._head(x)
    made, after = self._look(spec, variables, x)
    kept = self._apply(_bare(spec), before, x)
    nearest = dict(self._float(i))
    want, before = self._look(spec, nearest, self._x)
    rtn = stream = None
    formats = _formats(spec, variables['params'])
    if formats:
      nearest['quant'] = _dynamic(variables['quant'])
      for path, kernel_spec in formats.items():
        kernel = blocks.kernel_of(nearest['params'], path)
        kernel = _round(kernel, kernel_spec)
        nearest = taps.set_path(nearest, f'params/{path}/kernel', kernel)
      got = self._apply(_bare(spec), nearest, self._x)
      rtn = float(sqnr(blocks.stream(want), blocks.stream(got)))
    if self._one_basis and y is not None:
      stream = float(sqnr(blocks.stream(want), blocks.stream(self._head(y))))
    self._x = want
    return Reading(
      output_sqnr_db=float(sqnr(blocks.stream(kept), blocks.stream(made))),
      rtn_sqnr_db=rtn,
      stream_sqnr_db=stream,
      channels={tap: (before[tap], after[tap]) for tap in before},
    )

  def _float(self, i: int) -> Any:
    """The float block's variables, which are then let go."""
    taken, self._taken = self._taken, None
    if taken is not None:
      return taken
    return self._steps.place(
      {'params': self._model.block_params(i), 'quant': {}}
    )

  def _look(self, spec, variables, x) -> tuple[blocks.Carry, dict[str, Any]]:
    """The block's output, and absmax at the input of its linears."""
    paths = list(dict.fromkeys(lin.tap for lin in spec.linears))
    spec = _bare(spec)
    requests = {path: {'probe': observers.absmax} for path in paths}
    states = self._steps.place_states(
      steps_lib.initial_states(spec, requests, variables, x)
    )
    y, states = self._observe(spec, variables, x, states)
    seen = {
      path: np.asarray(taps.get_path(states, path)['probe'].absmax)
      for path in paths
    }
    return y, seen


def stored(kernel: Any, marks: Params, K: int) -> tuple[float, jax.Array]:
  """Bits per weight of a quantized kernel, and its values (K, N) float32.

  Low-rank terms beside it count: all of them for the bits, and for the values
  those that every token takes.

  Args:
    kernel: QArray or BinaryArray.
    marks: what the `quant` collection holds at its layer.
    K: channels of the layer's input.
  """
  if isinstance(kernel, binary.BinaryArray):
    return binary.bits_per_weight(kernel), binary.dequantize(kernel)
  bits, w = float(qarray.bits_per_weight(kernel)), qarray.dequantize(kernel)
  bits *= w.shape[0] / K  # Copies of a row are one weight, in more bits.
  if (term := marks.get('low_rank')) is not None:
    bits += 8 * sum(a.nbytes for a in jax.tree.leaves(term)) / (K * w.shape[1])
    w = w + term.product
  if (split := marks.get('split')) is not None:
    w = split.gather(w, K)
  return bits, w


def folded(
  block: blocks.BlockSpec, path: str, before: Params, after: Params
) -> jax.Array:
  """A float kernel (K, N) with the scales folded into the quantized one.

  A method that folds scales and rounds in one go leaves a kernel of other
  numbers, and its layer multiplies them with other inputs: the two can only be
  compared in one scale. What was folded is seen in the norm in front
  (OutlierTune) or in the exponents that are stored with kernels (LLM-FP4).

  Args:
    block: its spec.
    path: of the linear.
    before, after: {'params', 'quant'} of the block, float and quantized.
  """
  kernel = blocks.kernel_of(before['params'], path)
  shift = _shift(after['params'], path)
  if shift is not None:
    kernel = formats.scale_by_exp2(kernel, -shift[:, None])
  for site in block.sites:
    if path in site.consumers and shift is None:
      s = _norm_ratio(before['params'], after['params'], site.producer)
      if s is not None:
        kernel = kernel * site.expand(s)[:, None]
    if path == site.producer:
      for consumer in site.consumers:
        shift_behind = _shift(after['params'], consumer)
        act = taps.get_path(after['quant'], f'{consumer}/input')
        # A quantizer that shifts by itself leaves nothing to the producer.
        if shift_behind is not None and getattr(act, 'shift', None) is None:
          kernel = kernel * site.reduce(formats.exp2(shift_behind))[None]
          break
  return kernel


def _shift(params: Params, path: str) -> jax.Array | None:
  """k (K,) int32 of a kernel whose rows were divided by 2^k; None of others."""
  kernel = blocks.kernel_of(params, path)
  if not isinstance(kernel, fpx.FpxArray) or kernel.row_shift is None:
    return None
  return kernel.row_shift[:, 0].astype(jnp.int32)


def _norm_ratio(before: Params, after: Params, path: str) -> jax.Array | None:
  """What a norm's scale (C,) was divided by; None where it is no norm."""
  old, new = (taps.get_path(tree, f'{path}/scale') for tree in (before, after))
  if old is None or new is None:
    return None
  return jnp.where(new == 0, 1.0, old / jnp.where(new == 0, 1.0, new))


@jax.jit
def sqnr(signal: jax.Array, approximation: jax.Array) -> jax.Array:
  """Signal-to-noise ratio in dB."""
  signal = signal.astype(jnp.float32)
  noise = jnp.sum((signal - approximation.astype(jnp.float32)) ** 2)
  power = jnp.sum(signal**2)
  return 10 * jnp.log10(power / jnp.maximum(noise, 1e-30))


def _observe(
  block: blocks.BlockSpec, variables: Params, x: blocks.Carry, states: Params
) -> tuple[blocks.Carry, Params]:
  return block.observe({**variables, 'taps': states}, x)


def _apply(
  block: blocks.BlockSpec, variables: Params, x: blocks.Carry
) -> blocks.Carry:
  return block.apply(variables, x)


@functools.partial(jax.jit, static_argnames='spec')
def _round(kernel: jax.Array, spec: spec_lib.QuantSpec) -> jax.Array:
  return qarray.fake_quant(kernel, spec)


def _bare(block: blocks.BlockSpec) -> blocks.BlockSpec:
  """Only what computes: blocks of one kind then share compiled functions."""
  return blocks.BlockSpec(
    module=block.module, linears=(), entries=block.entries
  )


def _formats(
  block: blocks.BlockSpec, params: Params
) -> dict[str, spec_lib.QuantSpec]:
  """{path: spec} of the kernels that became QArrays; {} if some are others."""
  found = {}
  for lin in block.linears:
    kernel = blocks.kernel_of(params, lin.path)
    if isinstance(kernel, qarray.QArray):
      found[lin.path] = kernel.spec
    elif not isinstance(kernel, jax.Array):
      return {}
  return found


def _dynamic(quant: Params) -> dict[str, Any]:
  """The input quantizers, each taking its scale from what it meets.

  Static scales fit the inputs that a method made, not the untouched ones.
  """
  made: dict[str, Any] = {}
  for path, leaf in taps.leaves(quant):
    if isinstance(leaf, linear.ActQuant | linear.StepInput | linear.FpxInput):
      spec = leaf.spec
      if not isinstance(leaf, linear.ActQuant):
        spec = dataclasses.replace(spec, granularity='token')
      made = taps.set_path(
        made, path, linear.ActQuant(scale=None, zero_point=None, spec=spec)
      )
  return made

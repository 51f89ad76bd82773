"""LLM-FP4: 4-bit floats whose format, bias and channel shifts are searched for.

Liu et al., 2023, https://arxiv.org/abs/2310.16836.

  fp(x; E, M, b)   jaxq.numerics.fpx: E exponent and M mantissa bits, bias b
  y = sum_j fp(x_j; E_a, M_a, rho + k_j) * fp(W[j, n]; E_w, M_w, b_n)
  k_j = clip(round(b_j), round(rho), round(rho) + 2^E_a - 1) - round(rho),
        b_j the bias whose range is max |x_j|

A bias per channel of x fits its outliers and does not leave the sum over them.
But a whole number k_j on top of one real bias rho does:

  fp(x_j; rho + k_j) = 2^-k_j * fp(2^k_j x_j; rho)

2^k_j goes into the norm or linear before (where there is none, it is added to
the exponents of x at run time), 2^-k_j into the exponents of the stored weights
("pre-shifted exponent bias"), and the matmul sees one bias per tensor.

The search minimizes |y - x W|^2 over a sample, one choice after the other,
`rounds` times: every column's bias for each format of W, rho for each format of
x, the format of W, that of x. Candidates are ranges gamma * max. The error of a
column is a quadratic form of the Gram matrix of x^, so tokens count once:
K^2 N per candidate for W, and T K min(K, N) for x. Cost per tap:
rounds * formats * (n_grid + 2) of each.

rounds=0 is the min-max baseline, preshift=False the searched one without
shifts. Sites whose linears all share an input fold 2^k_j; v -> o only without
grouped heads.

Departures. Linears that read one tensor share its format and rho, so that it is
shifted and rounded once (share_inputs=False: each its own, shifted at run
time). Candidates multiply the range, and the initial one is among them; every
choice is made beside the latest of all others: no step is for the worse.
reference_search=True is the authors' code: candidates multiply the bias, which
goes astray where that is near 0, without the initial one and the last of the
grid; and what the first round finds is not seen before its formats are chosen,
so that a round can be for the worse. (There, 2^-M of the quantizer is a power
of integers, 0: ranges are larger than the format's. Not here.) Inputs are those
behind quantized blocks; --inputs=float is the paper's. The metric is the
squared error only. The embedding and the head are left float unless embed_bits
says otherwise; they are then rounded by their own error and stored as floats,
and the head's input stays float.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.calibrate import observers
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import formats, fpx
from jaxq.numerics import spec as spec_lib
from jaxq.quant import equivalence, fp_search, preconditions, transform

Params = Mapping[str, Any]
_MAX_EXP_BITS = 6  # 2^(2^7) is beyond float32.
_ENTRIES = ('hadamard', 'permute', 'split')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmFp4Config:
  """Attributes, with the paper's values as defaults.

  weights, inputs: their bits count, 3 to 8, and nothing else.
  weight_format, input_format: 'search', or a name such as 'e2m1'.
  preshift: whether channels of the inputs are shifted.
  rounds: of the search; 0 takes e2 formats and ranges of max |x|.
  n_grid: ranges per slice, from gamma_low to gamma_high times the largest.
  reference_search: candidates and order of the authors' code.
  share_inputs: linears that read one tensor quantize it once.
  sample_sequences: calibration sequences that the search sees.
  weight: 'search', or 'none' for a method that follows in the chain: kernels
    stay float, and shifts are taken back at run time.
  embed_bits: of the embedding and the head; 0 leaves them float.
  """

  weights: spec_lib.QuantSpec
  inputs: spec_lib.QuantSpec
  weight_format: str = 'search'
  input_format: str = 'search'
  preshift: bool = True
  rounds: int = 3
  n_grid: int = 100
  gamma_low: float = 0.01
  gamma_high: float = 1.2
  reference_search: bool = False
  share_inputs: bool = True
  sample_sequences: int = 32
  weight: str = 'search'
  embed_bits: int = 0

  def __post_init__(self):
    for name in ('weights', 'inputs'):
      spec = getattr(self, name)
      if not 3 <= spec.bits <= 8 or spec.is_block_format:
        raise ValueError(
          f'LlmFp4Config: {name} are {spec.dtype}; allowed 3 to 8 bits, no '
          'block format. Choose a scheme such as W4A4.'
        )
      if not spec.symmetric:
        raise ValueError(
          f'LlmFp4Config: {name} have a zero point and floats have none; '
          'allowed symmetric=True. Leave out _ASYM, --nosymmetric and '
          '--noinput_symmetric.'
        )
    if self.weights.granularity != 'channel':
      raise ValueError(
        f'LlmFp4Config: weights have one scale per {self.weights.granularity}; '
        "allowed 'channel', one bias per column. Give --group_size=-1."
      )
    if self.weight not in ('none', 'search'):
      raise ValueError(
        f'LlmFp4Config: weight={self.weight!r}; allowed '
        "['none', 'search']. Use one of them."
      )
    for name, least in (('rounds', 0), ('n_grid', 1), ('sample_sequences', 1)):
      if getattr(self, name) < least:
        raise ValueError(
          f'LlmFp4Config: {name}={getattr(self, name)}; allowed {least} or '
          f'more. Use {LlmFp4Config.__dataclass_fields__[name].default}.'
        )
    if not 0 < self.gamma_low < self.gamma_high:
      raise ValueError(
        f'LlmFp4Config: gamma_low={self.gamma_low}, gamma_high='
        f'{self.gamma_high}; it must be 0 < gamma_low < gamma_high. Use 0.01 '
        'and 1.2.'
      )
    if self.embed_bits and not 3 <= self.embed_bits <= 8:
      raise ValueError(
        f'LlmFp4Config: embed_bits={self.embed_bits}; allowed 0 (float) and 3 '
        'to 8. Use 4.'
      )
    _ = self.weight_mans, self.input_mans  # Each checks its own.

  @property
  def weight_mans(self) -> tuple[int, ...]:
    """Mantissa bits of the weight's formats, the one to begin with first."""
    return _mans('weight_format', self.weight_format, self.weights.bits)

  @property
  def input_mans(self) -> tuple[int, ...]:
    """The same of the inputs."""
    return _mans('input_format', self.input_format, self.inputs.bits)

  @property
  def gammas(self) -> np.ndarray:
    """Candidates, float32; but for the reference's, the initial one first."""
    steps = np.arange(self.n_grid + (not self.reference_search))
    span = self.gamma_high - self.gamma_low
    grid = self.gamma_low + steps * span / self.n_grid
    first = [] if self.reference_search else [1.0]
    return np.concatenate([first, grid]).astype(np.float32)


def llm_fp4(config: LlmFp4Config) -> transform.Transform:
  """The method: one stage."""
  made = transform.Transform(
    name='llm_fp4',
    apply=functools.partial(_apply, config),
    observe=functools.partial(_observe, config),
    failure=failure,
  )
  if config.embed_bits:
    made = made._replace(outside=functools.partial(_outside, config))
  return made


def failure(name: str) -> str:
  """The error message where a result is NaN."""
  return (
    f'llm_fp4: the output error of {name} is not finite for any format; its '
    'inputs and weights must be finite and below 1e18. Look for NaN, Inf or '
    'huge values in the calibration data and the weights.'
  )


def _observe(config, block) -> transform.Requests:
  sample = observers.sample(config.sample_sequences)
  request = {'sample': sample, 'absmax': observers.absmax}
  return {lin.tap: request for lin in block.linears}


def _apply(config, block, params, quant, stats):
  paths = [lin.path for lin in block.linears]
  preconditions.require_float(params, paths, 'llm_fp4')
  preconditions.require_dynamic_inputs(quant, paths, 'llm_fp4')
  kernels = {path: blocks.kernel_of(params, path) for path in paths}
  groups = _groups(config, block)
  found: dict[str, tuple[fp_search.LayerParams, int]] = {}
  for tap, members in groups:
    x, absmax = _statistics(stats, tap)
    together = [kernels[path] for path in members]
    made = fp_search.search_layer(x, together, absmax, config)
    found |= {path: (made, n) for n, path in enumerate(members)}
  folded: set[str] = set()
  columns: dict[str, jax.Array] = {}
  for site in block.sites:
    if not _folds(config, block, site, groups, quant):
      continue
    first = next(path for path in site.consumers if path in found)
    shift = found[first][0].shift
    touched = (site.producer, *site.consumers)
    others = [path for path in touched if path not in found]
    preconditions.require_float(params, others, 'llm_fp4')
    preconditions.require_dynamic_inputs(quant, others, 'llm_fp4')
    s = site.reduce(formats.exp2(-shift))  # Powers of two: exact.
    params = equivalence.divide_producer(params, site, s)
    columns[site.producer] = (1 / s)[None]
    folded |= set(site.consumers)
  for path, (made, n) in found.items():
    act = _input(config, made, path in folded)
    quant = taps.set_path(quant, f'{path}/input', act)
    kernel: Any = kernels[path]
    scale = made.weight_scales[n]
    if config.weight == 'none':
      kernel = jnp.where(jnp.isfinite(scale), kernel, jnp.nan)
    else:
      q = fpx.quantize(
        kernel,
        scale,
        made.weight_mans[n],
        config.weights.bits,
        made.shift if config.preshift else None,
      )
      # Those of the channels behind: 2^k of a column is in its scale.
      kernel = dataclasses.replace(q, scale=scale * columns.get(path, 1.0))
    params = taps.set_path(params, f'{path}/kernel', kernel)
  return params, quant


def _input(
  config, made: fp_search.LayerParams, folded: bool
) -> linear.FpxInput:
  """The input quantizer; a folded one has nothing to shift."""
  shifts = config.preshift and not folded
  return linear.FpxInput(
    scale=made.input_scale.reshape(1, 1),
    man_bits=made.input_man.astype(jnp.int8).reshape(1, 1),
    shift=made.shift.astype(jnp.int8) if shifts else None,
    spec=fpx.spec(config.inputs.bits, 'tensor'),
    restore=shifts and config.weight == 'none',
  )


def _groups(config, block) -> list[tuple[str, list[str]]]:
  """(tap, linears that quantize what passes it together)."""
  if not config.share_inputs:
    return [(lin.tap, [lin.path]) for lin in block.linears]
  by_tap: dict[str, list[str]] = {}
  for lin in block.linears:
    by_tap.setdefault(lin.tap, []).append(lin.path)
  return list(by_tap.items())


def _folds(config, block, site, groups, quant) -> bool:
  """Whether the producer of a site can take the shifts of its consumers.

  Grouped heads would need one shift for several channels; what turns or
  gathers channels, or quantizes the producer's output, is in the way.
  """
  if not config.preshift or config.weight == 'none':
    return False
  if site.heads is not None and site.heads[1] != 1:
    return False
  fed = {path for path in site.consumers if block.linear(path) is not None}
  if not any(fed and fed <= set(members) for _, members in groups):
    return False
  between = [f'{path}/{name}' for path in site.consumers for name in _ENTRIES]
  between.append(f'{site.producer}/output')
  return all(taps.get_path(quant, path) is None for path in between)


def _statistics(stats, tap: str) -> tuple[jax.Array, jax.Array]:
  """x (T, K), absmax (K,).

  Raises:
    ValueError: they were not taken.
  """
  found = stats.get(tap, {})
  if not {'sample', 'absmax'} <= set(found):
    raise ValueError(
      f'llm_fp4: no sample was observed at {tap} (observed {sorted(stats)}); '
      'the search needs one. Calibrate with the same block.linears.'
    )
  x = found['sample'].x
  return x.reshape(-1, x.shape[-1]), found['absmax'].absmax


def _outside(config, params):
  """Embedding and head rounded."""
  table = taps.get_path(params, 'embed/embedding')
  if table is None:
    raise ValueError(
      f'llm_fp4: embed_bits={config.embed_bits} and the model has no token '
      f'embedding (it has {sorted(params)}); allowed 0 there. Use embed_bits=0.'
    )
  bits = config.embed_bits
  mans = _mans('embed_bits', 'search', bits)
  rounded = fp_search.round_table(table, mans, bits, config)
  params = taps.set_path(params, 'embed/embedding', rounded)
  head = taps.get_path(params, 'head/kernel')
  if head is not None:
    rounded = fp_search.round_table(head.T, mans, bits, config).T
    params = taps.set_path(params, 'head/kernel', rounded)
  return params


def _mans(field: str, name: str, bits: int) -> tuple[int, ...]:
  """Mantissa bits of the formats that `name` stands for.

  Raises:
    ValueError: there is no such format.
  """
  least = max(0, bits - 1 - _MAX_EXP_BITS) if bits < 8 else 2
  if name == 'search':
    start = bits - 3  # e2.
    return (start, *(m for m in range(least, bits - 1) if m != start))
  match = re.fullmatch(r'e(\d+)m(\d+)', name)
  exp_bits, man_bits = map(int, match.groups()) if match else (0, 0)
  if not 1 <= exp_bits <= _MAX_EXP_BITS or 1 + exp_bits + man_bits != bits:
    allowed = [f'e{bits - 1 - m}m{m}' for m in range(bits - 2, least - 1, -1)]
    raise ValueError(
      f'LlmFp4Config: {field}={name!r} at {bits} bits; 1 + exponent + mantissa '
      f'bits must be {bits}. Use "search" or one of {allowed}.'
    )
  return (man_bits,)

"""PTQ1.61: signs for most input channels, 4 bits for the few that matter.

Zhao et al., ACL 2025, https://arxiv.org/abs/2502.13179.

  S = the 20 % of input channels with the largest max |x_j|     one bit each
  W^[j, n] = s_n (round(W[j, n] / s_n + z_n) - z_n)                     j in S
           = r1_n r2_j (alpha_n sign(W[j, n] - mu_n) + mu_n)         otherwise

An error dW reaches the output as sum_j |x_j| |dW_j|: what stands behind large
inputs is worth bits, and a mask of whole channels costs next to none. With mu
and alpha the means of W and |W| over the binary rows, alpha, r1 and r2 are then
learned block by block (signs stay):

  Y = F^(x^),  Y1 = F(x),  Y2 = F(x^)       x, x^: float and quantized streams
  loss = sum_i mean (Y - Yi)^2 - log |mean_tokens cos(Y, Yi)|

1.62 bits a weight at 4096 x 4096, to the last scale (numerics.binary). Cost:
`epochs` forward and backward passes of each block over `samples` sequences.

The paper's preprocessing, which moves the weights themselves before all this,
is jaxq.quant.restorative_lora.

Departures. k of S is rounded to a multiple of 8, so that bytes fill; exactly k
are taken, the reference takes those at its threshold as well, k + 1 or more.
|x_j| is of the inputs behind quantized blocks, the reference's of the float
model (--inputs=float, which trains on that stream, too). |mean cos| is at least
1e-3 in the logarithm, which a small model's block can drive to -inf. sign(0) =
1. Everything is float32; the reference trains in float16 with scaled losses. r2
is stored with mean 1, alpha and mu with r1. A calibration that diverges names
the block and not the epoch, which `optimize_block` names outside jit.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxq.calibrate import observers
from jaxq.nn import blocks, taps
from jaxq.numerics import binary, qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import preconditions, transform

Params = Mapping[str, Any]
_CHOICES = {
  'alpha_init': ('absolute', 'centered'),
  'mask': ('absmax', 'random'),
  'scale_dtype': spec_lib.SCALE_DTYPES,
}
# field: (least, largest), both allowed.
_RANGES = {
  'salient_bits': (2, 8),
  'mask_shards': (1, 1 << 20),
  'epochs': (0, 1 << 20),
  'samples': (1, 1 << 20),
  'batch_size': (1, 1 << 20),
  'lr_alpha': (0.0, 1.0),
  'lr_r': (0.0, 1.0),
}
_LEAST_COSINE = 1e-3
_TINY = 1e-24


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTQ161Config:
  """What becomes of a block's kernels.

  Attributes:
    weights: 'binary' per channel, as in W1A16 with group_size=-1.
    salient_ratio: share of the input channels at salient_bits; in [0, 1).
    salient_bits: 2..8, asymmetric, one scale per output channel.
    mask: 'absmax' of the inputs, or 'random' channels, a control.
    mask_shards: the channels are chosen in each of that many parts of K by
      itself, so that a kernel sharded over its rows keeps its parts whole.
    alpha_init: alpha is mean |W| ('absolute', the paper's) or mean |W - mu|
      ('centered', the best scale for signs of W - mu).
    epochs: over the sequences; 0 keeps the means.
    samples: how many of the calibration sequences it is learned on.
    batch_size: of them in one step; must divide them.
    lr_alpha, lr_r: learning rates of alpha, and of r1 and r2. The paper takes
      9e-5 and 9e-3 for OPT and Llama-2.
    scale_dtype: of all that is stored in float.
  """

  weights: spec_lib.QuantSpec
  salient_ratio: float = 0.2
  salient_bits: int = 4
  mask: str = 'absmax'
  mask_shards: int = 1
  alpha_init: str = 'absolute'
  epochs: int = 20
  samples: int = 128
  batch_size: int = 1
  lr_alpha: float = 5e-4
  lr_r: float = 1e-3
  scale_dtype: str = 'float16'

  def __post_init__(self):
    if self.weights.dtype != 'binary' or self.weights.granularity != 'channel':
      raise ValueError(
        f'PTQ161Config: weights are {self.weights.dtype} per '
        f'{self.weights.granularity}; allowed binary per channel. Choose '
        '--scheme=W1A16 --group_size=-1.'
      )
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'PTQ161Config: {name}={getattr(self, name)!r}; allowed '
          f'{list(allowed)}. Use one of them.'
        )
    for name, (least, largest) in _RANGES.items():
      if not least <= getattr(self, name) <= largest:
        raise ValueError(
          f'PTQ161Config: {name}={getattr(self, name)}; allowed {least} to '
          f'{largest}. The default is '
          f'{PTQ161Config.__dataclass_fields__[name].default}.'
        )
    check_ratio(self.salient_ratio)

  @property
  def salient(self) -> spec_lib.QuantSpec:
    """How the salient channels are rounded."""
    return spec_lib.QuantSpec(
      dtype=f'int{self.salient_bits}',
      granularity='channel',
      symmetric=False,
      scale_dtype=self.scale_dtype,
    )


class Frozen(NamedTuple):
  """What is not learned of a kernel (K, N).

  mask: (K,) bool, the salient channels.
  positive: (K, N) bool, the signs.
  mu: (N,).
  salient: (K, N), every row as it is at salient_bits.
  """

  mask: jax.Array
  positive: jax.Array
  mu: jax.Array
  salient: jax.Array


class Learned(NamedTuple):
  """What is: alpha (N,), r1 (N,), r2 (K,)."""

  alpha: jax.Array
  r1: jax.Array
  r2: jax.Array


def check_ratio(ratio: float) -> None:
  """Raises ValueError unless ratio is in [0, 1)."""
  if not 0 <= ratio < 1:
    raise ValueError(
      f'ptq161: salient_ratio={ratio}; allowed 0 <= salient_ratio < 1. Use 0.2.'
    )


def salient_count(K: int, ratio: float, shards: int = 1) -> int:
  """k: the multiple of 8 next to ratio * K, in each of `shards` parts of K.

  Raises:
    ValueError: ratio outside [0, 1), or K that does not fill whole bytes.
  """
  check_ratio(ratio)
  if K % (8 * shards):
    raise ValueError(
      f'ptq161: K={K} input channels in {shards} parts; each part must be a '
      'multiple of 8, so that signs fill whole bytes. Leave this linear float '
      'with --ignore, or lower mask_shards.'
    )
  part = K // shards
  return shards * min(8 * round(ratio * part / 8), part - 8)


def structured_mask(
  absmax: jax.Array, ratio: float, shards: int = 1
) -> jax.Array:
  """(K,) bool: the salient_count(K, ratio) channels of the largest absmax.

  Args:
    absmax: (K,); of equals the first are taken.
    ratio: static.
    shards: static; the same number of each part of K.

  Raises:
    As salient_count.
  """
  K = absmax.shape[0]
  k = salient_count(K, ratio, shards) // shards
  _, chosen = lax.top_k(absmax.reshape(shards, K // shards), k)
  rows = jnp.arange(shards)[:, None]
  mask = jnp.zeros((shards, K // shards), bool).at[rows, chosen].set(True)
  return mask.reshape(K)


def init_binary(
  w: jax.Array, mask: jax.Array, config: PTQ161Config
) -> tuple[Frozen, Learned]:
  """The start: means over the rows that become signs.

  Args:
    w: (K, N) float32.
    mask: (K,) bool.
    config: static.

  Raises:
    ValueError: mask does not fit w.
  """
  K, N = w.shape
  if mask.shape != (K,):
    raise ValueError(
      f'ptq161: a mask of {mask.shape} for a kernel of {w.shape}; it must '
      f'have K={K} channels. Take it from this layer.'
    )
  counted = (~mask[:, None] & (w != 0)).astype(jnp.float32)
  count = jnp.maximum(jnp.sum(counted, axis=0), 1.0)  # (N,)
  mu = jnp.sum(w * counted, axis=0) / count
  centre = mu[None] if config.alpha_init == 'centered' else jnp.zeros((1, N))
  alpha = jnp.sum(jnp.abs(w - centre) * counted, axis=0) / count
  salient = qarray.fake_quant(w, config.salient)
  frozen = Frozen(mask, w - mu[None] >= 0, mu, salient)
  return frozen, Learned(alpha, jnp.ones(N), jnp.ones(K))


def binary_dequant(frozen: Frozen, learned: Learned) -> jax.Array:
  """W^ (K, N) float32; differentiable in `learned`."""
  alpha, mu = learned.alpha[None], frozen.mu[None]
  signs = jnp.where(frozen.positive, alpha + mu, mu - alpha)
  rows = learned.r1[None] * learned.r2[:, None] * signs
  return jnp.where(frozen.mask[:, None], frozen.salient, rows)


def export(
  w: jax.Array, frozen: Frozen, learned: Learned, config: PTQ161Config
) -> binary.BinaryArray:
  """The packed kernel; its values are those of binary_dequant, rounded.

  Args:
    w: (K, N) float32, as init_binary had it.
    frozen, learned: of it.
    config: static.
  """
  K = w.shape[0]
  k = salient_count(K, config.salient_ratio, config.mask_shards)
  order = jnp.argsort(~frozen.mask, stable=True)  # The salient ones first.
  scale, zero = qarray.find_params(w, config.salient)
  assert zero is not None
  codes = qarray.encode(w[order[:k]], scale, zero, config.salient)
  rest = order[k:]
  r2 = learned.r2[rest]
  mean = jnp.mean(r2)
  mean = jnp.where(jnp.abs(mean) > 1e-3, mean, 1.0)
  stored = lambda a: a.astype(config.scale_dtype)
  return binary.pack(
    frozen.positive[rest],
    stored(learned.r1 * learned.alpha * mean)[None],
    stored(learned.r1 * frozen.mu * mean)[None],
    stored(r2 / mean)[:, None],
    order,
    codes,
    stored(scale),
    zero,
    config.salient_bits,
  )


def block_loss(y: jax.Array, *targets: jax.Array) -> jax.Array:
  """sum_i mean (y - y_i)^2 - log |mean_tokens cos(y, y_i)|; all (B, T, C)."""
  y = y.astype(jnp.float32)

  def inverse_norm(a):  # 0 for tokens of zeros; 1 / |a| has no gradient there.
    squared = jnp.sum(jnp.square(a), axis=-1)
    inverse = lax.rsqrt(jnp.maximum(squared, _TINY))
    return jnp.where(squared > _TINY, inverse, 0.0)

  loss = jnp.float32(0)
  for target in targets:
    target = target.astype(jnp.float32)
    squared = jnp.mean(jnp.square(y - target))
    cosine = jnp.sum(y * target, axis=-1)
    cosine *= inverse_norm(y) * inverse_norm(target)
    mean = jnp.maximum(jnp.abs(jnp.mean(cosine)), _LEAST_COSINE)
    loss += squared - jnp.log(mean)
  return loss


def optimize_block(
  run: Callable[[Mapping[str, jax.Array], Any], jax.Array],
  kernels: Mapping[str, jax.Array],
  frozen: Mapping[str, Frozen],
  learned: Mapping[str, Learned],
  streams: Mapping[str, Any],
  config: PTQ161Config,
) -> tuple[dict[str, Learned], jax.Array]:
  """Learns the scales of a block.

  Args:
    run: ({path: kernel}, carry) -> the block's output (B, T, C).
    kernels: {path: (K, N)} float, of the targets.
    frozen, learned: {path: ...}, from init_binary.
    streams: {'quantized', 'float'}: carries in front of the block, (S, ...).
    config: static.

  Returns:
    What was learned, and the mean loss of each epoch (epochs,). Where a loss is
    not finite, what was learned is that of the epoch before, and what follows
    is NaN.

  Raises:
    ValueError: batch_size does not divide the samples; outside jit, a loss that
      is not finite.
  """
  size = min(config.samples, jax.tree.leaves(streams['float'])[0].shape[0])
  if size % config.batch_size:
    raise ValueError(
      f'ptq161: {size} samples do not make whole batches of batch_size='
      f'{config.batch_size}; choose one that divides {size}.'
    )
  steps = size // config.batch_size
  start: Any = dict(learned)
  if not config.epochs:
    return start, jnp.zeros(0)

  def batch(tree, i):
    return jax.tree.map(
      lambda a: lax.dynamic_slice_in_dim(
        a, i * config.batch_size, config.batch_size
      ),
      tree,
    )

  def targets(i):
    exact = {name: run(kernels, batch(streams[name], i)) for name in streams}
    return exact['float'], exact['quantized']

  indices = jnp.arange(steps)
  wanted = lax.map(targets, indices)

  def loss(learned, i):
    made = {
      path: binary_dequant(frozen[path], learned[path]) for path in frozen
    }
    y = run(made, batch(streams['quantized'], i))
    return block_loss(y, *(target[i] for target in wanted))

  rates = {'alpha': optax.adam(config.lr_alpha), 'r': optax.adam(config.lr_r)}
  labels: Any = {  # Names in the place of arrays.
    path: Learned._make(('alpha', 'r', 'r')) for path in start
  }
  optimizer = optax.multi_transform(rates, labels)

  def step(carry, i):
    learned, state = carry
    value, gradient = jax.value_and_grad(loss)(learned, i)
    with jax.numpy_dtype_promotion('standard'):  # Its powers need that.
      updates, state = optimizer.update(gradient, state, learned)
    return (optax.apply_updates(learned, updates), state), value

  def epoch(carry, _):
    learned, state, sound = carry

    def go_on():
      (new, after), values = lax.scan(step, (learned, state), indices)
      return new, after, jnp.mean(values)

    new, after, value = lax.cond(
      sound, go_on, lambda: (learned, state, jnp.float32(jnp.nan))
    )
    finite = [jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(new)]
    sound = sound & jnp.isfinite(value) & jnp.all(jnp.stack(finite))
    keep = functools.partial(jnp.where, sound)
    return (
      jax.tree.map(keep, new, learned),
      jax.tree.map(keep, after, state),
      sound,
    ), jnp.where(sound, value, jnp.nan)

  first = (start, optimizer.init(start), jnp.bool_(True))
  (done, _, _), losses = lax.scan(epoch, first, length=config.epochs)
  if not isinstance(losses, jax.core.Tracer):
    check_losses('the block', losses)
  return done, losses


def check_losses(where: str, losses: jax.Array) -> None:
  """Raises ValueError naming the first epoch whose loss is not finite."""
  bad = ~jnp.isfinite(losses)
  if bool(jnp.any(bad)):
    raise ValueError(
      f'ptq161: the loss of {where} became NaN or Inf in epoch '
      f'{int(jnp.argmax(bad))} of {losses.shape[0]}; learning rates must be '
      'small enough to stay finite. Lower lr_alpha and lr_r, or epochs to '
      'that number.'
    )


def ptq161(config: PTQ161Config) -> transform.Transform:
  """The method."""
  return transform.Transform(
    name='ptq161',
    apply=functools.partial(_apply, config),
    observe=functools.partial(_observe, config),
    failure=failure,
    check=check_inputs,
    streams=True,
  )


def failure(name: str) -> str:
  """The error message where a kernel's scales are NaN."""
  return (
    f'ptq161: the loss of the block of {name} became NaN or Inf while its '
    'scales were learned; learning rates must be small enough to stay finite. '
    'Lower lr_alpha and lr_r, or epochs; finished blocks are kept.'
  )


def check_inputs(where: str, stats: transform.Stats) -> None:
  """Refuses inputs that are zero in all channels: there is nothing to choose.

  Raises:
    ValueError: there are such.
  """
  for tap, named in stats.items():
    if 'absmax' in named and not bool(jnp.any(named['absmax'].absmax > 0)):
      raise ValueError(
        f'ptq161: all inputs at {where}/{tap} are zero on the calibration '
        'data; salient channels must have some. Calibrate with real text, or '
        'leave these linears out with --ignore.'
      )


def _observe(config, block) -> transform.Requests:
  del config
  return {lin.tap: {'absmax': observers.absmax} for lin in block.linears}


def _apply(config, block, params, quant, stats):
  paths = [lin.path for lin in block.linears]
  preconditions.require_float(params, paths, 'ptq161')
  kernels: dict[str, jax.Array] = {}
  frozen: dict[str, Frozen] = {}
  learned: dict[str, Learned] = {}
  for lin in block.linears:
    w = blocks.kernel_of(params, lin.path).astype(jnp.float32)
    score = stats[lin.tap]['absmax'].absmax
    if config.mask == 'random':
      score = jax.random.uniform(jax.random.key(0), score.shape)
    mask = structured_mask(score, config.salient_ratio, config.mask_shards)
    kernels[lin.path] = w
    frozen[lin.path], learned[lin.path] = init_binary(w, mask, config)

  def run(kernels, carry):
    changed = params
    for path, w in kernels.items():
      changed = taps.set_path(changed, f'{path}/kernel', w)
    return blocks.stream(
      block.apply({'params': changed, 'quant': quant}, carry)
    )

  if paths:
    streams = stats[transform.STREAMS]
    learned, losses = optimize_block(
      run, kernels, frozen, learned, streams, config
    )
    sound = jnp.all(jnp.isfinite(losses))
    learned = jax.tree.map(lambda a: jnp.where(sound, a, jnp.nan), learned)
  for path, w in kernels.items():
    q = export(w, frozen[path], learned[path], config)
    params = taps.set_path(params, f'{path}/kernel', q)
  return params, quant

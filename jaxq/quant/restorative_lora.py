"""Restorative LoRA: fine-tuning that makes weights easier to binarize.

The preprocessing of PTQ1.61 (arXiv 2502.13179), of the whole model:

  1  quantize                                W^
  2  train A, B on text, W^ frozen           loss(W^ + alpha / r A B)
  3  merge                                   W_pre = W^ + alpha / r A B
  4  quantize again, starting from W_pre     it is now the float model

W_pre's rows gather around the few values of W^, from which the second rounding
moves them less. This is training, on 20000 sequences in the paper: its results
do not compare with those of methods that see a hundred.

A (K, r) starts uniform and B at zero, so that training starts at W^. Where a
model's blocks are stacked, so are A and B. As in the authors' code the rate
rises over 1000 of 10000 updates (5 % of the sequences, counted in updates of
two), and gradients are clipped to length 1, the default of its Trainer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxq.nn import linear, taps
from jaxq.numerics import binary, qarray

Params = Mapping[str, Any]
Adapters = dict[str, linear.LowRank]
# field: (least, largest), both allowed.
_RANGES = {
  'rank': (1, 1 << 20),
  'alpha': (0.0, 1e6),
  'dropout': (0.0, 0.99),
  'updates': (1, 1 << 40),
  'batch_size': (1, 1 << 20),
  'accumulate': (1, 1 << 20),
  'learning_rate': (0.0, 1.0),
  'warmup': (0.0, 1.0),
  'max_norm': (1e-6, 1e6),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Attributes; the defaults are the paper's.

  rank, alpha: of alpha / rank A B.
  dropout: of what A reads.
  targets: last parts of the names of the linears; o is not among them.
  updates: of A and B, each by the mean gradient of `accumulate` batches.
  batch_size: sequences in a batch.
  learning_rate: at its peak, after `warmup` of the updates; then a cosine to 0.
  max_norm: longest gradient, of all adapters together.
  seed: of A, and of what is dropped.
  """

  rank: int = 64
  alpha: float = 16.0
  dropout: float = 0.1
  targets: tuple[str, ...] = (
    'q_proj',
    'k_proj',
    'v_proj',
    'gate_proj',
    'up_proj',
    'down_proj',
  )
  updates: int = 10000
  batch_size: int = 1
  accumulate: int = 2
  learning_rate: float = 1e-4
  warmup: float = 0.1
  max_norm: float = 1.0
  seed: int = 0

  def __post_init__(self):
    for name, (least, largest) in _RANGES.items():
      if not least <= getattr(self, name) <= largest:
        raise ValueError(
          f'LoraConfig: {name}={getattr(self, name)}; allowed {least} to '
          f'{largest}. The default is '
          f'{LoraConfig.__dataclass_fields__[name].default}.'
        )


@flax.struct.dataclass
class Dropped:
  """A LowRank whose input loses a share `rate` of its values.

  a (K, r), b (r, N); key (2,) uint32 says which.
  """

  a: jax.Array
  b: jax.Array
  key: jax.Array
  rate: float = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., K) -> (..., N) in x.dtype."""
    key = jax.random.wrap_key_data(self.key)
    keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
    x = jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
    return linear.LowRank(self.a, self.b)(x)


def start(params: Params, config: LoraConfig) -> Adapters:
  """{path of a linear: A, B} as training starts.

  Args:
    params: of the quantized model; kernels (..., K, N).
    config: static.

  Raises:
    ValueError: no linear is a target, or one is smaller than the rank.
  """
  found: Adapters = {}
  key = jax.random.key(config.seed)
  for path, leaf in taps.leaves(params):
    path, _, name = path.rpartition('/')
    if name != 'kernel' or path.rpartition('/')[2] not in config.targets:
      continue
    *lead, K, N = _shape(leaf)
    if config.rank > min(K, N):
      raise ValueError(
        f'restorative_lora: rank={config.rank} is larger than {path} of shape '
        f'{(K, N)}; at most {min(K, N)} is allowed. Lower rank.'
      )
    key, own = jax.random.split(key)
    bound = 1 / math.sqrt(K)  # PEFT's start.
    found[path] = linear.LowRank(
      jax.random.uniform(
        own, (*lead, K, config.rank), minval=-bound, maxval=bound
      ),
      jnp.zeros((*lead, config.rank, N)),
    )
  if not found:
    raise ValueError(
      f'restorative_lora: no linear of the model is one of '
      f'{list(config.targets)}; name some that it has in targets.'
    )
  return found


def train(
  apply: Callable[[Params, jax.Array], jax.Array],
  variables: Params,
  tokens: np.ndarray,
  config: LoraConfig,
  on_update: Callable[[int, float], None] = lambda i, loss: None,
) -> Adapters:
  """A and B after training on next-token prediction.

  Args:
    apply: (variables, tokens (B, T)) -> logits (B, T, V).
    variables: {'params', 'quant'} of the quantized model.
    tokens: (sequences, T) int32, read in order and again from the start.
    config: static.
    on_update: called with the number of each update and its loss.

  Raises:
    ValueError: as `start`; too few sequences for one update; a loss that is not
      finite (the update is named).
  """
  per_update = config.batch_size * config.accumulate
  if tokens.ndim != 2 or len(tokens) < per_update or tokens.shape[1] < 2:
    raise ValueError(
      f'restorative_lora: tokens of shape {tokens.shape}; an update needs '
      f'{per_update} sequences of 2 tokens or more. Give more text, or lower '
      'batch_size or accumulate.'
    )
  adapters = start(variables['params'], config)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    config.learning_rate,
    round(config.warmup * config.updates),
    config.updates,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(config.max_norm),
    optax.adamw(schedule, weight_decay=0.0),
  )
  update = jax.jit(
    functools.partial(_update, apply, optimizer, config), donate_argnums=(0, 1)
  )
  state = optimizer.init(adapters)
  key = jax.random.key(config.seed + 1)
  for i in range(config.updates):
    rows = np.arange(i * per_update, (i + 1) * per_update) % len(tokens)
    batches = tokens[rows].reshape(config.accumulate, config.batch_size, -1)
    adapters, state, loss = update(
      adapters, state, variables, batches, jax.random.fold_in(key, i)
    )
    if not bool(jnp.isfinite(loss)):
      raise ValueError(
        f'restorative_lora: the loss became NaN or Inf in update {i}; the '
        'learning rate must be small enough to stay finite. Lower '
        'learning_rate, or updates to that number.'
      )
    on_update(i, float(loss))
  return adapters


def attach(
  variables: Params,
  adapters: Adapters,
  config: LoraConfig,
  key: jax.Array | None = None,
) -> dict[str, Any]:
  """Variables of the model with the adapters; with dropout if a key is given.

  Raises:
    ValueError: a linear has a low-rank term of its own.
  """
  quant: Any = variables['quant']
  for i, (path, term) in enumerate(sorted(adapters.items())):
    if taps.get_path(quant, f'{path}/low_rank') is not None:
      raise ValueError(
        f'restorative_lora: {path} has a low-rank term already; the model must '
        'have none. Quantize it without, as with rank=0.'
      )
    scaled: Any = linear.LowRank(term.a, term.b * (config.alpha / config.rank))
    if key is not None and config.dropout:
      keys = jax.random.split(jax.random.fold_in(key, i), term.a.shape[:-2])
      data = jax.random.key_data(keys)
      scaled = Dropped(scaled.a, scaled.b, data, config.dropout)
    quant = taps.set_path(quant, f'{path}/low_rank', scaled)
  return {**variables, 'quant': quant}


def merge(params: Params, adapters: Adapters, config: LoraConfig) -> Any:
  """Float params, W^ + alpha / rank A B, all kernels (..., K, N) dense."""
  merged: Any = params
  for path, leaf in taps.leaves(params):
    w = leaf
    if isinstance(leaf, qarray.QArray):
      w = qarray.dequantize(leaf)
    elif isinstance(leaf, binary.BinaryArray):
      w = binary.dequantize(leaf)
    term = adapters.get(path.removesuffix('/kernel'))
    if term is not None and path.endswith('/kernel'):
      product = jnp.matmul(term.a, term.b, precision=jax.lax.Precision.HIGHEST)
      w = w + product * (config.alpha / config.rank)
    merged = taps.set_path(merged, path, w)
  return merged


def _shape(leaf: Any) -> tuple[int, ...]:
  """(..., K, N) of a kernel."""
  if isinstance(leaf, binary.BinaryArray):
    return tuple(leaf.bits.shape[:-2]) + tuple(leaf.shape)
  if isinstance(leaf, qarray.QArray):
    return tuple(leaf.scale.shape[:-2]) + tuple(leaf.shape)
  return tuple(leaf.shape)


def _update(apply, optimizer, config, adapters, state, variables, batches, key):
  """One update; batches (accumulate, batch_size, T)."""

  def loss(adapters, tokens, key):
    logits = apply(attach(variables, adapters, config, key), tokens)
    logp = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)
    return -jnp.mean(picked)

  def add(total, step):
    value, gradient = jax.value_and_grad(loss)(adapters, *step)
    return jax.tree.map(jnp.add, total, (value, gradient)), None

  zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, adapters))
  keys = jax.random.split(key, config.accumulate)
  total, _ = jax.lax.scan(add, zero, (batches, keys))
  value, gradient = jax.tree.map(lambda a: a / config.accumulate, total)
  with jax.numpy_dtype_promotion('standard'):  # Its powers need that.
    updates, state = optimizer.update(gradient, state, adapters)
  return optax.apply_updates(adapters, updates), state, value

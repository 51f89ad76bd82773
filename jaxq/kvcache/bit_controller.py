"""How many bits a token is worth: Don't Waste Bits' features and controller.

Haeri et al., 2026, https://arxiv.org/abs/2604.04722.

  s_t = [H, R, V, C]     of token t, once it was processed
  H  entropy of the next-token distribution     C  its largest probability
  R  rarity, -log((c + 1) / (N + distinct + 1)) of the token among those before
  V  variance of the last layer's attention row, times its length squared
  o = W3 relu(W2 relu(W1 s + b1) + b2) + b3     four classes: 2, 4, 8, 16 bits
  loss = alpha CE(o, y) + beta sum p_k cost_k + gamma (1 - sum p_k quality_k)

H and C tell how predictable the next token is, not how much this one will be
looked at: what they are worth is measured, not assumed (docs/kv_cache.md).

The paper leaves open what y, cost and quality are. Here y is the least class
whose harm, the KL divergence of the next tokens when this one alone is stored
so, stays below a threshold that is set by the wanted mean of bits (`labels`);
cost is bytes; quality is the mean of exp(-harm / its mean at 2 bits). It gives
33.5k parameters; these layers have 17.7k.

A trained controller is a JSON file: weights in float16, the mean and deviation
of the features, and the distribution of the expected bits over its training
tokens, which turns wanted shares of classes into thresholds.
"""

import base64
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

CLASSES = (2, 4, 8, 16)
FEATURES = ('entropy', 'rarity', 'variance', 'confidence')
SHIPPED = pathlib.Path(__file__).with_name('bit_controller_smollm2.json')
_FORMAT, _VERSION = 'jaxq.bit_controller', 1
_QUANTILES = 101


class BitController(nn.Module):
  """Features (..., 4), standardised -> logits of the classes (..., 4)."""

  hidden: int = 128

  @nn.compact
  def __call__(self, s: jax.Array) -> jax.Array:
    for name in ('one', 'two'):
      s = nn.relu(nn.Dense(self.hidden, name=name)(s))
    return nn.Dense(len(CLASSES), name='out')(s)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
  """A controller that was trained.

  params: of BitController, NumPy. mean, std: (4,) of the features. quantiles:
  (101,) of the expected bits. settings: of what it was trained.
  """

  params: Mapping[str, Any]
  mean: np.ndarray
  std: np.ndarray
  quantiles: np.ndarray
  settings: Mapping[str, Any]

  def logits(self, features: jax.Array) -> jax.Array:
    """Features (..., 4) -> (..., 4) float32."""
    scale = jnp.asarray(1 / self.std, jnp.float32)
    shape = (1,) * (features.ndim - 1) + (-1,)
    mean = jnp.asarray(self.mean, jnp.float32).reshape(shape)
    s = (features.astype(jnp.float32) - mean) * scale.reshape(shape)
    hidden = self.params['one']['bias'].shape[0]
    params = jax.tree.map(jnp.asarray, dict(self.params))
    out: Any = BitController(hidden).apply({'params': params}, s)
    return out

  def expected_bits(self, features: jax.Array) -> jax.Array:
    """Features (..., 4) -> (...), the mean of bits under the classes."""
    return expected_bits(self.logits(features))

  def thresholds(self, shares: tuple[float, ...]) -> np.ndarray:
    """Expected bits between which classes lie, (3,), for these shares."""
    edges = np.cumsum(shares)[:-1] / sum(shares)
    levels = np.linspace(0, 1, len(self.quantiles))
    return np.interp(edges, levels, self.quantiles).astype(np.float32)


def expected_bits(logits: jax.Array) -> jax.Array:
  """Logits (..., 4) -> (...): sum of p times bits."""
  bits = jnp.asarray(CLASSES, jnp.float32)
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1) @ bits


def of_logits(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits (..., V) -> entropy in nats and largest probability, (...)."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  p = jnp.exp(log_p)
  return -jnp.sum(p * log_p, axis=-1), jnp.max(p, axis=-1)


def rarity(
  tokens: jax.Array,
  new: jax.Array,
  length: jax.Array,
  distinct: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """R of new tokens, from those before them.

  Args:
    tokens: (B, S) int32, of which `length` (B,) are there, the new ones not.
    new: (B, T) int32.
    length: (B,).
    distinct: (B,) different ones among them.

  Returns:
    (B, T) float32, and whether a token is the first of its kind, (B, T).
  """
  S, T = tokens.shape[1], new.shape[1]
  held = jnp.arange(S)[None] < length[:, None]
  same = (new[:, :, None] == tokens[:, None]) & held[:, None]
  earlier = jnp.arange(T)[None] < jnp.arange(T)[:, None]
  own = (new[:, :, None] == new[:, None]) & earlier[None]
  count = jnp.sum(same, axis=2) + jnp.sum(own, axis=2)
  first = count == 0
  kinds = distinct[:, None] + jnp.cumsum(first, axis=1, dtype=jnp.int32)
  kinds -= first.astype(jnp.int32)  # Those before.
  total = length[:, None] + jnp.arange(T)[None] + kinds + 1
  share = (count + 1).astype(jnp.float32) / total.astype(jnp.float32)
  return -jnp.log(share), first


def controller_loss(
  logits: jax.Array,
  labels: jax.Array,
  cost: jax.Array,
  quality: jax.Array,
  *,
  alpha: float = 1.0,
  beta: float = 0.1,
  gamma: float = 0.1,
) -> jax.Array:
  """Mean loss (module docstring).

  Args:
    logits: (N, 4). labels: (N,) class indices.
    cost, quality: (4,), 1 at 16 bits.
    alpha, beta, gamma: of the right class, of cost and of lost quality.
  """
  log_p = jax.nn.log_softmax(logits, axis=-1)
  p = jnp.exp(log_p)
  right = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
  loss = -alpha * right + beta * (p @ cost) + gamma * (1 - p @ quality)
  return jnp.mean(loss)


def byte_costs(head_dim: int) -> np.ndarray:
  """(4,): bytes of a token over those at 16 bits, scales counted."""
  costs = [(b * head_dim + 32 * (b < 16)) / (16 * head_dim) for b in CLASSES]
  return np.array(costs)


def labels(harm: np.ndarray, mean_bits: float) -> np.ndarray:
  """(N, 3) harm at 2, 4, 8 bits -> (N,) classes that average `mean_bits`.

  The least class whose harm is below a threshold; the threshold by bisection.

  Raises:
    ValueError: a mean outside 2..16, or harm that is not finite.
  """
  if not CLASSES[0] <= mean_bits <= CLASSES[-1]:
    raise ValueError(
      f'bit_controller: mean_bits={mean_bits}; allowed 2..16, as 5.05.'
    )
  if not np.isfinite(harm).all():
    raise ValueError(
      'bit_controller: the harm of some tokens is NaN or Inf. Look for NaN in '
      'the model.'
    )
  bits = np.array(CLASSES)

  def classes(limit):
    fits = np.concatenate([harm <= limit, np.ones((len(harm), 1), bool)], 1)
    return np.argmax(fits, axis=1)

  low, high = 0.0, float(harm.max()) + 1e-12
  for _ in range(60):
    middle = (low + high) / 2
    if bits[classes(middle)].mean() > mean_bits:
      low = middle
    else:
      high = middle
  return classes(high)


def train(
  features: np.ndarray,
  harm: np.ndarray,
  *,
  head_dim: int,
  mean_bits: float = 5.05,
  beta: float = 0.1,
  gamma: float = 0.1,
  epochs: int = 60,
  batch_size: int = 64,
  learning_rate: float = 3e-3,
  hidden: int = 128,
  seed: int = 0,
  settings: Mapping[str, Any] | None = None,
) -> Trained:
  """A controller for tokens whose harm is known.

  Of the tokens 80 %, drawn class by class, are trained on; the epoch whose loss
  is least on the others counts.

  Args:
    features: (N, 4). harm: (N, 3), as for `labels`.
    head_dim: of the cache, for the cost.
    mean_bits, beta, gamma, epochs, batch_size, learning_rate, hidden, seed: of
      labels, loss and Adam.
    settings: JSON data that is kept in the file.

  Raises:
    ValueError: as `labels`; features that are not finite.
  """
  if not np.isfinite(features).all():
    raise ValueError(
      'bit_controller: features hold NaN or Inf. Look for NaN in the model.'
    )
  target = labels(harm, mean_bits)
  mean, std = features.mean(0), features.std(0) + 1e-6
  quality = np.exp(-harm / max(float(harm[:, 0].mean()), 1e-30)).mean(0)
  loss_of = functools.partial(
    controller_loss,
    cost=jnp.asarray(byte_costs(head_dim), jnp.float32),
    quality=jnp.asarray([*quality, 1.0], jnp.float32),
    beta=beta,
    gamma=gamma,
  )
  rng = np.random.default_rng(seed)
  held = np.zeros(len(target), bool)
  for k in range(len(CLASSES)):
    own = rng.permutation(np.flatnonzero(target == k))
    held[own[: len(own) // 5]] = True
  s = jnp.asarray((features - mean) / std, jnp.float32)
  y = jnp.asarray(target, jnp.int32)
  module, optimizer = BitController(hidden), optax.adam(learning_rate)
  params = module.init(jax.random.key(seed), s[:1])['params']

  def loss(params, rows):
    logits: Any = module.apply({'params': params}, s[rows])
    return loss_of(logits, y[rows])

  @jax.jit
  def step(params, state, rows):
    gradient = jax.grad(loss)(params, rows)
    with jax.numpy_dtype_promotion('standard'):  # Its powers need that.
      updates, state = optimizer.update(gradient, state)
      return optax.apply_updates(params, updates), state

  score = jax.jit(loss)
  state, best = optimizer.init(params), (np.inf, params)
  train_rows, held_rows = np.flatnonzero(~held), np.flatnonzero(held)
  size = min(batch_size, len(train_rows))
  for _ in range(epochs):
    order = rng.permutation(train_rows)
    for start in range(0, len(order) - size + 1, size):
      params, state = step(params, state, order[start : start + size])
    if len(held_rows):
      best = min(
        best, (float(score(params, held_rows)), params), key=lambda x: x[0]
      )
  kept = best[1] if len(held_rows) else params
  bits = expected_bits(module.apply({'params': kept}, s))  # type: ignore[arg-type]
  return Trained(
    params=jax.tree.map(np.asarray, kept),
    mean=mean,
    std=std,
    quantiles=np.quantile(np.asarray(bits), np.linspace(0, 1, _QUANTILES)),
    settings={
      **(settings or {}),
      'tokens': len(target),
      'mean bits of labels': float(np.array(CLASSES)[target].mean()),
      'held-out loss': best[0],
    },
  )


def save(path: str | os.PathLike, trained: Trained) -> None:
  """Writes the JSON file; below 100 kB at 128 hidden units."""

  def encode(a):
    a = np.asarray(a, np.float16)
    text = base64.b64encode(a.tobytes()).decode()
    return {'shape': list(a.shape), 'float16': text}

  body = {
    'format': _FORMAT,
    'version': _VERSION,
    'settings': dict(trained.settings),
    'mean': np.asarray(trained.mean, float).tolist(),
    'std': np.asarray(trained.std, float).tolist(),
    'quantiles': np.asarray(trained.quantiles, float).round(4).tolist(),
    'params': {
      layer: {name: encode(a) for name, a in leaves.items()}
      for layer, leaves in trained.params.items()
    },
  }
  pathlib.Path(path).write_text(json.dumps(body))


@functools.lru_cache(maxsize=8)
def load(path: str) -> Trained:
  """Reads what `save` wrote.

  Raises:
    FileNotFoundError: no file. ValueError: no file of this format.
  """

  def decode(a):
    flat = np.frombuffer(base64.b64decode(a['float16']), np.float16)
    return flat.reshape(a['shape']).astype(np.float32)

  try:
    body = json.loads(pathlib.Path(path).read_text())
    if (body['format'], body['version']) != (_FORMAT, _VERSION):
      raise KeyError(body['format'])
    return Trained(
      params={
        layer: {name: decode(a) for name, a in leaves.items()}
        for layer, leaves in body['params'].items()
      },
      mean=np.array(body['mean']),
      std=np.array(body['std']),
      quantiles=np.array(body['quantiles']),
      settings=body['settings'],
    )
  except (KeyError, TypeError, UnicodeDecodeError, ValueError) as e:
    raise ValueError(
      f'{path}: is no file of a bit controller; one that python -m '
      'experiments.train_bit_controller wrote is needed. Make it again.'
    ) from e

"""QTSplus' arithmetic: relevance, the threshold for a share, the random gate.

Pure functions of arrays, for training as for inference (jaxq.tokens.qtsplus).

The threshold t solves sum_i sigmoid((r_i - t) / tau) = rho M. The reference
takes ten Newton steps from the median, which overshoot where r is far apart;
here t is bisected within bounds that follow from the equation; its gradient is
the implicit one,

  dt / dr_i = g_i / sum g,  dt / drho = -M tau / sum g,  g = s (1 - s),

so that nothing is differentiated through the iterations.
"""

import jax
import jax.numpy as jnp

from jaxq.tokens import decoder_layers, primitives

_STEPS = 40  # Bisections; float32 has no more bits.
_EDGE = 1e-6  # rho is kept so far from 0 and 1, where t is infinite.


def cross_relevance(
  q: jax.Array,
  k: jax.Array,
  mask: jax.Array,
  query_mask: jax.Array | None = None,
) -> jax.Array:
  """The most attention a token gets from any head of any question token.

  Args:
    q: (B, L, H, D) of the question. k: (B, M, Hkv, D) of the tokens.
    mask: (B, M) bool. query_mask: (B, L) bool; None: all True.

  Returns:
    r (B, M) float32 in [0, 1]; 0 where masked.
  """
  weights = decoder_layers.attention_weights(q, k, mask[:, None])
  if query_mask is not None:
    weights = jnp.where(query_mask[:, None, :, None], weights, 0.0)
  return jnp.max(weights, axis=(1, 2))


def entropy(r: jax.Array) -> jax.Array:
  """-sum p log p of p = r / sum r: (B, M) -> (B,), >= 0. Zeros add nothing."""
  p = r / (jnp.sum(r, axis=1, keepdims=True) + 1e-8)
  return jnp.maximum(-jnp.sum(p * jnp.log(p + 1e-8), axis=1), 0.0)


@jax.custom_vjp
def solve_threshold(
  r: jax.Array, mask: jax.Array, rho: jax.Array, tau: jax.Array
) -> jax.Array:
  """t (B,) with mean sigmoid((r - t) / tau) = rho over the unmasked tokens.

  Args:
    r: (B, M) float32.
    mask: (B, M) bool. Without a token, t is 0.
    rho: (B,) in (0, 1).
    tau: () float32, > 0.
  """
  number, logit = _number(mask), _logit(rho)
  # The mean is monotone in t, and lies between those of its extremes.
  low = jnp.min(jnp.where(mask, r, jnp.inf), axis=1) - tau * logit
  high = jnp.max(jnp.where(mask, r, -jnp.inf), axis=1) - tau * logit

  def halve(_, bounds):
    low, high = bounds
    middle = 0.5 * (low + high)
    kept = jnp.where(mask, _keep(r, middle, tau), 0.0)
    above = jnp.sum(kept, axis=1) > number * rho
    return jnp.where(above, middle, low), jnp.where(above, high, middle)

  some = jnp.any(mask, axis=1)
  bounds = jnp.where(some, low, 0.0), jnp.where(some, high, 0.0)
  low, high = jax.lax.fori_loop(0, _STEPS, halve, bounds)
  return 0.5 * (low + high)


def _solve_forward(r, mask, rho, tau):
  t = solve_threshold(r, mask, rho, tau)
  return t, (r, mask, rho, tau, t)


def _solve_backward(saved, dt):
  r, mask, rho, tau, t = saved
  s = _keep(r, t, tau)
  g = jnp.where(mask, s * (1 - s), 0.0)
  total = jnp.maximum(jnp.sum(g, axis=1), 1e-12)
  dr = (dt / total)[:, None] * g
  drho = -dt * _number(mask) * tau / total
  centred = jnp.where(mask, r - t[:, None], 0.0)
  dtau = jnp.sum(-dt / tau * jnp.sum(g * centred, axis=1) / total)
  return dr, None, drho.astype(rho.dtype), dtau.astype(tau.dtype)


solve_threshold.defvjp(_solve_forward, _solve_backward)


def newton_threshold(
  r: jax.Array, mask: jax.Array, rho: jax.Array, tau: float, steps: int = 10
) -> jax.Array:
  """The reference's solver: Newton from the (lower) median, unrolled.

  As `solve_threshold`; the gradient is through the steps. It may be far off
  where neighbouring r are many tau apart, as the slope vanishes between them.
  """
  number = _number(mask)
  rising = jnp.sort(jnp.where(mask, r, jnp.inf), axis=1)
  middle = jnp.maximum((number.astype(jnp.int32) - 1) // 2, 0)
  t = jnp.take_along_axis(rising, middle[:, None], axis=1)[:, 0]
  t = jnp.where(jnp.any(mask, axis=1), t, 0.0)
  for _ in range(steps):
    s = jnp.where(mask, _keep(r, t, tau), 0.0)
    slope = -jnp.sum(s * (1 - s), axis=1) / tau + 1e-6
    t = t - (jnp.sum(s, axis=1) - number * rho) / slope
  return t


def gate(
  rng: jax.Array,
  r: jax.Array,
  t: jax.Array,
  mask: jax.Array,
  tau: float,
  *,
  calibrated: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """A random choice of tokens, with a gradient (binary Gumbel-softmax).

  Calibrated, a token is kept with probability sigmoid((r - t) / tau): rho M of
  them on average. In the reference it is sigmoid(r - t), as a temperature does
  not move an arg-max; at tau 0.5 and rho 0.1 that keeps a quarter.

  Args:
    rng: a key.
    r: (B, M). t: (B,), of `solve_threshold`.
    mask: (B, M) bool; others are never kept.
    tau: the threshold's, and the temperature of the gradient.
    calibrated: see above.

  Returns:
    The keep mask (B, M) bool, at least one where there is a token, and s (B, M)
    float32: 0 or 1 with the gradient of the soft choice.
  """
  logits = r - t[:, None]
  if calibrated:
    logits = logits / tau
  # The difference of two Gumbel variables is a logistic one.
  noise = jax.random.logistic(rng, r.shape, jnp.float32)
  keep = mask & (logits + noise > 0)
  none = ~jnp.any(keep, axis=1, keepdims=True)
  best = jnp.argmax(jnp.where(mask, r, -jnp.inf), axis=1)
  column = jnp.arange(r.shape[1])[None]
  keep = keep | (none & mask & (column == best[:, None]))
  soft = jax.nn.sigmoid((logits + noise) / tau)
  hard = keep.astype(jnp.float32)
  return keep, primitives.ste(hard, jnp.where(mask, soft, 0.0))


def _keep(r, t, tau):
  return jax.nn.sigmoid((r - t[:, None]) / tau)


def _number(mask):
  return jnp.sum(mask, axis=1, dtype=jnp.float32)


def _logit(rho):
  rho = jnp.clip(rho, _EDGE, 1 - _EDGE)
  return jnp.log(rho) - jnp.log1p(-rho)

"""Saliency of tokens: the attention they receive, estimated by a few probes.

  score_i = sum over query heads and probes k of A[k, i] / count_i
  count_i = the probes that could see token i

Dividing by the count is ZipCache's point: summed attention alone (H2O) favours
old tokens, which more queries have seen. With the last tokens of a prompt and a
few random ones as probes (5 % each) only so many rows of the attention matrix
are made, P / T of it, and prefill keeps its attention in chunks.

The reference divides by all queries that could see a token, though it sums over
the probes only; that is denominator='full', for parity. 'none' is the
accumulated score, for comparison.
"""

import jax
import jax.numpy as jnp

from jaxq.kvcache import interface, softmax

DENOMINATORS = ('full', 'none', 'probe')
_FEWEST = 20  # Below, every row is a probe: 5 % of them would be none.


def probe_indices(
  T: int,
  counts: jax.Array,
  *,
  recent: float = 0.05,
  random: float = 0.05,
  seed: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Which of T new tokens are probes.

  Args:
    T: static.
    counts: (B,) tokens of each row; the others are padding.
    recent, random: shares of T: of the last tokens, and drawn uniformly, with
      replacement, from those before.
    seed: of the draw, which also depends on the count.

  Returns:
    index (B, P) int32 and valid (B, P) bool. All rows where T < 20.
  """
  B = counts.shape[0]
  num_recent, num_random = int(recent * T), int(random * T)
  if T < _FEWEST or num_recent + num_random == 0:
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    return index, index < counts[:, None]
  last = counts[:, None] - 1 - jnp.arange(num_recent, dtype=jnp.int32)[None]

  def draw(count):
    key = jax.random.fold_in(jax.random.key(seed), count)
    most = jnp.maximum(count - num_recent, 1)
    return jax.random.randint(key, (num_random,), 0, most, jnp.int32)

  index = jnp.concatenate([last, jax.vmap(draw)(counts)], axis=1)
  valid = (index >= 0) & (index < counts[:, None])
  return jnp.maximum(index, 0), valid


def received(
  q: jax.Array,
  lse: jax.Array,
  k: jax.Array,
  seen: jax.Array,
  scoring: interface.Scoring,
) -> jax.Array:
  """Attention that keys receive: (B, Hkv, S) float32, over heads and probes.

  Args:
    q: (B, Hkv, G, P, D) float32, scaled.
    lse: (B, Hkv, G, P), of the whole softmax of each probe.
    k: (B, S, Hkv, D).
    seen: (B, P, S) bool.
    scoring: its softcap.
  """
  scores = jnp.einsum('bkgpd,bskd->bkgps', q, k.astype(jnp.float32))
  scores = softmax.cap(scores, scoring)
  seen = seen[:, None, None]
  p = jnp.exp(jnp.where(seen, scores - lse[..., None], 0.0))
  return jnp.sum(jnp.where(seen, p, 0.0), axis=(2, 3))


def normalize(
  sums: jax.Array, seen: jax.Array, queries: jax.Array, denominator: str
) -> jax.Array:
  """Sums (B, Hkv, S) over the number of queries that could see a token.

  Args:
    sums: from `received`.
    seen: (B, P, S) bool.
    queries: (B, S) int32: all queries that could, probes or not.
    denominator: of DENOMINATORS.
  """
  check_denominator(denominator)
  if denominator == 'none':
    return sums
  if denominator == 'probe':
    queries = jnp.sum(seen, axis=1, dtype=jnp.int32)
  return sums / jnp.maximum(queries, 1).astype(jnp.float32)[:, None]


def from_probes(
  q: jax.Array,
  k: jax.Array,
  probes: jax.Array,
  *,
  causal: bool = True,
  denominator: str = 'probe',
) -> jax.Array:
  """Saliency of the tokens of whole sequences.

  Args:
    q: (B, T, H, D), of all tokens.
    k: (B, T, Hkv, D).
    probes: (B, P) int32, positions of the probes.
    causal: whether a probe sees the tokens before it only.
    denominator: of DENOMINATORS.

  Returns:
    (B, Hkv, T) float32.
  """
  B, T, H, D = q.shape
  Hkv = k.shape[2]
  rows = jnp.take_along_axis(q, probes[:, :, None, None], axis=1)
  rows = rows.astype(jnp.float32) * jnp.float32(D**-0.5)
  rows = rows.reshape(B, -1, Hkv, H // Hkv, D).transpose(0, 2, 3, 1, 4)
  tokens = jnp.arange(T, dtype=jnp.int32)[None]
  seen = jnp.ones((B, probes.shape[1], T), bool)
  if causal:
    seen = tokens[:, None] <= probes[:, :, None]
  scores = jnp.einsum('bkgpd,bskd->bkgps', rows, k.astype(jnp.float32))
  scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
  lse = jax.nn.logsumexp(scores, axis=-1)
  queries = jnp.broadcast_to(T - tokens if causal else T + 0 * tokens, (B, T))
  sums = received(rows, lse, k, seen, interface.Scoring())
  return normalize(sums, seen, queries, denominator)


def check_denominator(denominator: str) -> None:
  """Raises ValueError for one that is not of DENOMINATORS."""
  if denominator not in DENOMINATORS:
    raise ValueError(
      f'saliency: denominator={denominator!r}; allowed {sorted(DENOMINATORS)}.'
    )


def split_salient(
  scores: jax.Array, num_salient: int
) -> tuple[jax.Array, jax.Array]:
  """(B, Hkv, n) -> indices of the highest scores and of the others.

  Ties go to the lower index. Both are in descending order of score: (B, Hkv,
  num_salient) and (B, Hkv, n - num_salient) int32.
  """
  order = jnp.argsort(-scores, axis=-1, stable=True).astype(jnp.int32)
  return order[..., :num_salient], order[..., num_salient:]

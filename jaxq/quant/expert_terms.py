"""The low-rank terms of Quant Experts, of the linears that read one tensor.

  shared  A, B of least |D^T (E - A B)|, D D^T = E[x x^T], over all tokens
  route   which tokens go to which expert (jaxq.quant.token_clusters)
  expert  A_e, B_e of least |D_e^T (E - A B - A_e B_e)|, D_e D_e^T = the same
          over the tokens that go to e

E = W - Q is what rounding left. Every fit is of the terms as they are stored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.nn import linear, routed_low_rank
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import low_rank, token_clusters

Errors = Mapping[str, jax.Array]  # {path: W - Q (K, N)}
TOKENS_PER_EXPERT = 64
_HIGHEST = lax.Precision.HIGHEST
_CHOICES = {
  'router': ('importance', 'linear'),
  'features': ('importance', 'member'),
  'gram': ('diagonal', 'full'),
  'rows': ('all', 'channels'),
  'dtype': ('bfloat16', 'float32', 'int8'),
}
# field: (least, largest), both allowed.
_RANGES = {
  'shared_rank': (0, 1 << 20),
  'expert_rank': (1, 1 << 20),
  'num_experts': (0, 64),
  'share': (1e-6, 1.0),
  'tau': (1e-6, 1.0),
  'upweight': (1e-3, 1e3),
  'skip_tokens': (0, 1 << 20),
  'modalities': (1, 64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TermsConfig:
  """Attributes.

  shared_rank, expert_rank, num_experts: of the terms; no experts is one term.
  top_k: experts of a token.
  router: 'linear' in x / |x|, or by 'importance': |x_j| |E_j| of the dependent
    channels, beside the clusters' means.
  features: what tokens are clustered by: their channels' 'importance', or
    which are a 'member' of the most important.
  share: of the channels that are a token's most important.
  tau: a channel is token-independent if it is among them for such a share of
    the tokens of each modality.
  gram: 'full' E[x x^T], or the 'diagonal' of mean |x| (LQER).
  rows: 'channels' limits the shared term to the token-independent channels and
    an expert's to those more frequent among its tokens; 'all' does not.
  upweight: how much more the token-independent channels count for the shared
    term.
  dtype: of the terms, as they are stored.
  skip_tokens: at the start of each sequence that say nothing of importance.
  modalities: how many the calibration data has.
  seed: of the first clusters.
  """

  shared_rank: int = 32
  expert_rank: int = 16
  num_experts: int = 4
  top_k: int = 1
  router: str = 'linear'
  features: str = 'importance'
  share: float = 0.02
  tau: float = 0.5
  gram: str = 'full'
  rows: str = 'all'
  upweight: float = 1.0
  dtype: str = 'bfloat16'
  skip_tokens: int = 1
  modalities: int = 1
  seed: int = 0

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'TermsConfig: {name}={getattr(self, name)!r}; allowed '
          f'{list(allowed)}. Use one of them.'
        )
    for name, (least, largest) in _RANGES.items():
      if not least <= getattr(self, name) <= largest:
        raise ValueError(
          f'TermsConfig: {name}={getattr(self, name)}; allowed {least} to '
          f'{largest}. The default is '
          f'{TermsConfig.__dataclass_fields__[name].default}.'
        )
    if self.num_experts and not 1 <= self.top_k <= self.num_experts:
      raise ValueError(
        f'TermsConfig: top_k={self.top_k} of num_experts={self.num_experts}; '
        f'allowed 1 to {self.num_experts}. Use 1 or 2.'
      )

  @property
  def needs_channels(self) -> bool:
    """Whether channels are told apart by importance."""
    apart = self.rows == 'channels' or self.upweight != 1
    return apart or self.num_experts > 0


class Routing(NamedTuple):
  """What a sample (S, T, K) of an input says.

  channels: token_clusters.Channels.
  clusters: those that the router was fitted to, labels (S * T,).
  router (K, E), weight (K,) or None: as in RoutedLowRank.
  gates: (S * T, E), what the router does; 0 for padding.
  lift: (E, K), of channels, by the router.
  enough: (), whether there are TOKENS_PER_EXPERT tokens for each expert.
  """

  channels: token_clusters.Channels
  clusters: token_clusters.Clusters
  router: jax.Array
  weight: jax.Array | None
  gates: jax.Array
  lift: jax.Array
  enough: jax.Array


def counted_tokens(x: jax.Array, skip_tokens: int) -> jax.Array:
  """(S, T) bool: neither padding nor among the first; x (S, T, K)."""
  later = jnp.arange(x.shape[1]) >= skip_tokens
  return jnp.any(x != 0, axis=-1) & later[None]


def route(
  x: jax.Array,
  error_norms: jax.Array,
  modality: jax.Array,
  config: TermsConfig,
) -> Routing:
  """Tells channels apart, clusters tokens and fits the router.

  Args:
    x: (S, T, K), a sample of the input; rows of zeros are padding.
    error_norms: |E_j| (K,), over all linears that read it.
    modality: (S, T) int32.
    config: static.
  """
  K, experts = x.shape[-1], max(config.num_experts, 1)
  flat = x.reshape(-1, K).astype(jnp.float32)  # (S * T, K)
  counted = counted_tokens(x, config.skip_tokens).reshape(-1)
  importance = token_clusters.channel_importance(flat, error_norms)
  k = max(1, round(config.share * K))
  member = token_clusters.top_channels(importance, k)
  frequency, tokens = token_clusters.importance_frequency(
    member, counted, modality.reshape(-1), config.modalities
  )
  channels = token_clusters.split_channels(frequency, tokens, k, config.tau)
  # With no channel to tell tokens apart by, all are taken.
  dependent = channels.dependent | ~jnp.any(channels.dependent)
  weighted = token_clusters.features(importance, dependent)
  rows = weighted
  if config.features == 'member':
    rows = token_clusters.features(member, dependent)
  key = jax.random.key(config.seed)
  clusters = token_clusters.spherical_kmeans(rows, counted, experts, key)
  told = counted & jnp.any(rows != 0, axis=-1)
  if config.router == 'linear':
    weight = None
    router = token_clusters.fit_router(flat, clusters.labels, told, experts)
  else:
    weight = jnp.where(dependent, error_norms, 0.0)
    router = token_clusters.mean_importance(
      weighted, clusters.labels, told, experts
    )
  router = router.astype(jnp.bfloat16)
  gates = routed_low_rank.gates(flat, router, weight, config.top_k)
  gates = jnp.where(jnp.any(flat != 0, axis=-1)[:, None], gates, 0.0)
  return Routing(
    channels=channels,
    clusters=clusters,
    router=router,
    weight=weight,
    gates=gates,
    lift=token_clusters.lift(member, gates, counted),
    enough=jnp.sum(tokens) >= TOKENS_PER_EXPERT * experts,
  )


def fit_terms(
  errors: Errors,
  gram: jax.Array,
  x: jax.Array | None,
  modality: jax.Array | None,
  config: TermsConfig,
) -> dict[str, Any]:
  """{path: LowRank, or RoutedLowRank where there are experts}.

  In the measure of `gram`, and of the tokens that the router sends to an
  expert, no term makes an error larger than it was: one that would is zero.

  Args:
    errors: {path: (K, N)} of linears that read one tensor.
    gram: of it, E[x x^T] (K, K), or mean |x| (K,) with gram='diagonal'.
    x, modality: (S, T, K) and (S, T) int32, a sample; None where config does
      not need one.
    config: static.

  Returns:
    Terms that are NaN where a Gram matrix could not be factored, or where the
    tokens do not make num_experts clusters.

  Raises:
    ValueError: a rank is above K or N.
  """
  K = gram.shape[0]
  rows = jnp.ones(K, jnp.float32)
  routing = None
  if x is not None and modality is not None and config.needs_channels:
    squares = [jnp.sum(jnp.square(e), axis=1) for e in errors.values()]
    norms = jnp.sqrt(jnp.sum(jnp.stack(squares), axis=0))
    routing = route(x, norms, modality, config)
    others = 0.0 if config.rows == 'channels' else 1.0
    rows = jnp.where(routing.channels.independent, config.upweight, others)
  shared = _fit(errors, gram, rows, config.shared_rank, config)
  if x is None or routing is None or not config.num_experts:
    return {path: store(term, config.dtype) for path, term in shared.items()}
  left = {path: e - shared[path].product for path, e in errors.items()}
  experts = _fit_experts(left, x, routing, config)
  sound = jnp.all(routing.clusters.sizes > 0)
  made = {}
  for path, term in experts.items():  # a (E, K, r_e), b (E, r_e, N)
    a = term.a.swapaxes(0, 1).reshape(K, -1)
    b = jnp.where(routing.enough, jnp.where(sound, term.b, jnp.nan), 0.0)
    b = b.reshape(a.shape[1], -1)
    joined = store(
      linear.LowRank(
        jnp.concatenate([shared[path].a, a], axis=1),
        jnp.concatenate([shared[path].b, b]),
      ),
      config.dtype,
    )
    made[path] = routed_low_rank.RoutedLowRank(
      joined.a,
      joined.b,
      routing.router,
      routing.weight,
      config.shared_rank,
      config.top_k,
    )
  return made


def store(term: Any, dtype: str) -> Any:
  """A term with a and b in their stored dtype.

  Args:
    term: LowRank or RoutedLowRank, a and b floats.
    dtype: of TermsConfig; 'int8' has a scale per column of a and row of b.
  """
  if dtype != 'int8':
    a, b = (leaf.astype(dtype) for leaf in (term.a, term.b))
    return dataclasses.replace(term, a=a, b=b)
  columns, rows = (
    spec_lib.QuantSpec(dtype='int8', granularity=granularity)
    for granularity in ('channel', 'token')
  )
  a, b = qarray.quantize(term.a, columns), qarray.quantize(term.b, rows)
  return dataclasses.replace(term, a=a, b=b)


def _fit_experts(left, x, routing, config) -> dict[str, linear.LowRank]:
  """The experts' terms, stacked: a (E, K, r_e), b (E, r_e, N)."""
  flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)

  def one(expert):
    gate, lift = expert  # (S * T,), (K,)
    total = jnp.maximum(jnp.sum(gate), 1.0)
    weighted = flat * gate[:, None]
    if config.gram == 'diagonal':
      gram = jnp.sum(jnp.abs(weighted), axis=0) / total
    else:
      gram = jnp.matmul(flat.T, weighted, precision=_HIGHEST) / total
    rows = jnp.ones_like(lift)
    if config.rows == 'channels':
      rows = (routing.channels.dependent & (lift > 1)).astype(jnp.float32)
    return _fit(left, gram, rows, config.expert_rank, config)

  made: dict[str, linear.LowRank] = lax.map(
    one, (routing.gates.T, routing.lift)
  )
  return made


def _fit(errors, gram, rows, rank, config) -> dict[str, linear.LowRank]:
  """{path: a, b} float32, but rounded as they will be stored.

  Args:
    errors: {path: (K, N)}.
    gram: (K, K) or (K,).
    rows: (K,), weights of the channels; those of 0 are left out.
    rank: static.
    config: static.
  """
  kept = rows > 0
  if gram.ndim == 1:
    factor = gram * jnp.where(kept, rows, 1.0)
    mean = jnp.mean(factor)
    factor = jnp.maximum(factor, jnp.where(mean == 0, 1.0, 1e-4 * mean))
  else:
    factor = low_rank.whitening(gram * rows[:, None] * rows[None])
  made = {}
  for path, error in errors.items():
    inside = jnp.where(kept[:, None], error, 0.0)
    term = store(_svd(inside, factor, rank), config.dtype)
    a, b = (linear.dense(leaf).astype(jnp.float32) for leaf in (term.a, term.b))
    after = error - jnp.matmul(a, b, precision=_HIGHEST)
    worse = _energy(after, gram) > _energy(error, gram)
    # A NaN is not worse, and is seen.
    made[path] = linear.LowRank(a, jnp.where(worse, 0.0, b))
  return made


def _svd(error, factor, rank) -> linear.LowRank:
  if rank:
    return low_rank.whitened_svd(error, factor, rank)
  K, N = error.shape
  return linear.LowRank(jnp.zeros((K, 0)), jnp.zeros((0, N)))


def _energy(error: jax.Array, gram: jax.Array) -> jax.Array:
  """What _fit makes small, of an error (K, N)."""
  if gram.ndim == 1:
    return jnp.sum(jnp.square(gram[:, None] * error))
  return jnp.sum(error * jnp.matmul(gram, error, precision=_HIGHEST))

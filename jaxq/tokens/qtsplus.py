"""QTSplus: which tokens, and how many, a question needs.

Li et al., 2025, https://arxiv.org/abs/2511.11910. Between the vision encoder
and the language model,

  r   = max over heads and question tokens of attention(question -> tokens)
  rho = lo + (hi - lo) * sigmoid(MLP([mean question, log M, max r, entropy(r)]))
  n   = min(ceil(rho M), n_max)     kept, those with the largest r, in order

and a small self-attention layer mixes what was kept. The scoring layers begin
as copies of the language model's last layer, the mixing ones of its first.
Training replaces the hard choice by a random gate (jaxq.tokens.qtsplus_gate)
and adds losses on rho (jaxq.tokens.qtsplus_training).

Departures, each with a switch back: the time of a token, which the paper names
and its code lacks, is added before the mixing through a gate that starts at 0
(`time_embed`); tokens keep their original positions (`renumber`); r is divided
by its maximum before the training gate, which else does not see it
(`normalize_gate`). Padding is masked throughout: it changes no rho, no choice
and no mixed token.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear, mlp, norms
from jaxq.tokens import cross_attention, interface, primitives, qtsplus_gate

CONTROLS = ('none', 'share')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QTSplusConfig(interface.Config):
  """The selector; its width D is the query's, the language model's.

  Attributes:
    budget: the largest share kept, whatever rho says.
    rho_min, rho_max: range of the predicted share.
    n_max: the most tokens kept.
    num_heads, num_kv_heads: those of the language model; head_dim is D / H.
    scoring_layers, mixing_layers: how many; 0 mixing layers copy tokens bit by
      bit.
    budget_hidden: width of the MLP behind rho.
    scale_entropy: whether entropy(r) is divided by log M, so that the MLP does
      not saturate at many tokens.
    time_embed: whether tokens get their time before they are mixed.
    seconds_per_frame: of a step of positions[..., 0], for time_embed.
    project: whether tokens of another width are projected to D.
    renumber: whether kept tokens get positions 0..n-1 on all axes.
    control: of CONTROLS. 'share': each question gets the predicted share of
      another one of the batch (needs rng): as many tokens in all, but not where
      they are asked for.
  """

  budget: float = 0.5
  rho_min: float = 0.05
  rho_max: float = 0.5
  n_max: int = 2560
  num_heads: int = 8
  num_kv_heads: int = 8
  scoring_layers: int = 1
  mixing_layers: int = 1
  budget_hidden: int = 256
  scale_entropy: bool = False
  time_embed: bool = True
  seconds_per_frame: float = 1.0
  project: bool = False
  renumber: bool = False
  control: str = 'none'

  def __post_init__(self):
    super().__post_init__()
    if self.control not in CONTROLS:
      raise ValueError(
        f'QTSplusConfig: control={self.control!r}; allowed {sorted(CONTROLS)}.'
      )
    if not 0 < self.rho_min < self.rho_max <= 1:
      raise ValueError(
        f'QTSplusConfig: rho_min={self.rho_min}, rho_max={self.rho_max}; '
        'allowed 0 < rho_min < rho_max <= 1. The paper has 0.05 and 0.5.'
      )
    if self.n_max < 1 or self.scoring_layers < 1 or self.mixing_layers < 0:
      raise ValueError(
        f'QTSplusConfig: n_max={self.n_max}, scoring_layers='
        f'{self.scoring_layers}, mixing_layers={self.mixing_layers}; allowed '
        'are at least 1, 1 and 0.'
      )
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'QTSplusConfig: num_heads={self.num_heads}, num_kv_heads='
        f'{self.num_kv_heads}; the second must divide the first. Take those of '
        'the language model.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A selector, unless kept tokens are projected or mixed."""
    copies = not self.mixing_layers and not self.project
    return interface.Traits(
      kind='selector' if copies else 'merger',
      query=True,
      params=True,
      rng=self.control == 'share',
      conserves_mass=copies,
    )

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """As many slots as rho_max, n_max and the budget allow."""
    N = ts.mask.shape[1]
    share = round(min(self.budget, self.rho_max) * N, 9)
    return interface.Budget(k_max=max(1, min(self.n_max, math.ceil(share))))

  def init_params(
    self,
    rng: jax.Array,
    ts: interface.TokenSet,
    query: jax.Array | None = None,
  ) -> Any:
    """Of a `Selector`, untrained; `from_blocks` puts a model's layers in."""
    if query is None:
      raise ValueError(
        'QTSplusConfig: query=None; the selector is made for the width of the '
        'query. Pass init_params(rng, ts, query).'
      )
    check_query(self, ts, query)
    D = query.shape[-1]
    tokens, text = jnp.zeros((1, 2, D), query.dtype), query[:1, :1]
    mask, times = jnp.ones((1, 2), bool), jnp.zeros((1, 2))
    init = jax.jit(Selector(self).init)
    params = init(rng, tokens, mask, times, text)['params']
    if self.project:  # Keep the channels there are: a truncated identity.
      eye = jnp.eye(ts.tokens.shape[-1], D, dtype=ts.tokens.dtype)
      params = {**params, 'project': {'kernel': eye}}
    return params

  def example(self) -> interface.Example:
    """Two heads; shares of a half and more, so that some are kept."""
    small = dataclasses.replace(
      self, num_heads=2, num_kv_heads=1, rho_min=0.3, budget_hidden=8
    )
    return interface.Example(reducer=small)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    assert given.query is not None  # Traits ask for it.
    check_query(self, ts, given.query)
    apply = bind(self, given.params)
    tokens = project(self, given.params, ts, given.query.shape[-1])
    r = apply('relevance', tokens, ts.mask, given.query, given.query_mask)
    rho = apply('share', r, ts.mask, given.query, given.query_mask)
    if self.control == 'share':
      assert given.rng is not None
      rho = jax.random.permutation(given.rng, rho)
    n = kept_number(rho, ts.mask, self.n_max)
    k = jnp.minimum(n, budget.counts(n.shape[0]))
    index, used = primitives.select_topk(r, ts.mask, budget.k_max, k)
    reduced = primitives.selected(
      ts, index, used, {'rho': rho, 'relevance': r, 'n': n}
    )
    kept = reduced.tokens
    if self.project:
      kept = primitives.gather(tokens, index)
    if self.mixing_layers:
      kept = apply('mix', kept, used, times_of(self, reduced.positions))
      kept = jnp.where(used[..., None], kept, jnp.zeros((), kept.dtype))
    reduced = dataclasses.replace(reduced, tokens=kept)
    if self.renumber:
      reduced = dataclasses.replace(
        reduced,
        positions=primitives.renumbered(used, reduced.positions.shape[-1]),
      )
    return reduced


class Layer(nn.Module):
  """q <- q + attention(norm(q), norm(kv)); q <- q + ffn(norm(q)).

  Attributes:
    num_heads, num_kv_heads: of the attention, which has no positions.
  """

  num_heads: int
  num_kv_heads: int

  @nn.compact
  def __call__(
    self, q: jax.Array, kv: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(B, L, D), (B, M, D), mask (B, M) -> (B, L, D) and queries and keys."""
    D = q.shape[-1]
    out, made = cross_attention.CrossAttention(
      self.num_heads, self.num_kv_heads, D // self.num_heads, name='attention'
    )(
      norms.RMSNorm(1e-6, name='input_norm')(q),
      norms.RMSNorm(1e-6, name='memory_norm')(kv),
      mask,
    )
    q = q + out
    ffn = mlp.MLP(
      4 * D, activation='gelu', gated=False, use_bias=True, name='mlp'
    )
    return q + ffn(norms.RMSNorm(1e-6, name='post_norm')(q)), made


class Selector(nn.Module):
  """All that has weights.

  Attributes:
    config: of the selector.
  """

  config: QTSplusConfig

  def setup(self):
    c = self.config
    heads = (c.num_heads, c.num_kv_heads)
    self.scoring = [Layer(*heads) for _ in range(c.scoring_layers)]
    self.mixing = [Layer(*heads) for _ in range(c.mixing_layers)]
    self.budget_up = linear.QuantDense(c.budget_hidden, use_bias=True)
    self.budget_down = linear.QuantDense(1, use_bias=True)
    if c.time_embed and c.mixing_layers:
      self.time_gate = self.param('time_gate', nn.initializers.zeros, ())

  def __call__(self, tokens, mask, times, query):
    """Touches every weight; for `init`."""
    r = self.relevance(tokens, mask, query, None)
    self.share(r, mask, query, None)
    return self.mix(tokens, mask, times)

  def relevance(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    query: jax.Array,
    query_mask: jax.Array | None,
  ) -> jax.Array:
    """r (B, M) float32 of the last scoring layer."""
    made = None
    for layer in self.scoring:
      query, made = layer(query, tokens, mask)
    assert made is not None
    return qtsplus_gate.cross_relevance(*made, mask, query_mask)

  def share(
    self,
    r: jax.Array,
    mask: jax.Array,
    query: jax.Array,
    query_mask: jax.Array | None,
  ) -> jax.Array:
    """rho (B,) float32 in [rho_min, rho_max]."""
    c = self.config
    query = query.astype(jnp.float32)
    if query_mask is None:
      query_mask = jnp.ones(query.shape[:2], bool)
    asked = jnp.where(query_mask[..., None], query, 0.0)
    length = jnp.sum(query_mask, axis=1, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(asked, axis=1) / jnp.maximum(length, 1.0)  # (B, D)
    number = jnp.sum(mask, axis=1, dtype=jnp.float32)
    log_number = jnp.log(jnp.maximum(number, 1.0))
    entropy = qtsplus_gate.entropy(r)
    if c.scale_entropy:
      entropy = entropy / jnp.maximum(log_number, 1e-6)
    numbers = jnp.stack([log_number, jnp.max(r, axis=1), entropy], axis=1)
    x = jnp.concatenate([mean, numbers], axis=1)
    hidden = jax.nn.gelu(self.budget_up(x), approximate=False)
    z = jax.nn.sigmoid(self.budget_down(hidden)[:, 0])
    return c.rho_min + (c.rho_max - c.rho_min) * z

  def mix(
    self, tokens: jax.Array, mask: jax.Array, times: jax.Array
  ) -> jax.Array:
    """Self-attention among the kept: (B, K, D), mask (B, K), seconds (B, K)."""
    if self.config.time_embed and self.config.mixing_layers:
      embedded = self.time_gate * sinusoids(times, tokens.shape[-1])
      tokens = tokens + embedded.astype(tokens.dtype)
    for layer in self.mixing:
      tokens, _ = layer(tokens, tokens, mask)
    return tokens


def bind(config: QTSplusConfig, params: Any) -> Callable[..., jax.Array]:
  """apply(method, *args) of a Selector with these parameters."""
  module = Selector(config)

  def apply(method, *args):
    return module.apply({'params': params}, *args, method=method)

  return apply


def project(
  config: QTSplusConfig, params: Any, ts: interface.TokenSet, width: int
) -> jax.Array:
  """Tokens (B, M, D) of the query's width, 0 where masked."""
  tokens = jnp.where(ts.mask[..., None], ts.tokens, 0)
  if not config.project:
    return tokens
  dense = linear.QuantDense(width)
  projected = dense.apply({'params': params['project']}, tokens)
  assert isinstance(projected, jax.Array)
  return projected


def kept_number(rho: jax.Array, mask: jax.Array, n_max: int) -> jax.Array:
  """n (B,) int32 = min(max(ceil(rho M), 1), n_max); 0 without a token."""
  number = jnp.sum(mask, axis=1, dtype=jnp.float32)
  # A hair below: ceil(0.05 * 10000) is 500, whatever float32 makes of it.
  n = jnp.ceil(rho * number * (1 - 2**-20)).astype(jnp.int32)
  n = jnp.clip(n, 1, n_max)
  return jnp.where(number > 0, n, 0)


def sinusoids(times: jax.Array, width: int) -> jax.Array:
  """Sines, then cosines of seconds (B, K): (B, K, width), base 10000."""
  half = -(-width // 2)
  powers = jnp.arange(half, dtype=jnp.float32) / half
  angles = times[..., None] * (10000.0**-powers)[None, None]
  both = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return both[..., :width]


def times_of(config: QTSplusConfig, positions: jax.Array) -> jax.Array:
  """Seconds (B, K) of positions (B, K, P), whose first axis is time."""
  return positions[..., 0].astype(jnp.float32) * config.seconds_per_frame


def from_blocks(
  params: Mapping[str, Any],
  last: Mapping[str, Any],
  first: tuple[Mapping[str, Any], ...] = (),
) -> dict[str, Any]:
  """Attention and norms of decoder blocks, in place of the selector's own.

  Args:
    params: of `init_params`.
    last: parameters of the language model's last block (models.decoder.Block),
      for every scoring layer.
    first: of its first blocks, one for each mixing layer.
  """
  made = dict(params)
  for name in params:
    kind, _, number = name.partition('_')
    if kind == 'scoring':
      block = last
    elif kind == 'mixing' and int(number) < len(first):
      block = first[int(number)]
    else:
      continue
    copied = {
      'input_norm': block['input_norm'],
      'memory_norm': block['input_norm'],
      'post_norm': block['post_norm'],
      'attention': block['attention'],
    }
    made[name] = {**params[name], **copied}
  return made


def integrate(
  embeddings: jax.Array,
  mask: jax.Array,
  place: jax.Array,
  reduced: interface.Reduced,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A prompt whose placeholder is replaced by the kept tokens.

  Args:
    embeddings: (B, S, D) of the prompt, padded behind.
    mask: (B, S) bool.
    place: (B,) int32, where the one placeholder is.
    reduced: K slots of width D.

  Returns:
    Embeddings (B, S - 1 + K, D) without gaps, their mask, and source (B, S - 1
    + K) int32: the slot of a kept token, -1 elsewhere. The language model's
    positions are 0, 1, ... of the result.

  Raises:
    ValueError: no placeholder, or D differs.
  """
  B, S, D = embeddings.shape
  K = reduced.mask.shape[1]
  if reduced.tokens.shape[-1] != D:
    raise ValueError(
      f'integrate: tokens of width {reduced.tokens.shape[-1]} for embeddings '
      f'of width {D}; they must be equal. Project the tokens first.'
    )
  if (
    not isinstance(place, jax.core.Tracer)
    and ((place < 0) | (place >= S)).any()
  ):
    raise ValueError(
      f'integrate: place={place.tolist()} in prompts of {S} tokens; every '
      'prompt needs one placeholder. Add the video token to the prompt.'
    )
  column = jnp.arange(S, dtype=jnp.int32)[None]
  before, after = column < place[:, None], column > place[:, None]
  both = jnp.concatenate([embeddings, reduced.tokens, embeddings], axis=1)
  used = jnp.concatenate(
    [mask & before, reduced.mask, mask & after], axis=1
  )  # (B, S + K + S)
  index, out_mask = primitives.compact(used, S - 1 + K)
  slot = jnp.where((index >= S) & (index < S + K), index - S, -1)
  return primitives.gather(both, index), out_mask, slot


def check_query(
  config: QTSplusConfig, ts: interface.TokenSet, query: jax.Array
) -> None:
  """Raises ValueError unless widths, heads and the question fit."""
  D, Dq = ts.tokens.shape[-1], query.shape[-1]
  if Dq != D and not config.project:
    raise ValueError(
      f'QTSplusConfig: tokens of width {D} and a query of width {Dq}; they '
      "must be equal. Set project=True, or embed the question in the tokens' "
      'space.'
    )
  if Dq % config.num_heads:
    raise ValueError(
      f'QTSplusConfig: width {Dq} and num_heads={config.num_heads}; the heads '
      'must divide the width. Take those of the language model.'
    )
  if query.shape[1] < 1:
    raise ValueError(
      'QTSplusConfig: the query has no token; the question must not be empty. '
      'Use a reducer without a query.'
    )

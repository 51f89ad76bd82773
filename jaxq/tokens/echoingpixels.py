"""EchoingPixels: audio and video tokens compete for one budget (CS2).

"EchoingPixels: Cross-Modal Adaptive Token Reduction for Efficient Audio-Visual
LLMs", ICML 2026, arXiv 2512.10324. The Cross-Modal Semantic Sieve:

  h = refiner layers (video, audio, text), bidirectional
  z = W2 silu(W1 rms_norm(h)),  y = softmax(z / tau) over audio and video
  keep the top k = ceil(budget * number of them) of y, and all text
  out = h * g,  g = 1 forwards, the gradient of y backwards (straight-through)

The refiner is a few copies of the language model's first layers, so it knows
the question when it scores, and the split between audio and video follows from
it. What is kept are the REFINED states, with their original positions: those
enter decoder layer 0. Tokens are few and far apart in time, so positions turn
slow channels with time too (tokens.sync_rope); this changes what pretrained
channels mean, so neither part is of use without training.

Departures: g is 1 by construction, not by y + (1 - y), and 0 layers of refiner
are allowed, which copies tokens. `base='av'` counts audio for the budget of
candidates='v' as the reference does; there k may exceed the candidates, and is
then their number. Rows of a batch without audio and video pass the sieve as
they are. Softmax over thousands of tokens trains slowly (gradients of order
1/N), so `relaxation` has two more.

Modalities are those of tokens.sync_rope; without, all tokens are video.
"""

import dataclasses
import fractions
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.tokens import (
  decoder_layers,
  interface,
  primitives,
  sync_rope,
  training,
)

CANDIDATES = ('av', 'v')
RELAXATIONS = ('gumbel', 'sigmoid', 'softmax')
BASES = ('av', 'candidates')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EchoingPixelsConfig(interface.Config):
  """The sieve; shapes of Qwen2.5-Omni-3B's decoder by default.

  budget: of audio and video tokens; text comes on top.
  text_max: the most tokens that always stay in a row, by which slots are made
    for them; None: all slots, which is right and saves nothing.
  refiner_layers: copies of decoder layers; 0 scores the tokens themselves.
  num_heads, num_kv_heads, head_dim, intermediate_size, norm_eps, qkv_bias: of a
    decoder layer.
  sections, axes, theta: the rotary positions (sync_rope.SyncRope).
  tau: temperature of the relaxation.
  relaxation: 'softmax', 'gumbel' (softmax with Gumbel noise; needs rng), or
    'sigmoid' of what is above the k-th score.
  candidates: 'av', or 'v' to keep all audio.
  base: what `budget` is a share of, where candidates='v'.
  """

  budget: float = 0.2
  text_max: int | None = None
  refiner_layers: int = 4
  num_heads: int = 16
  num_kv_heads: int = 2
  head_dim: int = 128
  intermediate_size: int = 11008
  norm_eps: float = 1e-6
  qkv_bias: bool = True
  sections: tuple[int, ...] = (18, 18, 18, 10)
  axes: tuple[int, ...] = (0, 1, 2, 0)
  theta: float = 1e6
  tau: float = 1.0
  relaxation: str = 'softmax'
  candidates: str = 'av'
  base: str = 'candidates'

  def __post_init__(self):
    super().__post_init__()
    for name, allowed in (
      ('relaxation', RELAXATIONS),
      ('candidates', CANDIDATES),
      ('base', BASES),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'EchoingPixelsConfig: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(allowed)}. Use {allowed[-1]!r}.'
        )
    if self.refiner_layers < 0 or not self.tau > 0:
      raise ValueError(
        f'EchoingPixelsConfig: refiner_layers={self.refiner_layers}, tau='
        f'{self.tau}; the first must be 0 or more, the second positive. Use 4 '
        'and 1.'
      )
    sync_rope.check(self.rope, self.head_dim, max(self.axes) + 1)
    _ = self.layer  # Checks the heads.

  @property
  def rope(self) -> sync_rope.SyncRope:
    """Positions of every attention layer, of the decoder too."""
    return sync_rope.SyncRope(
      sections=self.sections, axes=self.axes, theta=self.theta
    )

  @property
  def layer(self) -> decoder_layers.LayerConfig:
    """A refiner layer."""
    return decoder_layers.LayerConfig(
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      intermediate_size=self.intermediate_size,
      norm_eps=self.norm_eps,
      qkv_bias=self.qkv_bias,
    )

  @property
  def traits(self) -> interface.Traits:
    """A selector; with refiner layers what it copies are refined states."""
    return interface.Traits(
      kind='selector',
      params=True,
      rng=self.relaxation == 'gumbel',
      position_axes=max(self.axes) + 1,
    )

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """Slots for the share of N and `text_max` more; k is the exact number.

    Of shapes alone, or without modalities, all tokens are candidates.
    """
    N = ts.mask.shape[1]
    most = interface.budget_from_ratio(N, self.budget, rounding='ceil')
    if not isinstance(ts.modality, jax.Array | np.ndarray):
      return most
    _, always, k = pool(ts, self)
    k = k + jnp.sum(always, axis=1, dtype=jnp.int32)
    text_max = N if self.text_max is None else self.text_max
    return interface.Budget(k_max=min(N, text_max + most.k_max), k=k)

  def init_params(
    self, rng: jax.Array, ts: interface.TokenSet, query: jax.Array | None = None
  ) -> dict[str, Any]:
    """{'layers': a stack, absent for none, 'head': ...}, random."""
    del query
    rng_layers, rng_head = jax.random.split(rng)
    width = ts.tokens.shape[-1]
    params: dict[str, Any] = {'head': init_head(rng_head, width)}
    if self.refiner_layers:
      params['layers'] = decoder_layers.init(
        rng_layers, self.layer, width, self.refiner_layers
      )
    return params

  def example(self) -> interface.Example:
    """Without refiner layers, so that tokens are copied."""
    small = dataclasses.replace(
      self,
      refiner_layers=0,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      intermediate_size=16,
      sections=(1, 1, 1, 1),
    )
    return interface.Example(reducer=small)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    states, logits = sieve(given.params, ts, self)
    return reduce_joint(ts, states, logits, budget, self, given.rng)


def params_from_decoder(
  rng: jax.Array,
  decoder: decoder_layers.Variables,
  width: int,
  config: EchoingPixelsConfig,
) -> dict[str, Any]:
  """The refiner as copies of a decoder's first layers, and a random head.

  Args:
    rng: of the head.
    decoder: its stacked layers.
    width: C.
    config: says how many layers.

  Raises:
    ValueError: the decoder has fewer.
  """
  L = decoder_layers.number(decoder)
  if config.refiner_layers > L:
    raise ValueError(
      f'params_from_decoder: refiner_layers={config.refiner_layers} of a '
      f'decoder with {L}; it must have as many. Use {L} or fewer.'
    )
  params: dict[str, Any] = {'head': init_head(rng, width)}
  if config.refiner_layers:
    params['layers'] = decoder_layers.part(decoder, 0, config.refiner_layers)
  return params


def init_head(rng: jax.Array, width: int) -> dict[str, jax.Array]:
  """{'scale' (C,), 'w1' (C, C), 'w2' (C, 1)}."""
  rng1, rng2 = jax.random.split(rng)
  init = jax.nn.initializers.lecun_normal()
  return {
    'scale': jnp.ones((width,)),
    'w1': init(rng1, (width, width)),
    'w2': init(rng2, (width, 1)),
  }


def sieve(
  params: Any,
  ts: interface.TokenSet,
  config: EchoingPixelsConfig,
  answer: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Refines and scores a sequence.

  Args:
    params: of `init_params`.
    ts: text, video and audio in the order of the sequence.
    config: static.
    answer: (B, N) bool, tokens that are to be predicted: nobody sees them and
      they are not refined. None: there are none.

  Returns:
    Refined states (B, N, C), and logits z (B, N) float32.
  """
  tokens = jnp.where(ts.mask[..., None], ts.tokens, 0)
  refined = tokens
  seen = ts.mask if answer is None else ts.mask & ~answer
  if 'layers' in params:
    tables = sync_rope.tables(ts.positions, config.rope)

    def attend(q, k, v, _):
      return decoder_layers.masked_attention(q, k, v, seen[:, None]), None

    refined, _, _ = decoder_layers.run(
      config.layer, params['layers'], tokens, tables, attend
    )
  media = ts.mask & (modality_of(ts) != sync_rope.TEXT)
  asked = seen & jnp.any(media, axis=1, keepdims=True)
  states = jnp.where(asked[..., None], refined, tokens)
  return states, score(params['head'], states, config.norm_eps)


def score(head: Any, states: jax.Array, eps: float) -> jax.Array:
  """W2 silu(W1 rms_norm(h)): (B, N, C) -> (B, N) float32."""
  h = decoder_layers.rms_norm(states, head['scale'], eps)
  h = jax.nn.silu(h @ head['w1'].astype(h.dtype))
  return (h @ head['w2'].astype(h.dtype))[..., 0].astype(jnp.float32)


def modality_of(ts: interface.TokenSet) -> jax.Array:
  """(B, N) int32."""
  if ts.modality is None:
    return jnp.full(ts.mask.shape, sync_rope.VIDEO, jnp.int32)
  return ts.modality


def pool(
  ts: interface.TokenSet, config: EchoingPixelsConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Who competes (B, N), who always stays (B, N), and for how many places (B,).

  The number is ceil(budget * tokens), at least 1 of any, in exact arithmetic.
  """
  modality = modality_of(ts)
  media = ts.mask & (modality != sync_rope.TEXT)
  candidates = media
  if config.candidates == 'v':
    candidates = media & (modality == sync_rope.VIDEO)
  counted = media if config.base == 'av' else candidates
  n = jnp.sum(counted, axis=1, dtype=jnp.int32)
  share = fractions.Fraction(config.budget).limit_denominator(10_000)
  k = -(-n * share.numerator // share.denominator)
  number = jnp.sum(candidates, axis=1, dtype=jnp.int32)
  return candidates, ts.mask & ~candidates, jnp.minimum(k, number)


def relax(
  logits: jax.Array,
  candidates: jax.Array,
  k: jax.Array,
  config: EchoingPixelsConfig,
  rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The logits that are ranked, and y (B, N) float32, 0 off the candidates.

  Args:
    logits: (B, N).
    candidates: (B, N) bool.
    k: (B,) int32, for 'sigmoid'.
    config: relaxation and tau.
    rng: for 'gumbel'.
  """
  if config.relaxation == 'gumbel':
    assert rng is not None
    logits = logits + jax.random.gumbel(rng, logits.shape)
  ranked = jnp.where(candidates, logits, -jnp.inf)
  if config.relaxation == 'sigmoid':
    falling = -jnp.sort(-ranked, axis=1)
    at = jnp.clip(k - 1, 0, logits.shape[1] - 1)[:, None]
    threshold = jnp.take_along_axis(falling, at, axis=1)
    threshold = jnp.where(jnp.isfinite(threshold), threshold, 0.0)
    soft = jax.nn.sigmoid(
      (logits - jax.lax.stop_gradient(threshold)) / config.tau
    )
    return ranked, jnp.where(candidates, soft, 0.0)
  # Finite where nothing competes: softmax of nothing must have no NaN gradient.
  finite = jnp.where(candidates, logits, jnp.finfo(jnp.float32).min)
  soft = jax.nn.softmax(finite / config.tau, axis=1)
  return ranked, jnp.where(candidates, soft, 0.0)


@jax.custom_jvp
def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
  """`hard`, to the bit, with the gradient of `soft`."""
  del soft
  return hard


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
  return straight_through(*primals), tangents[1]


def reduce_joint(
  ts: interface.TokenSet,
  states: jax.Array,
  logits: jax.Array,
  budget: interface.Budget,
  config: EchoingPixelsConfig,
  rng: jax.Array | None = None,
) -> interface.Reduced:
  """One top-k over audio and video; text stays.

  Args:
    ts: the sequence.
    states: (B, N, C), what is kept of each token.
    logits: (B, N), higher is kept.
    budget: k counts text too; `config.budget_for(ts)` makes it.
    config: static.
    rng: for 'gumbel'.

  Returns:
    A Reduced whose aux has 'logits', 'soft' (y), 'kept_video' and 'kept_audio'
    (B,) int32, 'mean_gap' (B,), ids of time between neighbours that were kept,
    and 'entropy' (B,) of y.

  Raises:
    ValueError: outside jit, k_max is less than what always stays.
  """
  candidates, always, _ = pool(ts, config)
  text = jnp.sum(always, axis=1, dtype=jnp.int32)
  _check_room(text, budget.k_max)
  places = jnp.maximum(budget.counts(ts.mask.shape[0]) - text, 0)
  ranked, soft = relax(logits, candidates, places, config, rng)
  index, mask = primitives.select_topk(
    jnp.where(always, jnp.inf, ranked), ts.mask, budget.k_max, text + places
  )
  weight = straight_through(jnp.ones_like(soft), soft)
  weight = jnp.where(candidates, weight, 1.0)[..., None]
  kept = dataclasses.replace(ts, tokens=states * weight.astype(states.dtype))
  reduced = primitives.selected(kept, index, mask)
  aux = _aux(ts, reduced, candidates, logits, soft)
  return dataclasses.replace(reduced, aux=aux)


class Offsets(NamedTuple):
  """Two counters of decoding.

  position (B,) int32: of the next token, behind the WHOLE prompt.
  length (B,) int32: tokens in the caches, the kept ones.
  """

  position: jax.Array
  length: jax.Array


def offsets(ts: interface.TokenSet, reduced: interface.Reduced) -> Offsets:
  """Where decoding begins behind a reduced prompt."""
  last = jnp.max(jnp.where(ts.mask[..., None], ts.positions, -1), axis=(1, 2))
  return Offsets(position=last + 1, length=reduced.count)


@dataclasses.dataclass(frozen=True)
class Training:
  """The loss of the sieve and the decoder behind it.

  config: of the sieve.
  decode: (params, tokens (B, K, C), positions (B, K, P), mask (B, K)) ->
    logits (B, K, V), causal by the order of slots, with `config.rope`.
  """

  config: EchoingPixelsConfig
  decode: Callable[..., jax.Array]

  def loss(
    self,
    params: Any,
    ts: interface.TokenSet,
    labels: jax.Array,
    answer: jax.Array,
    budget: interface.Budget,
    rng: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token loss on what is kept; hand it to `training.step`.

    Args:
      params: {'sieve': of init_params, 'decoder': decode's}.
      ts: prompts with their answers.
      labels: (B, N) int32, the token's id where it is to be predicted, else
        negative.
      answer: (B, N) bool, tokens of the answers.
      budget: as of `reduce_joint`.
      rng: for 'gumbel'.
    """
    states, logits = sieve(params['sieve'], ts, self.config, answer)
    reduced = reduce_joint(ts, states, logits, budget, self.config, rng)
    out = self.decode(
      params['decoder'], reduced.tokens, reduced.positions, reduced.mask
    )
    kept_labels = primitives.gather(labels, reduced.index)
    loss = training.next_token_loss(out, kept_labels, reduced.mask)
    return loss, {name: jnp.mean(reduced.aux[name]) for name in ('entropy',)}


def _check_room(text: jax.Array, k_max: int) -> None:
  if isinstance(text, jax.core.Tracer):
    return
  most = int(np.max(np.asarray(text)))
  if most > k_max:
    raise ValueError(
      f'EchoingPixelsConfig: k_max={k_max} for {most} tokens that always stay; '
      'text is never dropped. Use a larger k_max, or budget=None.'
    )


def _aux(
  ts: interface.TokenSet,
  reduced: interface.Reduced,
  candidates: jax.Array,
  logits: jax.Array,
  soft: jax.Array,
) -> dict[str, jax.Array]:
  kept = (reduced.assignment >= 0) & candidates
  modality = modality_of(ts)

  def number(code):
    return jnp.sum(kept & (modality == code), axis=1, dtype=jnp.int32)

  time = ts.positions[..., 0]
  n = jnp.sum(kept, axis=1)
  most, least = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min
  first = jnp.min(jnp.where(kept, time, most), axis=1)
  last = jnp.max(jnp.where(kept, time, least), axis=1)
  span = jnp.where(n > 1, last - first, 0).astype(jnp.float32)
  safe = jnp.where(soft > 0, soft, 1.0)
  return {
    'logits': logits,
    'soft': soft,
    'kept_video': number(sync_rope.VIDEO),
    'kept_audio': number(sync_rope.AUDIO),
    'mean_gap': span / jnp.maximum(n - 1, 1).astype(jnp.float32),
    'entropy': -jnp.sum(soft * jnp.log(safe), axis=1),
  }

"""A decoder whose later layers see fewer visual tokens than its first.

  layers < K    all T tokens
  scores        attention of layer K - 1: of the last token of the prompt
                (FastV), or of the text tokens that rate (SparseVLM)
  layers >= K   the text and what the reducer leaves of the visual tokens, with
                their original positions

`prefill` does that in any number of stages, each with a cache of its own
length; afterwards `Decoder.hidden` decodes as ever, since a cache whose rows
are not at their positions is still all in the past. DyCoke's
pruning while decoding is in models.dynamic_decoder.

Blocks are scanned in runs, so that a run must end where a stage begins: `split`
cuts the variables once, outside jit. Sliding windows count tokens and would see
others behind the cut; models that have them are refused.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import interface
from jaxq.tokens import interface as tokens_lib
from jaxq.tokens import primitives, sparsevlm
from models import decoder

Params = Mapping[str, Any]
SCORING = ('last', 'raters')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A reduction in front of block `layer`, by the attention of the one before.

  reducer: its scores come from here. budget: static slots; None: its own.
  scoring: whose attention counts, of SCORING.
  """

  layer: int
  reducer: tokens_lib.Config
  budget: tokens_lib.Budget | None = None
  scoring: str = 'last'

  def __post_init__(self):
    if self.layer < 1 or self.scoring not in SCORING:
      raise ValueError(
        f'Stage: layer={self.layer}, scoring={self.scoring!r}; allowed are '
        f'layer >= 1 and {sorted(SCORING)}.'
      )


@flax.struct.dataclass
class Stream:
  """What flows between the blocks.

  x (B, T, C). positions (B, T, ...) int32, negative at padding. visual (B, T)
  bool. source (B, T) int32: index in the prompt; -1: synthesized or padding.
  """

  x: jax.Array
  positions: jax.Array
  visual: jax.Array
  source: jax.Array

  @property
  def mask(self) -> jax.Array:
    """(B, T) bool, False at padding."""
    return valid(self.positions)


@flax.struct.dataclass
class Prefilled:
  """sequence: behind the last block. caches: of each run. last: (B, C), the
  output at the last token of each prompt. reduced: of each stage.
  """

  sequence: Stream
  last: jax.Array
  caches: Any
  reduced: tuple[tokens_lib.Reduced, ...]


def stages_of(config: Any, num_visual: int) -> tuple[Stage, ...]:
  """The stages of FastV or SparseVLM for so many visual tokens.

  Raises:
    NotImplementedError: another reducer; it works in front of the decoder.
  """
  if isinstance(config, sparsevlm.SparseVlmConfig):
    return tuple(
      Stage(layer=layer, reducer=config, budget=budget, scoring='raters')
      for layer, budget in config.stages(num_visual)
    )
  layer = getattr(config, 'layer', 0)
  if not (layer and config.traits.scores):
    raise NotImplementedError(
      f'{type(config).__name__} inside a decoder: it names no layer; allowed '
      "are ['fastv', 'sparsevlm']. Use it in front of the decoder."
    )
  budget = tokens_lib.budget_from_ratio(num_visual, config.budget)
  return (Stage(layer=layer, reducer=config, budget=budget),)


def split(
  module: decoder.Decoder, variables: Params, layers: Sequence[int]
) -> tuple[decoder.Decoder, Params]:
  """The same model with runs that end before and behind each block `layer - 1`.

  Args:
    module: a decoder.
    variables: {'params', 'quant'}, stacked by its runs.
    layers: of the stages; DyCoke's is its layer + 1.

  Raises:
    ValueError: a layer that the model does not have.
    NotImplementedError: sliding windows.
  """
  config = module.config
  if any(config.sliding):
    raise NotImplementedError(
      'pruned_decoder: blocks with a sliding window count the tokens they see, '
      'and would see others behind dropped ones. Use a model without.'
    )
  for layer in layers:
    if not 0 < layer < config.num_layers:
      raise ValueError(
        f'pruned_decoder: layer={layer} of {config.num_layers}; allowed 1..'
        f'{config.num_layers - 1}. Name a layer of this model.'
      )
  runs = module.runs or config.kind_runs()
  cuts = {cut for layer in layers for cut in (layer - 1, layer)}
  out: dict[str, Any] = {
    'params': {
      name: leaf
      for name, leaf in variables['params'].items()
      if not name.startswith('blocks_')
    },
    'quant': {},
  }
  lengths: list[int] = []
  start = 0
  for i, length in enumerate(runs):
    inside = [c - start for c in sorted(cuts) if start < c < start + length]
    for a, b in zip([0, *inside], [*inside, length], strict=True):
      for kind in ('params', 'quant'):
        whole = variables.get(kind, {}).get(f'blocks_{i}', {})
        out[kind][f'blocks_{len(lengths)}'] = jax.tree.map(
          lambda leaf: leaf[a:b],  # noqa: B023
          whole,
        )
      lengths.append(b - a)
    start += length
  return module.clone(runs=tuple(lengths)), out


def prefill(
  module: decoder.Decoder,
  variables: Params,
  x: jax.Array,
  positions: jax.Array,
  visual: jax.Array,
  stages: Sequence[Stage],
  *,
  num_visual: int,
  num_text: int | None = None,
  capacity: int | None = None,
  kv_cache: interface.CacheConfig | None = None,
) -> Prefilled:
  """Runs a prompt through the blocks, reducing its visual tokens on the way.

  Args:
    module, variables: of `split`, for the layers of the stages.
    x: (B, T, C) embeddings of text and visual tokens.
    positions: (B, T) int32, negative at padding, which is behind the tokens.
    visual: (B, T) bool.
    stages: in order of their layers.
    num_visual: the most visual tokens of a row, static.
    num_text: the most other tokens of a row, static; None: T - num_visual,
      which is right where all rows have as many visual tokens.
    capacity: tokens the caches hold beside those of the prompt, each run's of
      its own; None: no caches.
    kv_cache: what the caches are; None: contiguous.

  Raises:
    ValueError: a stage that does not begin where a run ends.
  """
  sequence = Stream(
    x=x,
    positions=positions,
    visual=visual & valid(positions),
    source=jnp.broadcast_to(
      jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2]
    ),
  )
  num_text = x.shape[1] - num_visual if num_text is None else num_text
  raters = None
  if any(stage.scoring == 'raters' for stage in stages):
    raters = _raters(sequence, num_visual, num_text)
  runs = module.runs or module.config.kind_runs()
  todo = {stage.layer: stage for stage in stages}
  caches: list[Any] = []
  reduced: list[tokens_lib.Reduced] = []
  out: Any
  update: Any
  start = 0
  for i, length in enumerate(runs):
    stage = todo.pop(start + length, None)
    cache = None
    if capacity is not None:
      cache = _empty(module, i, sequence, capacity, kv_cache)
    if stage is None:
      out, update = module.apply(
        variables, i, sequence.x, sequence.positions, cache, method='run'
      )
    else:
      out, update, q, k = watched(module, variables, i, sequence, cache)
    if cache is not None:
      counts = jnp.sum(sequence.mask, axis=1, dtype=jnp.int32)
      caches.append(interface.append(cache, update, counts))
    sequence = dataclasses.replace(sequence, x=out)
    start += length
    if stage is not None:
      scores = _scores(module.config, stage, sequence, q, k, raters, num_text)
      sequence, found = _reduced(stage, sequence, scores, num_visual, num_text)
      num_visual = found.mask.shape[1]
      reduced.append(found)
  if todo:
    raise ValueError(
      f'pruned_decoder: no run of {tuple(runs)} blocks ends at layers '
      f'{sorted(todo)}; each stage begins at a new run. Call split with the '
      'layers of the stages.'
    )
  last = jnp.sum(sequence.mask, axis=1, dtype=jnp.int32)[:, None] - 1
  return Prefilled(
    sequence=sequence,
    last=primitives.gather(sequence.x, last)[:, 0],
    caches=tuple(caches) if capacity is not None else None,
    reduced=tuple(reduced),
  )


def attention_rows(
  config: decoder.DecoderConfig, q: jax.Array, k: jax.Array, seen: jax.Array
) -> jax.Array:
  """Attention weights of a few rows.

  Args:
    config: of the scores' scale and softcap.
    q: (B, R, H, D), behind the positions.
    k: (B, T, Hkv, D).
    seen: (B, R, T) bool; which keys a row sees.

  Returns:
    (B, H, R, T) float32, 0 where not seen.
  """
  B, R, H, D = q.shape
  Hkv = k.shape[2]
  scale = config.attention_scale
  grouped = q.reshape(B, R, Hkv, H // Hkv, D).astype(jnp.float32)
  logits = jnp.einsum(
    'brkgd,btkd->bkgrt',
    grouped * (D**-0.5 if scale is None else scale),
    k.astype(jnp.float32),
  ).reshape(B, H, R, -1)
  cap = config.attention_softcap
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  seen = seen[:, None]
  logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
  return jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0.0)


def watched(
  module: decoder.Decoder,
  variables: Params,
  i: int,
  sequence: Stream,
  cache: Any,
) -> tuple[jax.Array, Any, jax.Array, jax.Array]:
  """Run i, of one block, with its queries (B, T, H, D) and keys."""
  runs = module.runs or module.config.kind_runs()
  first = sum(runs[:i])
  if runs[i] != 1:
    raise ValueError(
      f'pruned_decoder: blocks {first}..{first + runs[i] - 1} are one run; the '
      'block whose attention is used must be one alone. Call split with the '
      'layers of the stages.'
    )
  block = decoder.Block(
    module.config, module.implementation, module.config.kind(first)
  )
  name = f'blocks_{i}'
  own = {
    kind: jax.tree.map(lambda leaf: leaf[0], tree.get(name, {}))
    for kind, tree in variables.items()
  }
  one = None if cache is None else jax.tree.map(lambda leaf: leaf[0], cache)
  (x, update), seen = block.apply(
    own, sequence.x, sequence.positions, one, mutable=['heads']
  )
  update = jax.tree.map(lambda leaf: leaf[None], update)
  heads = seen['heads']['attention']
  return x, update, heads['q'][0], heads['k'][0]


def _raters(sequence: Stream, num_visual: int, num_text: int) -> jax.Array:
  """Which tokens of the prompt rate (B, T), by their embeddings."""
  T = sequence.x.shape[1]
  text = sequence.mask & ~sequence.visual
  at_text, is_text = primitives.compact(text, num_text)
  at_visual, is_visual = primitives.compact(sequence.visual, num_visual)
  rates = sparsevlm.rate(
    primitives.gather(sequence.x, at_visual),
    primitives.gather(sequence.x, at_text),
    is_visual,
    is_text,
  )
  slot = primitives.scatter_slots(at_text, T)
  return primitives.gather(rates, slot)


def _scores(
  config: decoder.DecoderConfig,
  stage: Stage,
  sequence: Stream,
  q: jax.Array,
  k: jax.Array,
  raters: jax.Array | None,
  num_text: int,
) -> jax.Array:
  """Scores (B, T) of all tokens by the attention of q and k (B, T, H, D)."""
  T = q.shape[1]
  mask, column = sequence.mask, jnp.arange(T)[None]
  last = jnp.sum(mask, axis=1, dtype=jnp.int32)[:, None] - 1
  if stage.scoring == 'last':
    seen = mask & (column <= last)
    rows = primitives.gather(q, last)
    weights = attention_rows(config, rows, k, seen[:, None])
    return jnp.mean(weights[:, :, 0], axis=1)
  assert raters is not None
  text = mask & ~sequence.visual
  at, used = primitives.compact(text, num_text)
  seen = mask[:, None] & (column[None] <= at[..., None])
  weights = attention_rows(config, primitives.gather(q, at), k, seen)
  source = primitives.gather(sequence.source + 1, at) - 1
  rates = primitives.gather(raters, source) & used
  heads = getattr(stage.reducer, 'heads', None)
  return sparsevlm.scores_of(weights, rates, heads)


def _reduced(
  stage: Stage,
  sequence: Stream,
  scores: jax.Array,
  num_visual: int,
  num_text: int,
) -> tuple[Stream, tokens_lib.Reduced]:
  """The text with what a stage leaves of the visual tokens, in order."""
  at, is_visual = primitives.compact(sequence.visual, num_visual)
  trailing = sequence.positions.shape[2:]
  positions = primitives.gather(sequence.positions, at)
  if not trailing:
    positions = positions[..., None]
  ts = tokens_lib.token_set(
    primitives.gather(sequence.x, at), mask=is_visual, positions=positions
  )
  reduced = stage.reducer.reduce(
    ts, scores=primitives.gather(scores, at), budget=stage.budget
  )
  text, is_text = primitives.compact(sequence.mask & ~sequence.visual, num_text)
  own = primitives.gather(at + 1, reduced.index) - 1  # (B, K) in the sequence.
  # Twice its index is a token's place; what has none follows the last kept.
  after = jnp.max(jnp.where(own < 0, -1, 2 * own + 1), axis=1, keepdims=True)
  end = 2 * sequence.x.shape[1]
  place = jnp.concatenate(
    [
      jnp.where(is_text, 2 * text, end),
      jnp.where(reduced.mask, jnp.where(own < 0, after, 2 * own), end),
    ],
    axis=1,
  )
  order = jnp.argsort(place, axis=1, stable=True)
  order = jnp.where(jnp.take_along_axis(place, order, axis=1) < end, order, -1)

  def joined(values, slots):  # Of the text, and of the slots; 0 at padding.
    of_text = primitives.gather(values, text)
    return primitives.gather(jnp.concatenate([of_text, slots], axis=1), order)

  shape = (*reduced.mask.shape, *trailing)
  own_source = primitives.gather(sequence.source + 1, own)
  valid = (order >= 0).reshape(*order.shape, *(1,) * len(trailing))
  positions = joined(sequence.positions, reduced.positions.reshape(shape))
  return Stream(
    x=joined(sequence.x, reduced.tokens),
    positions=jnp.where(valid, positions, -1),
    visual=joined(sequence.visual, reduced.mask),
    source=joined(sequence.source + 1, own_source) - 1,
  ), reduced


def _empty(
  module: decoder.Decoder,
  i: int,
  sequence: Stream,
  capacity: int,
  kv_cache: interface.CacheConfig | None,
) -> Any:
  """The empty cache of run i, for the sequence and `capacity` more tokens."""
  B, T, _ = sequence.x.shape
  return decoder.init_caches(
    module.config, module.runs, B, T + capacity, module.dtype, kv_cache
  )[i]


def valid(positions: jax.Array) -> jax.Array:
  """positions (B, T, ...) -> (B, T) bool, False at padding."""
  return positions.reshape(*positions.shape[:2], -1)[..., 0] >= 0

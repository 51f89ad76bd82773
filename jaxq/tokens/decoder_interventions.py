"""Visual tokens in a decoder: updates left out, edges cut, layers skipped.

EmbedLens (arXiv 2603.00510) asks which of a language model's work on visual
tokens is needed, by leaving some of it out:

  skip    layer n's attention is sublayer n, its MLP n + 0.5. Where chosen, the
          update is 0: the state passes as it is, and still serves as a key.
  cut     weights from visual to visual tokens (`cut_visual`), or from text to
          visual ones (`cut_text`), are set to 0 behind the softmax. At layer 0
          the text's lost weight goes to the first visual token, a sink.
  entry   layers below e see text only, at the positions it has in the whole
          sequence; at layer e the projected tokens take their place.
  exit    from layer x on the visual tokens are gone.

With e = L/4 a quarter of the visual prefill is saved and layers below e keep a
cache of the text only: layers form runs that differ in what they do, each run a
scan with a cache of its own capacity. Everything but tokens, masks and the
chosen set is static.

`alignment` is the curve by which an entry layer is looked for: how near visual
tokens are to the text states of each layer (our reading; the paper gives no
rule).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.tokens import decoder_layers, primitives, sync_rope
from pallas_kernels.nearest_center import api as nearest_center


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervention:
  """What is left out; the defaults leave out nothing.

  skip: sublayers, multiples of 0.5.
  rows: with skip, computes only so many tokens, the first that are not chosen,
    and leaves the rest at 0: faster. None: all are computed.
  cut_visual, cut_text: layers.
  renormalise: whether the weights that are left sum to 1.
  entry_layer: e; 0: from the first.
  exit_layer: x; None: never.
  """

  skip: tuple[float, ...] = ()
  rows: int | None = None
  cut_visual: tuple[int, ...] = ()
  cut_text: tuple[int, ...] = ()
  renormalise: bool = False
  entry_layer: int = 0
  exit_layer: int | None = None

  def __post_init__(self):
    for sublayer in self.skip:
      if sublayer < 0 or 2 * sublayer != int(2 * sublayer):
        raise ValueError(
          f'Intervention: skip has sublayer {sublayer}; allowed are multiples '
          'of 0.5 from 0. Layer n is n for attention, n + 0.5 for the MLP.'
        )
    if self.exit_layer is not None and self.entry_layer >= self.exit_layer:
      raise ValueError(
        f'Intervention: entry_layer={self.entry_layer}, exit_layer='
        f'{self.exit_layer}; visual tokens must enter before they leave. '
        'Raise exit_layer, or leave it out.'
      )
    if self.entry_layer < 0:
      raise ValueError(
        f'Intervention: entry_layer={self.entry_layer}; allowed 0 or more. 0 '
        'shows the visual tokens to all layers.'
      )


# The sublayers that the paper skips for sinks, of 32 layers.
SINK_SKIPS = ((1.5,), (0.5, 1.0), (0.5, 1.0, 1.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """Where the visual tokens are: `length` of them from `start` on."""

  start: int
  length: int


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a layer does; layers in a row of one kind are one run."""

  present: bool
  skip_attention: bool
  skip_mlp: bool
  cut_visual: bool
  cut_text: bool
  keep_sink: bool


@flax.struct.dataclass
class RunCache:
  """Keys and values of a run of layers.

  k, v: (layers, B, S, Hkv, D). held: (B, S) bool, slots that hold a token.
  """

  k: jax.Array
  v: jax.Array
  held: jax.Array


@flax.struct.dataclass
class State:
  """Where a sequence stands: the runs' caches, and tokens decoded so far.

  position: (B, P) int32, the next token's; it follows the whole sequence,
  visual tokens included, however few of them a cache holds.
  """

  caches: tuple[RunCache, ...]
  decoded: jax.Array
  position: jax.Array


class Prefilled(NamedTuple):
  """x: the last layer's output, text only if the visual tokens have left.

  mask: (B, T') of its rows. state: to decode from.
  """

  x: jax.Array
  mask: jax.Array
  state: State


def runs_of(how: Intervention, num_layers: int) -> list[tuple[int, int, Kind]]:
  """(start, stop, kind) of runs of layers that do the same.

  Raises:
    ValueError: a layer that the model has not.
  """
  last = num_layers - 0.5
  layers = (*how.cut_visual, *how.cut_text, how.entry_layer)
  outside = [s for s in how.skip if s > last]
  outside += [n for n in layers if not 0 <= n < num_layers]
  if how.exit_layer is not None and how.exit_layer > num_layers:
    outside.append(how.exit_layer)
  if outside:
    raise ValueError(
      f'Intervention: {outside} for a model of {num_layers} layers; allowed '
      f'layers 0 to {num_layers - 1}, sublayers 0 to {last}, exit_layer at '
      f'most {num_layers}. Use fewer.'
    )
  leaves = num_layers if how.exit_layer is None else how.exit_layer
  out: list[tuple[int, int, Kind]] = []
  for n in range(num_layers):
    present = how.entry_layer <= n < leaves
    kind = Kind(
      present=present,
      skip_attention=n in how.skip,
      skip_mlp=n + 0.5 in how.skip,
      cut_visual=present and n in how.cut_visual,
      cut_text=present and n in how.cut_text,
      keep_sink=present and n == 0 and n in how.cut_text,
    )
    if out and out[-1][2] == kind:
      out[-1] = (out[-1][0], n + 1, kind)
    else:
      out.append((n, n + 1, kind))
  return out


def visual_work(how: Intervention, num_layers: int) -> float:
  """The share of layers whose prefill sees the visual tokens."""
  runs = runs_of(how, num_layers)
  return sum(stop - start for start, stop, k in runs if k.present) / num_layers


def prefill(
  config: decoder_layers.LayerConfig,
  rope: sync_rope.SyncRope,
  variables: decoder_layers.Variables,
  x: jax.Array,
  positions: jax.Array,
  mask: jax.Array,
  span: Span,
  how: Intervention,
  *,
  chosen: jax.Array | None = None,
  spare: int = 0,
) -> Prefilled:
  """The whole sequence through all layers.

  Args:
    config, rope: of the layers.
    variables: stacked layers.
    x: (B, T, C), embeddings with the projected tokens in their place.
    positions: (B, T, P) int32 of the whole sequence.
    mask: (B, T) bool, False: padding.
    span: where the visual tokens are.
    how: static.
    chosen: (B, T) bool, tokens whose updates are left out; None: the visual
      ones. With how.rows at most T - rows of a row may be left out of it.
    spare: slots of the caches for tokens to be decoded.

  Raises:
    ValueError: layers or span do not fit.
  """
  B, T, _ = x.shape
  if span.start < 0 or span.length < 1 or span.start + span.length > T:
    raise ValueError(
      f'prefill: {span} for T={T} tokens; the visual tokens must lie in 0 to '
      f'{T - 1}. Find them in this prompt.'
    )
  visual = _visual(span, T)  # (T,)
  if chosen is None:
    chosen = jnp.broadcast_to(jnp.asarray(visual)[None], (B, T))
  whole = (x, positions, mask, chosen)
  text = tuple(a[:, np.flatnonzero(~visual)] for a in whole)
  projected = x[:, span.start : span.start + span.length]
  caches = []
  x = whole[0] if how.entry_layer == 0 else text[0]
  present_before = how.entry_layer == 0
  for start, stop, kind in runs_of(how, decoder_layers.number(variables)):
    if kind.present and not present_before:
      x = jnp.concatenate(
        [x[:, : span.start], projected, x[:, span.start :]], axis=1
      )
    elif present_before and not kind.present:
      x = x[:, np.flatnonzero(~visual)]
    present_before = kind.present
    _, positions, mask, chosen = whole if kind.present else text
    x, k, v = _run(
      config,
      kind,
      how,
      decoder_layers.part(variables, start, stop),
      x,
      sync_rope.tables(positions, rope),
      mask,
      chosen,
      visual if kind.present else np.zeros(x.shape[1], bool),
    )
    pad = ((0, 0), (0, 0), (0, spare), (0, 0), (0, 0))
    caches.append(
      RunCache(
        k=jnp.pad(k, pad),
        v=jnp.pad(v, pad),
        held=jnp.pad(mask, ((0, 0), (0, spare))),
      )
    )
  last = jnp.max(jnp.where(whole[2][..., None], whole[1], -1), axis=(1, 2))
  position = jnp.broadcast_to(last[:, None] + 1, (B, whole[1].shape[-1]))
  state = State(caches=tuple(caches), decoded=jnp.int32(0), position=position)
  return Prefilled(x, mask, state)


def decode(
  config: decoder_layers.LayerConfig,
  rope: sync_rope.SyncRope,
  variables: decoder_layers.Variables,
  x: jax.Array,
  state: State,
  span: Span,
  how: Intervention,
  *,
  spare: int,
) -> tuple[jax.Array, State]:
  """One more text token through all layers.

  Args:
    config, rope, variables, span, how, spare: as for `prefill`; static but the
      variables.
    x: (B, 1, C), its embedding.
    state: `spare` tokens can be decoded from that of `prefill`.

  Returns:
    (B, 1, C), the last layer's output, and the next state.
  """
  caches = []
  tables = sync_rope.tables(state.position[:, None], rope)
  runs = runs_of(how, decoder_layers.number(variables))
  for (start, stop, kind), cache in zip(runs, state.caches, strict=True):
    S = cache.k.shape[2]
    slot = S - spare + state.decoded
    held = cache.held | (jnp.arange(S)[None] == slot)
    visual = _visual(span, S) if kind.present else np.zeros(S, bool)

    def attend(q, k, v, cached, slot=slot, held=held, visual=visual, kind=kind):
      # The new row is written in a copy; the stack is updated once, below.
      k_all = jax.lax.dynamic_update_slice(cached[0], k, (0, slot, 0, 0))
      v_all = jax.lax.dynamic_update_slice(cached[1], v, (0, slot, 0, 0))
      out = cut_attention(
        kind, how, q, k_all, v_all, held[:, None], np.zeros(1, bool), visual
      )
      return out, (k, v)

    x, (k, v), _ = decoder_layers.run(
      config,
      decoder_layers.part(variables, start, stop),
      x,
      tables,
      attend,
      (cache.k, cache.v),
    )
    at = (0, 0, slot, 0, 0)
    caches.append(
      RunCache(
        k=jax.lax.dynamic_update_slice(cache.k, k, at),
        v=jax.lax.dynamic_update_slice(cache.v, v, at),
        held=held,
      )
    )
  return x, State(
    caches=tuple(caches),
    decoded=state.decoded + 1,
    position=state.position + 1,
  )


def layer_states(
  config: decoder_layers.LayerConfig,
  rope: sync_rope.SyncRope,
  variables: decoder_layers.Variables,
  x: jax.Array,
  positions: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """The state in front of every layer and behind the last, (L + 1, B, T, C)."""
  T = x.shape[1]
  seen = jnp.tril(jnp.ones((T, T), bool))[None] & mask[:, None]
  tables = sync_rope.tables(positions, rope)
  layer = decoder_layers.Layer(config)

  def attend(q, k, v):
    return decoder_layers.masked_attention(q, k, v, seen), None

  def body(x, layer_variables):
    out, _ = layer.apply(layer_variables, x, tables, attend)
    return out, x

  last, states = jax.lax.scan(body, x, dict(variables))
  return jnp.concatenate([states, last[None]])


def alignment(tokens: jax.Array, states: jax.Array) -> jax.Array:
  """How near visual tokens are to the text of each layer.

  Args:
    tokens: (N, D), the alive ones, as given to the model.
    states: (L + 1, M, D), states of text tokens (`layer_states`).

  Returns:
    (L + 1,) float32, the mean over tokens of the largest cosine.
  """
  unit = primitives.normalize(tokens)

  def one(layer):
    values, _ = nearest_center.nearest_center(unit, primitives.normalize(layer))
    return jnp.mean(values)

  return jax.lax.map(one, states)


def entry_candidates(num_layers: int) -> tuple[int, ...]:
  """Entry layers to try on a dev set: 0, 1/8, ... 1/2 of the layers."""
  return tuple(sorted({i * num_layers // 8 for i in range(5)}))


def check_rows(how: Intervention, chosen: Any, mask: Any) -> None:
  """Raises ValueError if `how.rows` has no room for what is to be computed."""
  if how.rows is None:
    return
  needed = int(np.max(np.sum(np.asarray(mask) & ~np.asarray(chosen), axis=1)))
  if needed > how.rows:
    raise ValueError(
      f'Intervention: rows={how.rows}; {needed} tokens of a row are not '
      f'chosen and must be computed. Use rows={needed} or more.'
    )


def _visual(span: Span, T: int) -> np.ndarray:
  """(T,) bool, True at visual tokens."""
  at = np.arange(T)
  return (at >= span.start) & (at < span.start + span.length)


def _run(
  config: decoder_layers.LayerConfig,
  kind: Kind,
  how: Intervention,
  variables: decoder_layers.Variables,
  x: jax.Array,
  tables: sync_rope.Tables,
  mask: jax.Array,
  chosen: jax.Array,
  visual: np.ndarray,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x through layers of one kind; and their keys and values, layers first."""
  B, T, _ = x.shape
  layer = decoder_layers.Layer(config)
  causal = jnp.tril(jnp.ones((T, T), bool))[None] & mask[:, None]  # (B, T, T)
  rows = None
  if how.rows is not None and (kind.skip_attention or kind.skip_mlp):
    rows, _ = primitives.compact(~chosen & mask, how.rows)

  def attend(q, k, v, queries):
    seen, visual_q = causal, jnp.asarray(visual)[None]
    if queries is not None:
      at = jnp.maximum(queries, 0)
      seen = jnp.take_along_axis(causal, at[..., None], axis=1)
      visual_q = jnp.take(jnp.asarray(visual), at)
    out = cut_attention(kind, how, q, k, v, seen, visual_q, visual)
    return out, (k, v)

  def body(x, layer_variables):
    apply: Any = functools.partial(layer.apply, layer_variables)
    few = rows if kind.skip_attention else None
    out, kv = apply(
      x,
      tables,
      functools.partial(attend, queries=few),
      few,
      method='attention_update',
    )
    x = x + (_place(out, few, chosen, T) if kind.skip_attention else out)
    few = rows if kind.skip_mlp else None
    y = x if few is None else primitives.gather(x, few)
    out = apply(y, method='mlp_update')
    x = x + (_place(out, few, chosen, T) if kind.skip_mlp else out)
    return x, kv

  x, (k, v) = jax.lax.scan(body, x, dict(variables))
  return x, k, v


def _place(
  out: jax.Array, rows: jax.Array | None, chosen: jax.Array, T: int
) -> jax.Array:
  """An update (B, T or rows, C) with 0 for the chosen tokens: (B, T, C)."""
  if rows is None:
    return jnp.where(chosen[..., None], jnp.zeros((), out.dtype), out)
  return primitives.gather(out, primitives.scatter_slots(rows, T))


def cut_attention(
  kind: Kind,
  how: Intervention,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: jax.Array,
  visual_q: Any,
  visual_k: np.ndarray,
) -> jax.Array:
  """Attention less the edges that a kind of layer cuts.

  Args:
    kind, how: what is cut; static.
    q, k, v: (B, T, H, D), (B, S, Hkv, D), (B, S, Hkv, D).
    seen: (B, 1 or T, S) bool, keys that a query sees.
    visual_q: bool (T,) or (1 or B, T), queries that are visual.
    visual_k: (S,) bool.

  Returns:
    (B, T, H, D).
  """
  if not (kind.cut_visual or kind.cut_text):
    return decoder_layers.masked_attention(q, k, v, seen)
  weights = decoder_layers.attention_weights(q, k, seen)  # (B, H, T, S)
  of_visual = jnp.atleast_2d(jnp.asarray(visual_q))[:, None, :, None]
  to_visual = jnp.asarray(visual_k)[None, None, None]
  cut = jnp.zeros((1, 1, 1, 1), bool)
  if kind.cut_visual:
    cut = cut | (of_visual & to_visual)
  if kind.cut_text:
    cut = cut | (~of_visual & to_visual)
  left = jnp.where(cut, 0.0, weights)
  if kind.keep_sink:
    lost = jnp.sum(
      jnp.where(~of_visual & to_visual, weights, 0.0), axis=-1, keepdims=True
    )
    first = jnp.arange(len(visual_k)) == int(np.argmax(visual_k))
    left = left + jnp.where(first[None, None, None], lost, 0.0)
  if how.renormalise:
    total = jnp.sum(left, axis=-1, keepdims=True)
    left = left / jnp.where(total > 0, total, 1.0)
  return decoder_layers.weigh(left, v)

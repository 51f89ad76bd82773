"""Follow the Flow: edits of a text encoder's output, token by token.

"Follow the Flow: On Information Flow Across Textual Tokens in Text-to-Image
Models", ACL 2026, arXiv 2504.01137. C (S, d) is the encoding of a prompt, Cpad
that of the empty prompt, an item a word or name of a few tokens. Three edits:

  keep    C'_i = C_i of kept tokens, Cpad_i of the others: what do these carry?
  remove  the same, all but an item's redundant tokens kept: one or two tokens
          of an item mostly carry it, and images get better without the others
  clean   C'_i = Cclean_i' on the item's tokens, Cclean the item encoded alone:
          what leaked in from other items (a pool TABLE, a swimming pool) is out

None needs training of the image model; which tokens are redundant is told by
tokens.redundancy from examples. As a reducer, `compact` leaves the replaced
places out, so that the diffusion model's joint attention is over some 40 tokens
in place of 512. That is not the same as pads in their place, which may serve
the model as registers: both are here.

Edits are of whole batches and by static or traced indices alike; a keep mask of
None is no edit, one that is False everywhere replaces all.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.tokens import interface, primitives

PRESETS = ('full', 'tokens', 'pads', 'single', 'item')

Range = tuple[int, int]  # Tokens start..stop-1 of a prompt.


class Encoding(NamedTuple):
  """states (B, S, d) of one encoder; pooled (B, d'), or None if it has none."""

  states: jax.Array
  pooled: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FollowTheFlowConfig(interface.Config):
  """Keeps the tokens that carry their items.

  The scores say how little a token is redundant (`1 - redundancy.vote`).

  compact: True: replaced places are left out; False: they hold the encoding of
    the empty prompt, params (S, d) or (B, S, d); then K = N and the budget's k
    is how many are not replaced.
  least: tokens with a lower score go, however large the budget; None: the
    budget alone decides.
  """

  budget: float = 0.25
  compact: bool = True
  least: float | None = None

  @property
  def traits(self) -> interface.Traits:
    """A selector; in place it makes pads, which come from the encoder."""
    return interface.Traits(
      kind='selector' if self.compact else 'resampler',
      scores=True,
      params=not self.compact,
    )

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """A share of the places; in place all slots, and that share kept."""
    B, N = ts.mask.shape
    share = interface.budget_from_ratio(N, self.budget)
    if self.compact:
      return share
    return interface.Budget(k_max=N, k=jnp.full((B,), share.k_max, jnp.int32))

  def init_params(
    self, rng: jax.Array, ts: interface.TokenSet, query: jax.Array | None = None
  ) -> jax.Array | None:
    """An empty prompt's encoding of zeros, (S, d); none if compact."""
    del rng, query
    return None if self.compact else jnp.zeros(ts.tokens.shape[1:])

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    assert given.scores is not None
    B, N = ts.mask.shape
    if not self.compact and budget.k_max != N:
      raise ValueError(
        f'FollowTheFlowConfig: k_max={budget.k_max} for N={N} places, with '
        f'compact=False; it must be N. Use Budget(k_max={N}, k=...), or '
        'compact=True.'
      )
    worth = ts.mask
    if self.least is not None:
      worth = worth & (given.scores >= self.least)
    index, mask = primitives.select_topk(
      given.scores, worth, budget.k_max, budget.counts(B)
    )
    if self.compact:
      return primitives.selected(ts, index, mask)
    keep = primitives.scatter_slots(index, N) >= 0
    pads = jnp.broadcast_to(given.params, ts.tokens.shape)
    place = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32)[None], (B, N))
    tokens = keep_tokens(ts.tokens, keep, pads.astype(ts.tokens.dtype))
    edited = interface.Reduced(
      tokens=tokens,
      mask=ts.mask,
      positions=ts.positions,
      size=ts.size,
      index=jnp.where(keep, place, -1),
      assignment=jnp.where(keep, place, -1),
      count=jnp.sum(ts.mask, axis=1, dtype=jnp.int32),
    )
    # Moves nothing unless there is padding between tokens.
    return primitives.packed(edited, N)


def keep_tokens(
  states: jax.Array, keep: jax.Array | None, pads: jax.Array
) -> jax.Array:
  """states (B, S, d) where keep (B, S), pads (B, S, d) elsewhere.

  pads are the encoding of the model's own empty prompt, place by place: with
  causal attention (CLIP) they differ from place to place. keep=None: no edit.
  """
  if keep is None:
    return states
  return jnp.where(keep[..., None], states, pads)


def preset(
  name: str, lengths: jax.Array, S: int, item: Range | None = None
) -> jax.Array:
  """The keep mask (B, S) of one of PRESETS.

  Args:
    name: 'full' all, 'tokens' the prompt, 'pads' what is behind it, 'item' the
      item's tokens, 'single' the first of them.
    lengths: (B,) int32, tokens of each prompt.
    S: places.
    item: of 'item' and 'single'.

  Raises:
    ValueError: another name, no item where one is needed, or one past S.
  """
  if name not in PRESETS:
    raise ValueError(
      f'preset: {name!r}; allowed {sorted(PRESETS)}. Use one of them.'
    )
  at = jnp.arange(S)[None]
  B = lengths.shape[0]
  if name in ('item', 'single'):
    if item is None:
      raise ValueError(
        f"preset: {name!r} without item; it needs the item's range. Pass "
        'item=match_span(...).'
      )
    start, stop = item if name == 'item' else (item[0], item[0] + 1)
    check_range('preset', (start, stop), S)
    return jnp.broadcast_to((at >= start) & (at < stop), (B, S))
  prompt = at < lengths[:, None]
  return {'full': jnp.ones((B, S), bool), 'tokens': prompt, 'pads': ~prompt}[
    name
  ]


def patch_rows(
  states: jax.Array, clean: jax.Array, source: jax.Array
) -> jax.Array:
  """Rows of other encodings in place of some.

  Args:
    states: (B, S, d).
    clean: (B, S', d).
    source: (B, S) int32, the row of clean that goes here; -1: none.
  """
  return jnp.where(
    source[..., None] >= 0, primitives.gather(clean, source), states
  )


def patch_source(S: int, patches: Sequence[tuple[Range, Range]]) -> np.ndarray:
  """The `source` (S,) of patches ((start, stop), (start', stop')).

  Raises:
    ValueError: a range past S, ranges of unequal length, ranges that overlap.
  """
  source = np.full(S, -1, np.int32)
  for into, of in patches:
    check_range('patch_source', into, S)
    if into[1] - into[0] != of[1] - of[0]:
      raise ValueError(
        f'patch_source: ranges {into} and {of}; both must have as many tokens. '
        'Find the same item in both prompts.'
      )
    if np.any(source[into[0] : into[1]] >= 0):
      raise ValueError(
        f'patch_source: {into} overlaps an earlier one of '
        f'{[p[0] for p in patches]}; a place can be patched once. Patch them '
        'one after the other.'
      )
    source[into[0] : into[1]] = np.arange(*of)
  return source


def patch_item(
  states: jax.Array, into: Range, clean: jax.Array, of: Range
) -> jax.Array:
  """One item of every row: states[into] = clean[of]; (B, S, d)."""
  source = patch_source(states.shape[1], [(into, of)])
  rows = jnp.broadcast_to(jnp.asarray(source)[None], states.shape[:2])
  return patch_rows(states, clean, rows)


def repair(
  encoding: Encoding,
  ids: Sequence[int],
  clean: Encoding,
  clean_ids: Sequence[int],
  item: Sequence[int],
  *,
  occurrence: int | None = None,
  clean_occurrence: int | None = None,
) -> Encoding:
  """Leak repair: an item's rows become those of the item encoded alone.

  Pads and the pooled vector stay those of the prompt.

  Args:
    encoding: of prompts that all have the same tokens (rows differ at most in
      what a batch adds).
    ids: of the prompt.
    clean: of the item alone, or of a template around it ("a photo of ...").
    clean_ids: of that text.
    item: token ids of the item.
    occurrence, clean_occurrence: which of several (`match_span`).

  Raises:
    ValueError: the item is not in both.
  """
  S = encoding.states.shape[1]
  if not find_spans(clean_ids, item):
    raise ValueError(
      f'repair: the item has ids {list(item)}, the clean prompt '
      f'{list(clean_ids)}; it must hold the same ids. Write the item as in the '
      'prompt, with its leading space.'
    )
  into = match_span(ids, item, occurrence=occurrence, limit=S)
  of = match_span(clean_ids, item, occurrence=clean_occurrence)
  states = patch_item(encoding.states, into, clean.states, of)
  return Encoding(states, encoding.pooled)


def merge_ranges(
  states: jax.Array, ranges: Sequence[Range], pads: jax.Array
) -> jax.Array:
  """The mean of each range at its first place, pads at its others."""
  S = states.shape[1]
  patch_source(S, [(r, (0, r[1] - r[0])) for r in ranges])  # Checks them.
  for start, stop in ranges:
    mean = jnp.mean(states[:, start:stop].astype(jnp.float32), axis=1)
    states = states.at[:, start].set(mean.astype(states.dtype))
    states = states.at[:, start + 1 : stop].set(pads[:, start + 1 : stop])
  return states


def find_spans(ids: Sequence[int], item: Sequence[int]) -> list[Range]:
  """Every place at which the item's ids stand."""
  n = len(item)
  return [
    (i, i + n)
    for i in range(len(ids) - n + 1)
    if n and list(ids[i : i + n]) == list(item)
  ]


def match_span(
  ids: Sequence[int],
  item: Sequence[int],
  *,
  variants: Sequence[Sequence[int]] = (),
  occurrence: int | None = None,
  limit: int | None = None,
) -> Range:
  """Where an item stands in a prompt.

  Args:
    ids: of the whole prompt, not cut.
    item: its token ids.
    variants: other ids of it, tried where the item is not found (with and
      without the leading space tokenizers are of two minds).
    occurrence: which one, from 0; None: there must be one only.
    limit: S, what the encoder takes.

  Raises:
    ValueError: it is absent, there are several, or the cut to S removed it.
  """
  for ids_of_item in (item, *variants):
    spans = find_spans(ids, ids_of_item)
    if spans:
      break
  else:
    raise ValueError(
      f'match_span: the item {[list(i) for i in (item, *variants)]} is not in '
      f'{list(ids)}; its ids must stand there in a row. Pass variants with and '
      'without a leading space.'
    )
  if occurrence is None and len(spans) > 1:
    raise ValueError(
      f'match_span: the item is at {[s[0] for s in spans]}; one place is '
      'needed. Say which with occurrence=0, 1, ...'
    )
  which = 0 if occurrence is None else occurrence
  if not 0 <= which < len(spans):
    raise ValueError(
      f'match_span: occurrence={which} of {len(spans)}; allowed 0 to '
      f'{len(spans) - 1}. Use one of them.'
    )
  if limit is not None and spans[which][1] > limit:
    raise ValueError(
      f'match_span: the item is at {spans[which]} and the prompt is cut to '
      f'S={limit} tokens; it must lie before. Shorten the prompt.'
    )
  return spans[which]


def edit_encoders(
  encodings: Mapping[str, Encoding],
  empty: Mapping[str, Encoding],
  keep: Mapping[str, jax.Array | None],
  *,
  probe: bool = True,
) -> dict[str, Encoding]:
  """A model with several encoders (FLUX: T5 and CLIP; SD3: three).

  Args:
    encodings: of the prompts, by encoder.
    empty: of the empty prompt, by encoder, of as many rows.
    keep: (B, S) by encoder; None or absent: this encoder is not edited.
    probe: True: no other path may carry the text, so an edited encoder's pooled
      vector becomes that of the empty prompt. False, to remove redundant
      tokens: it stays.
  """
  out = {}
  for name, encoding in encodings.items():
    mask = keep.get(name)
    states = keep_tokens(encoding.states, mask, empty[name].states)
    swap = probe and mask is not None
    pooled = empty[name].pooled if swap else encoding.pooled
    out[name] = Encoding(states, pooled)
  return out


def encode_together(
  encode: Callable[[jax.Array], Encoding],
  prompts: jax.Array,
  empty: jax.Array,
  items: jax.Array,
) -> tuple[Encoding, Encoding, Encoding]:
  """Prompts (B, S), the empty prompt (S,) and items (M, S) in one batch.

  Returns:
    Their encodings; that of the empty prompt repeated for each prompt.
  """
  B = prompts.shape[0]
  batch = encode(jnp.concatenate([prompts, empty[None], items]))

  def rows(index):
    return jax.tree.map(lambda a: a[index], batch)

  return (
    rows(np.arange(B)),
    rows(np.full(B, B)),
    rows(np.arange(B + 1, B + 1 + items.shape[0])),
  )


def skipped_state(
  states: jax.Array, skip: int, final_norm: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """The encoder without its last `skip` layers: final_norm(state -(skip + 1)).

  states (L + 1, B, S, d), the embeddings first. Raises ValueError past L.
  """
  L = states.shape[0] - 1
  if not 0 <= skip <= L:
    raise ValueError(
      f'skipped_state: skip={skip} of an encoder with {L} layers; allowed 0 to '
      f'{L}. Use fewer.'
    )
  return final_norm(states[-(skip + 1)])


def front_padded(
  item: Sequence[int], start: int, S: int, neutral: int, pad: int
) -> list[int]:
  """Ids (S,) with an item at the place it has in a prompt.

  For encoders with absolute positions (CLIP): the item alone would carry the
  position 0.

  Raises:
    ValueError: it does not fit.
  """
  check_range('front_padded', (start, start + len(item)), S)
  ids = [neutral] * start + list(item)
  return ids + [pad] * (S - len(ids))


def context_cosine(
  states: jax.Array, into: Range, clean: jax.Array, of: Range
) -> jax.Array:
  """How much an item's rows are those of it alone: (B,), the mean cosine.

  High: the item is isolated. Low: something flowed in from the prompt.
  """
  a = primitives.normalize(states[:, into[0] : into[1]])
  b = primitives.normalize(clean[:, of[0] : of[1]])
  return jnp.mean(jnp.sum(a * b, axis=-1), axis=-1)


def leaks(
  shows: Callable[[jax.Array, int], np.ndarray],
  states: jax.Array,
  pads: jax.Array,
  into: Range,
  clean: jax.Array,
  of: Range,
  seeds: Sequence[int] = range(5),
) -> np.ndarray:
  """Rows whose item shows its right sense alone, but not within the prompt.

  Args:
    shows: (states (B, S, d), seed) -> (B,) bool: draws images of edited states
      and judges whether the item is in them, in its right sense.
    states, pads: of the prompts and of the empty prompt.
    into: the item in the prompts.
    clean: (B, S, d), the item alone; of: where.
    seeds: one image each; the majority counts.

  Returns:
    (B,) bool.
  """
  S = states.shape[1]
  at = np.arange(S)

  def majority(encoded, item):
    keep = jnp.asarray((at >= item[0]) & (at < item[1]))[None]
    alone = keep_tokens(encoded, keep, pads)
    return np.mean([shows(alone, seed) for seed in seeds], axis=0) > 0.5

  return majority(clean, of) & ~majority(states, into)


def check_range(owner: str, item: Range, S: int) -> None:
  """Raises ValueError unless 0 <= start < stop <= S."""
  if not 0 <= item[0] < item[1] <= S:
    raise ValueError(
      f'{owner}: range {item} of S={S} tokens; allowed are start < stop in 0 '
      f'to {S}. Find the item with match_span.'
    )

"""What reducers in front of the decoder are given: scores, and a class token.

  class     attention of a frame's class token (models.visual_tokens)
  received  attention that a patch gets from all patches
  peaks     density peaks among the tokens of a frame
  evidence  an oracle: 1 in frames that a question is answered from, else 0.1

A method that needs a class token gets the mean of those of the frames, in front
of all tokens; the decoder knows nothing of it, so its slot goes again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.tokens import density_peaks, interface, primitives
from models import vision_language, visual_tokens

SCORES = ('class', 'evidence', 'peaks', 'received')
_UNLIKELY = 0.1  # The oracle's score of other frames.


def scores_of(
  name: str,
  model: vision_language.VisionLanguageConfig,
  visual: visual_tokens.Visual,
  evidence: jax.Array | None = None,
) -> jax.Array:
  """Scores (B, N) of the tokens, higher is kept.

  Args:
    name: of SCORES.
    model: whose tokens they are.
    visual: the tokens.
    evidence: (B, N) bool, for the oracle.
  """
  if name == 'received':
    return visual.received
  if name == 'peaks':
    tokens, mask = visual.tokens.tokens, visual.tokens.mask
    by_frame = (mask.shape[0], model.frames, -1)
    found = density_peaks.scores(
      tokens.reshape(*by_frame, tokens.shape[-1]), mask.reshape(by_frame)
    )
    return found.reshape(mask.shape)
  if name == 'evidence':
    assert evidence is not None
    frames = evidence.reshape(evidence.shape[0], model.frames, -1)
    relevant = jnp.any(frames, axis=2, keepdims=True)
    scores = jnp.where(relevant, 1.0, _UNLIKELY)
    return jnp.broadcast_to(scores, frames.shape).reshape(evidence.shape)
  return visual.class_scores


def with_class(visual: visual_tokens.Visual) -> interface.TokenSet:
  """The tokens behind a class token, the mean of those of the frames."""
  ts = visual.tokens
  first = jnp.mean(visual.class_tokens, axis=1, keepdims=True)
  grow: Callable[[Any], Any] = lambda a: jnp.pad(
    a, ((0, 0), (1, 0)) + ((0, 0),) * (a.ndim - 2)
  )
  return interface.token_set(
    jnp.concatenate([first, ts.tokens], axis=1),
    mask=jnp.pad(ts.mask, ((0, 0), (1, 0)), constant_values=True),
    positions=grow(ts.positions),
    keys=None if ts.keys is None else grow(ts.keys),
    grid=ts.grid,
    special=1,
  )


def without_first(reduced: interface.Reduced) -> interface.Reduced:
  """Less the slot of source token 0, of which the decoder knows nothing."""
  reduced = dataclasses.replace(
    reduced,
    mask=reduced.mask & (reduced.index != 0),
    index=jnp.where(reduced.index > 0, reduced.index - 1, -1),
    assignment=reduced.assignment[:, 1:],
  )
  return primitives.packed(reduced, reduced.mask.shape[1])

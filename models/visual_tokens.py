"""Between a vision-language model's projector and its decoder.

`visual_of` gives the visual tokens of videos with what reducers ask for: scores
of the class tokens, attention received, keys. Whatever is left of them,
`answer` reads it with its positions and mask, and `generate` goes on from it
with keys and values in a cache; `answer_pruned` drops tokens inside the
decoder, in front of a block (FastV, Chen et al., 2024, arXiv 2403.06764).

All are functions for use under jit.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import contiguous
from jaxq.kvcache import interface as cache_interface
from jaxq.tokens import interface, primitives, sync_rope
from models import vision_language

Params = vision_language.Params
Config = vision_language.VisionLanguageConfig


@flax.struct.dataclass
class Visual:
  """The visual tokens of videos and what reducers may ask of the encoder.

  tokens: projected, with their keys (mean over heads, next to last block).
  class_scores (B, N): attention of each frame's class token to its patches in
    the next to last block, summed over heads; a frame's sum to H less its own.
  received (B, N): attention that a patch gets there from all patches, mean.
  features (B, N, Cv): before the projector.
  class_tokens (B, T, C): of the frames, projected; the decoder was not trained
    with any.
  """

  tokens: interface.TokenSet
  class_scores: jax.Array
  received: jax.Array
  features: jax.Array
  class_tokens: jax.Array


def visual_of(
  config: Config,
  params: Params,
  frames: jax.Array,
  audio: jax.Array | None = None,
) -> Visual:
  """Encodes and projects frames (B, T, height, width).

  audio: (B, T, A, audio_size), of a model that hears. Its tokens stand behind
    the video's, with scores and keys of 0; there is then no grid.
  """
  model, variables = _model(config), {'params': params}
  features, updated = model.apply(
    variables, frames, method='features', mutable=['tapped']
  )
  B, T, S, Cv = features.shape
  layer = f'blocks_{max(config.vision_layers - 2, 0)}'
  q, k = (
    updated['tapped']['tower'][layer]['attention'][f'{name}_proj']['out']
    .reshape(B, T, S, config.vision_heads, -1)
    .astype(jnp.float32)
    for name in 'qk'
  )
  logits = jnp.einsum('btshd,btrhd->bthsr', q, k) / math.sqrt(q.shape[-1])
  weights = jax.nn.softmax(logits, axis=-1)  # (B, T, H, S, S)
  patches = features[:, :, 1:].reshape(B, -1, Cv)
  tokens = model.apply(variables, patches, method='project')
  positions = model.apply(variables, frames, method='visual_positions')
  N = patches.shape[1]
  heard = 0
  if audio is not None:
    tokens, positions = model.apply(
      variables, tokens, positions, audio, method='with_audio'
    )
    heard = tokens.shape[1] - N

  def padded(a):  # Sounds have neither keys nor scores.
    return jnp.pad(a, ((0, 0), (0, heard)) + ((0, 0),) * (a.ndim - 2))

  kinds = np.repeat([sync_rope.VIDEO, sync_rope.AUDIO], [N, heard])
  class_scores = jnp.sum(weights[:, :, :, 0, 1:], axis=2)
  received = jnp.mean(weights[:, :, :, 1:, 1:], axis=(2, 3))
  return Visual(
    tokens=interface.token_set(
      tokens,
      positions=positions,
      modality=jnp.broadcast_to(
        jnp.asarray(kinds, jnp.int32)[None], tokens.shape[:2]
      ),
      keys=padded(jnp.mean(k[:, :, 1:], axis=3).reshape(B, N, -1)),
      grid=None if heard else (T, config.rows, config.columns),
    ),
    class_scores=padded(class_scores.reshape(B, N)),
    received=padded(received.reshape(B, N)),
    features=patches,
    class_tokens=model.apply(variables, features[:, :, 0], method='project'),
  )


def question_of(config: Config, params: Params, text: jax.Array) -> jax.Array:
  """Embeddings (..., L, C) of text (..., L): what query-aware reducers get."""
  return _model(config).apply({'params': params}, text, method='embed_text')


def answer(
  config: Config,
  params: Params,
  visual: interface.TokenSet | interface.Reduced,
  text: jax.Array,
) -> jax.Array:
  """Logits (B, Q, L, V) of text (B, Q, L), read from reduced or all tokens."""
  return _model(config).apply(
    {'params': params},
    visual.tokens,
    visual.positions,
    visual.mask,
    text,
    method='decode',
  )


def answer_pruned(
  config: Config,
  params: Params,
  visual: interface.TokenSet,
  text: jax.Array,
  reducer: interface.Reducer,
  *,
  layer: int,
  budget: interface.Budget | None = None,
  rows: jax.Array | None = None,
) -> tuple[jax.Array, interface.Reduced]:
  """Logits where the decoder drops visual tokens in front of block `layer`.

  The scores are the attention of rows of the question to the visual tokens in
  the block before, mean over heads and rows.

  Args:
    config, params: of the model.
    visual: all tokens.
    text: (B, L), one question a row.
    reducer: a selector that takes scores.
    layer: K, 1..num_layers - 1.
    budget: of the reducer; None: its own.
    rows: (B, L) bool, whose attention counts: the question's last token
      (FastV), raters (SparseVLM); None: the last of L.

  Raises:
    ValueError: layer out of range.
  """
  if not 0 < layer < config.num_layers:
    raise ValueError(
      f'answer_pruned: layer={layer}; scores come from the layer before, so '
      f'1..{config.num_layers - 1} are allowed. Choose one of these.'
    )
  model = _model(config)
  variables = {'params': params}
  B, L = text.shape
  if rows is None:
    rows = jnp.broadcast_to(jnp.arange(L)[None] == L - 1, (B, L))
  x = model.apply(variables, text, method='embed_text')
  (hidden, x), updated = model.apply(
    variables,
    visual.tokens,
    visual.positions,
    visual.mask,
    x,
    1,
    range(layer),
    method='layers',
    mutable=['tapped'],
  )
  weights = updated['tapped'][f'blocks_{layer - 1}']['attention']['to_context']
  scores = primitives.masked_mean(weights, rows[..., None], axis=1)
  before = dataclasses.replace(visual, tokens=hidden)
  reduced = reducer.reduce(before, scores=scores, query=x, budget=budget)
  _, x = model.apply(
    variables,
    reduced.tokens,
    reduced.positions,
    reduced.mask,
    x,
    1,
    range(layer, config.num_layers),
    method='layers',
  )
  return model.apply(variables, x, method='logits'), reduced


def init_caches(
  config: Config,
  batch: int,
  capacity: int,
  kv_cache: cache_interface.CacheConfig | None = None,
) -> tuple[Any, ...]:
  """Empty caches, one per layer; None: contiguous."""
  kv_cache = contiguous.ContiguousConfig() if kv_cache is None else kv_cache
  shape = cache_interface.CacheShape(
    batch=batch,
    capacity=capacity,
    kv_heads=config.num_heads,
    head_dim=config.head_dim,
  )
  return tuple(kv_cache.init(shape) for _ in range(config.num_layers))


def generate(
  config: Config,
  params: Params,
  visual: interface.TokenSet | interface.Reduced,
  text: jax.Array,
  lengths: jax.Array,
  *,
  max_new_tokens: int,
  kv_cache: cache_interface.CacheConfig | None = None,
) -> jax.Array:
  """Continues text greedily, with keys and values in a cache.

  Args:
    config, params: of the model.
    visual: (B, K) tokens; slots that are not in use come last.
    text: (B, L), padded behind `lengths` (B,) tokens.
    lengths: at least 1.
    max_new_tokens: static.
    kv_cache: what keys and values are kept in; None: as they are.

  Returns:
    (B, max_new_tokens) int32.
  """
  model, variables = _model(config), {'params': params}
  (B, L), K = text.shape, visual.mask.shape[1]
  caches = init_caches(config, B, K + L + max_new_tokens, kv_cache)

  def step(x, positions, order, caches):
    return model.apply(variables, x, positions, order, caches, method='step')

  def places(first):  # (B, T): the same position on all axes.
    return jnp.broadcast_to(
      (config.text_start + first)[..., None], (*first.shape, 3)
    )

  count = jnp.sum(visual.mask, axis=1, dtype=jnp.int32)[:, None]
  order = jnp.where(visual.mask, jnp.arange(K)[None], -1)
  _, caches = step(visual.tokens, visual.positions, order, caches)
  own = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
  order = jnp.where(own < lengths[:, None], count + own, -1)
  x = model.apply(variables, text, method='embed_text')
  x, caches = step(x, places(own), order, caches)
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)

  def next_token(carry, i):
    last, caches = carry
    logits = model.apply(variables, last, method='logits')
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (B, 1)
    at = lengths[:, None] + i
    x = model.apply(variables, token, method='embed_text')
    x, caches = step(x, places(at), count + at, caches)
    return (x, caches), token[:, 0]

  _, tokens = jax.lax.scan(
    next_token, (last, caches), jnp.arange(max_new_tokens)
  )
  return tokens.T


def _model(config: Config) -> Any:
  """Any, as what `apply` returns depends on its arguments."""
  return vision_language.VisionLanguage(config)

"""Hidden states of the captions that a language model writes.

  x -> layers 0..l-1 -> state -> layers l..L-1 -> logits -> next token
                          |
                    soft token: what LangDC hands to another model

`describe` decodes a batch of prompts greedily into a static buffer and keeps
the state in front of layer l of every caption token; `teacher_forced` gives the
same states, and the logits, of captions that are known, in one pass.

Which state belongs to a token is a convention. 'consume': that at its own
position, where the model reads it (one pass more than tokens). 'predict': that
at the position before, which chose it. The LangDC reference decodes with the
second and trains with the first; here both take the same one.

A greedy model may repeat itself to the end of the buffer on an empty clip, and
then an empty clip costs most; `no_repeat` forbids n-grams to come twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import contiguous, interface
from jaxq.tokens import decoder_layers, sync_rope

CONVENTIONS = ('consume', 'predict')
LOOPS = ('scan', 'while')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionModel:
  """A causal language model as pure functions; static, hashable.

  embed: (params, ids (B, T)) -> (B, T, d).
  forward: (params, x (B, T, d), positions (B, T), caches, layer) -> (hidden
    (B, T, d), state in front of that layer (B, T, d), caches). Negative
    positions are padding behind a row's tokens. Without caches (None) it is
    differentiable.
  head: (params, hidden (..., d)) -> logits (..., V).
  init_caches: (batch, capacity) -> empty caches.
  num_layers: L. stop_id: the id that ends a caption.
  """

  embed: Callable[[Any, jax.Array], jax.Array]
  forward: Callable[..., tuple[jax.Array, jax.Array, Any]]
  head: Callable[[Any, jax.Array], jax.Array]
  init_caches: Callable[[int, int], Any]
  num_layers: int
  stop_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
  """How captions are written and what is kept of them.

  max_new: tokens of a caption at most (Lmax).
  layer: whose input is kept, 0 the embeddings, L the output (behind the final
    norm); negative ones count from behind, -1 is L.
  convention: of CONVENTIONS.
  no_repeat: n-grams that may not come twice; 0: all may.
  loop: 'while' ends with the longest caption, 'scan' always runs max_new steps.
  """

  max_new: int = 128
  layer: int = -9
  convention: str = 'consume'
  no_repeat: int = 0
  loop: str = 'while'

  def __post_init__(self):
    for name, allowed in (('convention', CONVENTIONS), ('loop', LOOPS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'Writing: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(allowed)}. Use {allowed[0]!r}.'
        )
    if self.max_new < 1 or self.no_repeat < 0 or self.no_repeat == 1:
      raise ValueError(
        f'Writing: max_new={self.max_new}, no_repeat={self.no_repeat}; max_new '
        'is at least 1, no_repeat 0 or at least 2. Use 128 and 0.'
      )

  def captured(self, num_layers: int) -> int:
    """`layer` as 0..L.

    Raises:
      ValueError: the model has no such layer.
    """
    layer = self.layer + num_layers + 1 if self.layer < 0 else self.layer
    if not 0 <= layer <= num_layers:
      raise ValueError(
        f'Writing: layer={self.layer} of a captioner with {num_layers} layers; '
        f'allowed {-num_layers - 1} to {num_layers}. Use {-1 - num_layers // 3}'
        ', which lies in the upper middle.'
      )
    return layer


@flax.struct.dataclass
class Prompt:
  """x: (B, P, d) embeddings, tokens first; lengths: (B,) int32 of them."""

  x: jax.Array
  lengths: jax.Array


@flax.struct.dataclass
class Captions:
  """soft: (B, Lmax, d), 0 behind a caption. ids: (B, Lmax), stop_id behind it.

  lengths: (B,) int32, without the stop id.
  """

  soft: jax.Array
  ids: jax.Array
  lengths: jax.Array

  @property
  def mask(self) -> jax.Array:
    """(B, Lmax) bool."""
    at = jnp.arange(self.ids.shape[1])[None]
    return at < self.lengths[:, None]


@functools.lru_cache  # Equal arguments share what is compiled for a model.
def model_of(
  config: decoder_layers.LayerConfig,
  *,
  num_layers: int,
  stop_id: int,
  theta: float = 1e6,
  kv_cache: interface.CacheConfig | None = None,
) -> CaptionModel:
  """A CaptionModel over tokens.decoder_layers.

  Its params are {'embedding' (V, d), 'layers': variables, 'final_norm' (d,)}
  and 'head' (d, V), or none where the head is the embedding.
  """
  kv_cache = contiguous.ContiguousConfig() if kv_cache is None else kv_cache
  rope = sync_rope.plain(config.head_dim, theta)

  def embed(params, ids):
    return jnp.take(params['embedding'], ids, axis=0)

  def forward(params, x, positions, caches, layer):
    tables = sync_rope.tables(jnp.maximum(positions, 0)[..., None], rope)
    T = x.shape[1]
    causal = jnp.tril(jnp.ones((1, T, T), bool))

    def attend(q, k, v, cache):
      if cache is None:
        return decoder_layers.masked_attention(q, k, v, causal), None
      return cache.attend(q, k, v, positions, interface.Scoring())

    hidden, updates, state = decoder_layers.run(
      config, params['layers'], x, tables, attend, caches, layer
    )
    assert state is not None
    if layer == num_layers:
      state = final_norm(params, state)
    if caches is not None:
      counts = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
      caches = interface.append(caches, updates, counts)
    return hidden, state, caches

  def final_norm(params, x):
    return decoder_layers.rms_norm(x, params['final_norm'], config.norm_eps)

  def head(params, hidden):
    table = params['head'] if 'head' in params else params['embedding'].T
    return final_norm(params, hidden) @ table

  def init_caches(batch, capacity):
    cache = kv_cache.init(
      interface.CacheShape(
        batch=batch,
        capacity=capacity,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
      )
    )
    return jax.tree.map(lambda a: jnp.stack([a] * num_layers), cache)

  return CaptionModel(
    embed=embed,
    forward=forward,
    head=head,
    init_caches=init_caches,
    num_layers=num_layers,
    stop_id=stop_id,
  )


def init_params(
  rng: jax.Array,
  config: decoder_layers.LayerConfig,
  *,
  num_layers: int,
  vocab: int,
  width: int,
) -> dict[str, Any]:
  """Random params of `model_of`, with a tied head."""
  rng_layers, rng_embed = jax.random.split(rng)
  return {
    'embedding': 0.02 * jax.random.normal(rng_embed, (vocab, width)),
    'layers': decoder_layers.init(rng_layers, config, width, num_layers),
    'final_norm': jnp.ones((width,)),
  }


def describe(
  model: CaptionModel, params: Any, prompt: Prompt, writing: Writing
) -> Captions:
  """Writes a caption per row; greedy, not differentiable.

  Args:
    model: static.
    params: its own.
    prompt: of any lengths.
    writing: static.
  """
  layer = writing.captured(model.num_layers)
  (B, P, d), Lmax = prompt.x.shape, writing.max_new
  params = jax.lax.stop_gradient(params)
  x = jax.lax.stop_gradient(prompt.x)
  at = jnp.arange(P, dtype=jnp.int32)[None]
  positions = jnp.where(at < prompt.lengths[:, None], at, -1)
  hidden, states, caches = model.forward(
    params, x, positions, model.init_caches(B, P + Lmax), layer
  )
  last = jnp.maximum(prompt.lengths - 1, 0)[:, None, None]
  hidden = jnp.take_along_axis(hidden, last, axis=1)  # (B, 1, d)
  state = jnp.take_along_axis(states, last, axis=1)[:, 0]
  token = jnp.argmax(model.head(params, hidden)[:, 0], axis=-1)
  # A row without a prompt has nothing to say.
  token = jnp.where(prompt.lengths > 0, token, model.stop_id).astype(jnp.int32)
  first = _Step(
    i=jnp.int32(0),
    token=token,
    state=state,
    done=token == model.stop_id,
    captions=Captions(
      soft=jnp.zeros((B, Lmax, d), states.dtype),
      ids=jnp.full((B, Lmax), model.stop_id, jnp.int32),
      lengths=jnp.zeros((B,), jnp.int32),
    ),
    caches=caches,
  )

  def step(now: _Step) -> _Step:
    place = jnp.where(now.done, -1, prompt.lengths + now.i)[:, None]
    hidden, states, caches = model.forward(
      params, model.embed(params, now.token[:, None]), place, now.caches, layer
    )
    own = states[:, 0] if writing.convention == 'consume' else now.state
    soft = jnp.where(now.done[:, None], jnp.zeros((), own.dtype), own)
    made = now.captions
    captions = Captions(
      soft=made.soft.at[:, now.i].set(soft),
      ids=made.ids.at[:, now.i].set(now.token),
      lengths=made.lengths + (~now.done).astype(jnp.int32),
    )
    logits = model.head(params, hidden)[:, 0]
    if writing.no_repeat:
      said = _said(captions.ids, now.i, writing.no_repeat, logits.shape[-1])
      logits = jnp.where(said, -jnp.inf, logits)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jnp.where(now.done, model.stop_id, token)
    return _Step(
      i=now.i + 1,
      token=token,
      state=states[:, 0],
      done=token == model.stop_id,
      captions=captions,
      caches=caches,
    )

  if writing.loop == 'scan':
    end, _ = jax.lax.scan(lambda s, _: (step(s), None), first, length=Lmax)
    return end.captions
  return jax.lax.while_loop(
    lambda s: (s.i < Lmax) & ~jnp.all(s.done), step, first
  ).captions


def teacher_forced(
  model: CaptionModel,
  params: Any,
  prompt: Prompt,
  ids: jax.Array,
  lengths: jax.Array,
  writing: Writing,
) -> tuple[Captions, jax.Array]:
  """The states of captions that are known; differentiable.

  Args:
    model, params, prompt, writing: as for `describe`.
    ids: (B, Lmax) int32; what is behind a caption does not matter.
    lengths: (B,) int32, without the stop id.

  Returns:
    Captions, and the logits (B, Lmax + 1, V): s predicts token s, that at a
    caption's length its end.
  """
  layer = writing.captured(model.num_layers)
  P, Lmax = prompt.x.shape[1], ids.shape[1]
  both = jnp.concatenate([prompt.x, model.embed(params, ids)], axis=1)
  # A caption starts behind ITS prompt, not behind the longest one.
  at = jnp.arange(P + Lmax, dtype=jnp.int32)[None]
  behind = at - prompt.lengths[:, None]
  source = jnp.where(behind < 0, at, jnp.minimum(P + behind, P + Lmax - 1))
  x = jnp.take_along_axis(both, source[..., None], axis=1)
  total = prompt.lengths + lengths
  positions = jnp.where(at < total[:, None], at, -1)
  hidden, states, _ = model.forward(params, x, positions, None, layer)
  first = prompt.lengths[:, None] + jnp.arange(Lmax + 1)[None] - 1
  first = jnp.maximum(first, 0)  # The position that predicts token s.
  own = first[:, 1:] if writing.convention == 'consume' else first[:, :-1]
  soft = jnp.take_along_axis(states, own[..., None], axis=1)
  logits = model.head(
    params, jnp.take_along_axis(hidden, first[..., None], axis=1)
  )
  mask = jnp.arange(Lmax)[None] < lengths[:, None]
  return (
    Captions(
      soft=jnp.where(mask[..., None], soft, jnp.zeros((), soft.dtype)),
      ids=jnp.where(mask, ids, model.stop_id),
      lengths=lengths,
    ),
    logits,
  )


@flax.struct.dataclass
class _Step:
  """Before step i: `token` is caption token i, chosen at `state`."""

  i: jax.Array
  token: jax.Array
  state: jax.Array
  done: jax.Array
  captions: Captions
  caches: Any


def _said(ids: jax.Array, i: jax.Array, n: int, vocab: int) -> jax.Array:
  """(B, V) bool: tokens that would complete an n-gram of ids[:, : i + 1]."""
  B, Lmax = ids.shape
  start = jnp.maximum(i - (n - 2), 0)
  suffix = jax.lax.dynamic_slice(ids, (0, start), (B, n - 1))
  padded = jnp.pad(ids, ((0, 0), (0, n - 1)))
  same = jnp.ones((B, Lmax), bool)
  for j in range(n - 1):
    same &= padded[:, j : j + Lmax] == suffix[:, j : j + 1]
  # The n-gram must be written in full, and the suffix be whole.
  end = jnp.arange(Lmax)[None] + (n - 1)
  same &= (end <= i) & (i >= n - 2)
  following = jnp.where(same, padded[:, n - 1 : n - 1 + Lmax], vocab)
  rows = jnp.arange(B)[:, None]
  return jnp.zeros((B, vocab), bool).at[rows, following].set(True, mode='drop')

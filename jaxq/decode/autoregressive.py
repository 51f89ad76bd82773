"""One token at a time, with a cache of static capacity.

  prefill   tokens (B, P) -> caches, logits of each row's last token
  step      anchor (B,)   -> next token (B,), caches one token longer

Between steps the caches hold every token of a row but the last one, the
anchor, which is the next step's input. Prompts of different lengths are padded
on the right to a power of two, so that few prefills are ever compiled; padding
has negative positions, and caches do not store it. A row that met a stop token
is frozen: what it is fed is padding, its length stays and it emits PAD, while
the others go on.

`stream` yields tokens as they come, `generate` runs the same step inside one
`lax.while_loop`; both give the same tokens, and a row gives the same alone
as in a batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decode import sampling as sampling_lib
from jaxq.parallel import arrays

PAD = -1
"""What a finished row emits; no token has this id."""

_MIN_BUCKET = 16
_CAPACITY_MULTIPLE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
  """A decoder as pure functions; static, hashable.

  forward: (variables, tokens (B, T), positions (B, T), caches) -> (hidden
    (B, T, C), caches). Negative positions are padding behind a row's tokens.
    Caches are a pytree in which every cache has a field `length`, whose last
    axis is B.
  head: (variables, hidden (..., C)) -> logits (..., V).
  init_caches: (batch, capacity) -> empty caches.
  max_position: the longest sequence the model can take.
  stop_ids: every id that ends a text (chat models have several).
  first_head: the head of the first new token, where it is another one (a
    speech model must not begin with the end); None: `head`.
  """

  forward: Callable[..., tuple[jax.Array, Any]]
  head: Callable[[Any, jax.Array], jax.Array]
  init_caches: Callable[[int, int], Any]
  max_position: int
  stop_ids: tuple[int, ...] = ()
  first_head: Callable[[Any, jax.Array], jax.Array] | None = None


@flax.struct.dataclass
class State:
  """Where B rows stand between two steps.

  anchor: (B,) int32, the last token, not in the caches yet.
  length: (B,) int32, tokens in the caches.
  done: (B,) bool.
  caches: what `init_caches` gives, filled.
  """

  anchor: jax.Array
  length: jax.Array
  done: jax.Array
  caches: Any


class Generated(NamedTuple):
  """tokens: (B, max_new_tokens) int32, PAD behind a row's stop token.

  lengths: (B,) int32, tokens before the PADs, the stop token included.
  """

  tokens: np.ndarray
  lengths: np.ndarray


def generate(
  model: LanguageModel,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: sampling_lib.Sampling = sampling_lib.GREEDY,
  key: jax.Array | None = None,
  capacity: int | None = None,
  prefill_chunk: int | None = None,
) -> Generated:
  """Continues prompts in one compiled loop.

  Args:
    model: static functions; equal models share compilations.
    variables: their first argument.
    prompts: token ids of each row, of any lengths.
    max_new_tokens: at most so many per row; static.
    sampling: how tokens are chosen; static.
    key: one random key, split over the rows, or (B,) keys, one per row. None:
      key 0.
    capacity: tokens a row of the caches can hold, static. None: what is
      needed, rounded up to a multiple of 128.
    prefill_chunk: prompt tokens that go through the model at a time, static;
      memory is that of one chunk, and a cache that compresses shows a chunk
      what it stored of those before. None: all at once.

  Returns:
    A Generated.

  Raises:
    ValueError: no prompt, an empty one, or more tokens than the capacity or
      the model's longest sequence.
  """
  state, keys = _start(
    model,
    variables,
    prompts,
    max_new_tokens,
    sampling,
    key,
    capacity,
    prefill_chunk,
  )
  tokens, lengths = _loop(
    model, sampling, max_new_tokens, variables, keys, state
  )
  tokens, lengths = arrays.fetch((tokens, lengths))
  return Generated(tokens=tokens, lengths=lengths)


def stream(
  model: LanguageModel,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: sampling_lib.Sampling = sampling_lib.GREEDY,
  key: jax.Array | None = None,
  capacity: int | None = None,
  prefill_chunk: int | None = None,
) -> Iterator[np.ndarray]:
  """Like `generate`, token by token; the arguments are checked at the call.

  Returns:
    An iterator over (B,) int32, at most max_new_tokens of them: the next token
    of each row, its stop token included, then PAD. It ends when all rows have.
  """
  state, keys = _start(
    model,
    variables,
    prompts,
    max_new_tokens,
    sampling,
    key,
    capacity,
    prefill_chunk,
  )

  def tokens(state):
    done = np.zeros(len(prompts), bool)
    for i in range(max_new_tokens):
      if i:
        state = _jitted_step(model, sampling, variables, keys, state)
      # One transfer; on the host before the next step takes its buffers.
      anchor, now_done = arrays.fetch((state.anchor, state.done))
      yield np.where(done, PAD, anchor).astype(np.int32)
      done = now_done
      if done.all():
        return

  return tokens(state)


def lower_step(
  model: LanguageModel,
  variables: Any,
  keys: Any,
  state: State,
  sampling: sampling_lib.Sampling = sampling_lib.GREEDY,
) -> jax.stages.Lowered:
  """Lowers the step that `stream` runs for each token; runs nothing.

  Args:
    model, sampling: as for `generate`.
    variables, keys, state: arrays, or shapes with shardings; keys (B,).
  """
  return _jitted_step.lower(model, sampling, variables, keys, state)


def bucket(length: int) -> int:
  """The padded length of a prompt: a power of two, at least 16."""
  return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


def _start(
  model,
  variables,
  prompts,
  max_new_tokens,
  sampling,
  key,
  capacity,
  prefill_chunk,
) -> tuple[State, jax.Array]:
  """Checks everything on the host, then prefills; returns the rows' keys."""
  capacity = _check(model, prompts, max_new_tokens, capacity)
  if prefill_chunk is not None and prefill_chunk < 1:
    raise ValueError(
      f'generate: prefill_chunk={prefill_chunk}; it must be at least 1. Leave '
      'it out for the whole prompt at once.'
    )
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  width = bucket(int(lengths.max()))
  chunk = min(prefill_chunk or width, width)
  width = -(-width // chunk) * chunk
  padded = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(padded, prompts, strict=True):
    row[: len(prompt)] = prompt
  keys = jax.random.key(0) if key is None else key
  if keys.ndim == 0:
    keys = jax.random.split(keys, len(prompts))
  if keys.shape != (len(prompts),):
    raise ValueError(
      f'generate: keys of shape {keys.shape} for {len(prompts)} prompts; '
      'allowed is one key, or one per prompt. Use jax.random.split.'
    )
  state = _prefill(
    model,
    sampling,
    (capacity, chunk),
    variables,
    keys,
    jnp.asarray(padded),
    jnp.asarray(lengths),
  )
  return state, keys


def _check(model, prompts, max_new_tokens: int, capacity: int | None) -> int:
  if not len(prompts) or not all(len(prompt) for prompt in prompts):
    raise ValueError(
      f'generate: prompts of {[len(p) for p in prompts]} tokens; at least one '
      'prompt is needed, each of at least one token. Give some text, or the '
      "model's BOS token."
    )
  if max_new_tokens < 1:
    raise ValueError(
      f'generate: max_new_tokens={max_new_tokens}; it must be at least 1.'
    )
  longest = max(len(prompt) for prompt in prompts)
  needed = longest + max_new_tokens
  for limit, name in (
    (model.max_position, "the model's longest sequence"),
    (capacity, 'the capacity of the caches'),
  ):
    if limit is not None and needed > limit:
      raise ValueError(
        f'generate: a prompt of {longest} tokens and max_new_tokens='
        f'{max_new_tokens} make {needed}; {name} is {limit}. Shorten the '
        'prompt, or ask for fewer tokens.'
      )
  if capacity is None:
    capacity = -(-needed // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE
  return capacity


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(model, sampling, sizes, variables, keys, tokens, lengths):
  (B, P), (capacity, chunk) = tokens.shape, sizes
  positions = jnp.arange(P, dtype=jnp.int32)[None]
  positions = jnp.where(positions < lengths[:, None], positions, -1)
  caches = model.init_caches(B, capacity)
  if chunk == P:
    with jax.named_scope('prefill'):
      x, caches = model.forward(variables, tokens, positions, caches)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
  else:
    last, caches = _prefill_chunks(
      model, chunk, variables, tokens, positions, lengths, caches
    )
  head = model.first_head or model.head
  token = sampling_lib.sample(head(variables, last), keys, lengths, sampling)
  return State(
    anchor=token,
    length=lengths,
    done=_is_stop(model, token),
    caches=_with_length(caches, lengths),
  )


def _prefill_chunks(
  model, chunk, variables, tokens, positions, lengths, caches
) -> tuple[jax.Array, Any]:
  """The hidden state (B, C) of each row's last token, and the caches."""
  B, P = tokens.shape

  def split(a):
    return a.reshape(B, P // chunk, chunk).swapaxes(0, 1)

  def body(carry, part):
    last, caches = carry
    tokens, positions = part
    x, caches = model.forward(variables, tokens, positions, caches)
    at = positions == lengths[:, None] - 1  # (B, chunk)
    index = jnp.argmax(at, axis=1)[:, None, None]
    mine = jnp.take_along_axis(x, index, axis=1)[:, 0]
    last = jnp.where(jnp.any(at, axis=1)[:, None], mine, last)
    return (last, caches), None

  parts = split(tokens), split(positions)
  x, _ = jax.eval_shape(
    model.forward, variables, parts[0][0], parts[1][0], caches
  )
  last = jnp.zeros((B, x.shape[-1]), x.dtype)
  (last, caches), _ = jax.lax.scan(body, (last, caches), parts)
  return last, caches


def _step(model, sampling, variables, keys, state: State) -> State:
  """Feeds the anchors and draws the next token of every unfinished row."""
  positions = jnp.where(state.done, -1, state.length)[:, None]
  with jax.named_scope('decode_step'):
    x, caches = model.forward(
      variables, state.anchor[:, None], positions, state.caches
    )
  length = jnp.where(state.done, state.length, state.length + 1)
  token = sampling_lib.sample(
    model.head(variables, x[:, 0]), keys, length, sampling
  )
  return State(
    anchor=jnp.where(state.done, state.anchor, token),
    length=length,
    done=state.done | _is_stop(model, token),
    caches=_with_length(caches, length),
  )


# The state is donated: a step writes one token into the caches it was given.
_jitted_step = jax.jit(_step, static_argnums=(0, 1), donate_argnums=4)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _loop(model, sampling, max_new_tokens, variables, keys, state):
  """Steps until all rows are done: tokens (B, max_new_tokens), lengths (B,)."""
  B = state.anchor.shape[0]
  tokens = jnp.full((B, max_new_tokens), PAD, jnp.int32)
  tokens = tokens.at[:, 0].set(state.anchor)

  def unfinished(carry):
    i, state, _ = carry
    return (i < max_new_tokens) & ~jnp.all(state.done)

  def body(carry):
    i, state, tokens = carry
    new = _step(model, sampling, variables, keys, state)
    emitted = jnp.where(state.done, PAD, new.anchor)
    return i + 1, new, tokens.at[:, i].set(emitted)

  _, _, tokens = jax.lax.while_loop(
    unfinished, body, (jnp.int32(1), state, tokens)
  )
  return tokens, jnp.sum(tokens != PAD, axis=1, dtype=jnp.int32)


def _is_stop(model: LanguageModel, token: jax.Array) -> jax.Array:
  """token (B,) -> (B,) bool."""
  if not model.stop_ids:
    return jnp.zeros(token.shape, bool)
  stops = jnp.asarray(model.stop_ids, jnp.int32)
  return jnp.any(token[:, None] == stops[None], axis=1)


def _with_length(caches: Any, length: jax.Array) -> Any:
  """Caches whose rows hold `length` (B,) tokens; the rest is garbage."""

  def is_cache(node):
    return hasattr(node, 'length')

  def fix(cache):
    return cache.replace(length=jnp.broadcast_to(length, cache.length.shape))

  return jax.tree.map(fix, caches, is_leaf=is_cache)

"""Scores and continues lists of requests, in few compiled programs.

The engine below lm-eval's `LM` (experiments/harness.py is that class), for any
causal language model given as functions. Requests come in all lengths, and XLA
compiles per shape, so that shapes are rationed:

  rows     always batch_size; the last batch is filled with copies
  tokens   sorted by length, padded on the right to one of a few buckets
  logits   only where a continuation is scored, again in a bucket

Padding lies behind every real token of a causal model, so no score sees it.
The longest requests come first: what does not fit in memory fails at once, and
the time left is overestimated rather than underestimated.

On a mesh the rows of a batch, scored or generated, are shared out over `data`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decode import autoregressive
from jaxq.decode import sampling as sampling_lib
from jaxq.eval import batches, perplexity

_MIN_BUCKET = 32
_MIN_SCORED = 16
_LOOK_EVERY = 8  # Tokens between two looks for a stop string.

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessConfig:
  """batch_size: rows of a step. max_length: longest sequence, in tokens."""

  batch_size: int = 8
  max_length: int = 2048

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(
        f'HarnessConfig: batch_size={self.batch_size}; it must be at least 1. '
        '8 is the default.'
      )
    if self.max_length < 2:
      raise ValueError(
        f'HarnessConfig: max_length={self.max_length}; it must be at least 2, '
        "as a token is scored from one before it. Give the model's own."
      )


class Score(NamedTuple):
  """log_likelihood: of a continuation, in nats. greedy: is it the argmax."""

  log_likelihood: float
  greedy: bool


def loglikelihoods(
  scorer: perplexity.Scorer,
  variables: Any,
  requests: Sequence[tuple[Sequence[int], Sequence[int]]],
  config: HarnessConfig,
  *,
  mesh: jax.sharding.Mesh | None = None,
  progress: Progress | None = None,
) -> list[Score]:
  """log p(continuation | context) of each request, in the order given.

  A sequence longer than max_length + 1 loses its first tokens.

  Args:
    scorer, variables: the model.
    requests: (context, continuation) token ids, neither empty.
    config: shapes.
    mesh: None, or rows are shared out over its axis 'data'.
    progress: called with (requests done, their number).

  Raises:
    ValueError: an empty part, a continuation longer than max_length, or a
      batch_size that the mesh does not divide.
  """
  _check_mesh(config, mesh)
  rows = [
    _row(i, context, continuation, config.max_length)
    for i, (context, continuation) in enumerate(requests)
  ]
  variables = batches.replicate(variables, mesh)
  scores: list[Score] = [Score(0.0, False)] * len(rows)
  done = 0
  for chosen in _by_length([len(row.tokens) for row in rows], config):
    # The last token of a row is only predicted, never fed.
    length = max(len(rows[i].tokens) for i in chosen) - 1
    scored = max(rows[i].scored for i in chosen)
    T = bucket(length, _MIN_BUCKET, config.max_length)
    R = bucket(scored, _MIN_SCORED, T)
    tokens, first, targets = _pad([rows[i] for i in chosen], T, R, config)
    place = functools.partial(batches.place, mesh=mesh)
    log_p, hits = _score(
      scorer, variables, place(tokens), place(first), place(targets)
    )
    log_p, hits = batches.fetch(log_p), batches.fetch(hits)
    for row, i in enumerate(chosen):
      n = rows[i].scored
      total = np.sum(log_p[row, :n], dtype=np.float64)
      scores[i] = Score(float(total), bool(np.all(hits[row, :n])))
    done += len(chosen)
    if progress is not None:
      progress(done, len(rows))
  return scores


def generate_until(
  model: autoregressive.LanguageModel,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  decode: Callable[[Sequence[int]], str],
  config: HarnessConfig,
  *,
  until: Sequence[str],
  max_new_tokens: int,
  sampling: sampling_lib.Sampling = sampling_lib.GREEDY,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  progress: Progress | None = None,
) -> list[str]:
  """Continues prompts up to the first stop string, which is cut off.

  A prompt that leaves no room loses its first tokens. A row's draws depend on
  the seed and on its place in `prompts`, not on the batch it falls into.

  Args:
    model, variables: the model; it ends a text at its own stop ids, too.
    prompts: token ids, none empty.
    decode: token ids -> text.
    config: shapes.
    until: stop strings; empty ones are ignored.
    max_new_tokens: at most so many.
    sampling: how tokens are chosen.
    seed: of the choice.
    mesh: None, or rows are shared out over its axis 'data'.
    progress: called with (prompts done, their number).

  Raises:
    ValueError: an empty prompt, max_new_tokens not in 1..max_length - 1, or a
      batch_size that the mesh does not divide.
  """
  _check_mesh(config, mesh)
  room = config.max_length - max_new_tokens
  if max_new_tokens < 1 or room < 1:
    raise ValueError(
      f'generate_until: max_new_tokens={max_new_tokens}, max_length='
      f'{config.max_length}; allowed 1..{config.max_length - 1}, as the prompt '
      'needs room. Ask for fewer tokens.'
    )
  variables = batches.replicate(variables, mesh)
  model = _by_rows(model, mesh)
  stops = [stop for stop in until if stop]
  kept = [list(prompt)[-room:] for prompt in prompts]
  keys = jax.random.split(jax.random.key(seed), max(len(kept), 1))
  texts = [''] * len(kept)
  done = 0
  for chosen in _by_length([len(prompt) for prompt in kept], config):
    filled = _filled(chosen, config)
    longest = max(len(kept[i]) for i in chosen)
    capacity = bucket(
      longest + max_new_tokens, 4 * _MIN_BUCKET, model.max_position
    )
    steps = autoregressive.stream(
      model,
      variables,
      [kept[i] for i in filled],
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      key=keys[np.array(filled)],
      capacity=capacity,
    )
    cut = _until(steps, len(chosen), decode, stops)
    for i, text in zip(chosen, cut, strict=True):
      texts[i] = text
    done += len(chosen)
    if progress is not None:
      progress(done, len(kept))
  return texts


def bucket(length: int, least: int, most: int) -> int:
  """The padded length: a power of two >= least, or `most` if that is less."""
  return min(max(least, 1 << (length - 1).bit_length()), most)


@functools.cache  # Equal models share their compilations.
def _by_rows(
  model: autoregressive.LanguageModel, mesh: jax.sharding.Mesh | None
) -> autoregressive.LanguageModel:
  """The model whose rows and caches are shared out over `data`."""
  if mesh is None:
    return model
  free = jax.sharding.PartitionSpec.UNCONSTRAINED

  def share(a: jax.Array, axis: int = 0) -> jax.Array:
    axes = ['data' if i == axis else free for i in range(a.ndim)]
    spec = jax.sharding.PartitionSpec(*axes)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(a, sharding)

  def share_cache(cache: Any) -> Any:
    lead = cache.length.shape  # (B,), layers in front of it.
    return jax.tree.map(
      lambda a: share(a, len(lead) - 1) if a.shape[: len(lead)] == lead else a,
      cache,
    )

  def forward(variables, tokens, positions, caches):
    x, caches = model.forward(
      variables, share(tokens), share(positions), caches
    )
    caches = jax.tree.map(
      share_cache, caches, is_leaf=lambda node: hasattr(node, 'length')
    )
    return share(x), caches

  return dataclasses.replace(model, forward=forward)


class _Row(NamedTuple):
  """tokens: context and continuation. scored: how many of the last ones."""

  tokens: list[int]
  scored: int


def _row(i: int, context, continuation, max_length: int) -> _Row:
  if not len(context) or not 1 <= len(continuation) <= max_length:
    raise ValueError(
      f'loglikelihoods: request {i} has {len(context)} context and '
      f'{len(continuation)} continuation tokens; allowed are at least 1 and '
      f'1..{max_length}. Put a BOS or end-of-text token before it, or cut it.'
    )
  tokens = [*context, *continuation][-(max_length + 1) :]
  return _Row(tokens=tokens, scored=len(continuation))


def _by_length(lengths: Sequence[int], config: HarnessConfig):
  """Yields the indices of each batch, longest first."""
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  for start in range(0, len(order), config.batch_size):
    yield order[start : start + config.batch_size]


def _filled(chosen: list[int], config: HarnessConfig) -> list[int]:
  """batch_size indices: the last batch is filled with copies of its first."""
  return chosen + chosen[:1] * (config.batch_size - len(chosen))


def _pad(rows: list[_Row], T: int, R: int, config: HarnessConfig):
  """tokens (B, T), first (B,) scored position, targets (B, R), all int32."""
  B = config.batch_size
  tokens, targets = np.zeros((B, T), np.int32), np.zeros((B, R), np.int32)
  first = np.zeros((B,), np.int32)
  for b, i in enumerate(_filled(list(range(len(rows))), config)):
    row = rows[i]
    fed = row.tokens[:-1]
    tokens[b, : len(fed)] = fed
    targets[b, : row.scored] = row.tokens[-row.scored :]
    first[b] = len(fed) - row.scored
  return tokens, first, targets


@functools.partial(jax.jit, static_argnums=0)
def _score(scorer, variables, tokens, first, targets):
  """tokens (B, T), first (B,), targets (B, R) -> log p, is argmax (B, R)."""
  R = targets.shape[1]
  x = scorer.score_fn(variables, tokens)  # (B, T, C)
  at = first[:, None] + jnp.arange(R, dtype=jnp.int32)[None]  # (B, R)
  at = jnp.minimum(at, tokens.shape[1] - 1)  # Behind a row: not looked at.
  x = jnp.take_along_axis(x, at[..., None], axis=1)  # (B, R, C)

  def score(x, targets):
    log_p = perplexity.log_probs(scorer.head_fn(variables, x))
    hit = jnp.argmax(log_p, axis=-1) == targets
    return -perplexity.nll_of(log_p, targets), hit

  return perplexity.in_chunks(score, perplexity.CHUNK, x, targets)


def _until(steps, num: int, decode, stops: list[str]) -> list[str]:
  """The first `num` rows of a stream as text, cut at their stop strings."""
  rows: list[list[int]] = [[] for _ in range(num)]
  ended = [False] * num
  for count, step in enumerate(steps, 1):
    for row, token in zip(rows, step[:num].tolist(), strict=True):
      if token != autoregressive.PAD:
        row.append(token)
    if count % _LOOK_EVERY == 0:
      ended = [
        end
        or token == autoregressive.PAD
        or any(stop in decode(row) for stop in stops)
        for end, row, token in zip(
          ended, rows, step[:num].tolist(), strict=True
        )
      ]
      if all(ended):
        break
  return [_cut(decode(row), stops) for row in rows]


def _cut(text: str, stops: list[str]) -> str:
  for stop in stops:
    text = text.split(stop)[0]
  return text


def _check_mesh(config: HarnessConfig, mesh: jax.sharding.Mesh | None) -> None:
  if mesh is not None and config.batch_size % mesh.shape['data']:
    raise ValueError(
      f'HarnessConfig: batch_size={config.batch_size} on a mesh with data:'
      f'{mesh.shape["data"]}; it must be a multiple. Choose batch_size='
      f'{mesh.shape["data"]}.'
    )

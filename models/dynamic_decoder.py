"""Decoding in which every new token looks at few of the visual tokens.

DyCoke's second stage (Tao et al., 2024, arXiv 2411.15024). The caches stay
whole. At each step the attention of one layer ranks the visual tokens that are
in its cache, and the layers behind it see the best of them and all text; where
the scores are like those of the step before, its choice is used again.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import contiguous, interface
from jaxq.tokens import dycoke, primitives
from jaxq.tokens import interface as tokens_lib
from models import decoder, pruned_decoder

Params = Mapping[str, Any]


@flax.struct.dataclass
class Watch:
  """What a step of `dynamic_step` leaves the next.

  scores (B, V) float32 of the visual tokens, chosen (B, V) bool, fresh (B,)
  bool: False until there was a step.
  """

  scores: jax.Array
  chosen: jax.Array
  fresh: jax.Array


def first_watch(batch: int, num_visual: int) -> Watch:
  """Before the first step."""
  return Watch(
    scores=jnp.zeros((batch, num_visual), jnp.float32),
    chosen=jnp.zeros((batch, num_visual), bool),
    fresh=jnp.zeros((batch,), bool),
  )


def dynamic_step(
  module: decoder.Decoder,
  variables: Params,
  x: jax.Array,
  positions: jax.Array,
  caches: tuple[contiguous.ContiguousCache, ...],
  visual: jax.Array,
  watch: Watch,
  config: dycoke.DycokeConfig,
) -> tuple[jax.Array, tuple[Any, ...], Watch]:
  """One new token, whose later layers look at few visual tokens.

  Args:
    module, variables: of `split` at config.layer + 1.
    x: (B, 1, C) embedding of the token.
    positions: (B, 1) int32.
    caches: contiguous, one per run, whole.
    visual: (B, S) bool, which slots hold visual tokens; at most V in a row.
    watch: of the step before.
    config: block `layer` gives the scores; blocks behind it see the share
      1 - prune of the visual tokens.

  Returns:
    The last block's output (B, 1, C), the caches with the token in all layers,
    and the watch.
  """
  runs = module.runs or module.config.kind_runs()
  B, V = watch.scores.shape
  S = visual.shape[1]
  keep = tokens_lib.budget_from_ratio(V, 1 - config.prune).k_max
  counts = jnp.sum(pruned_decoder.valid(positions), axis=1, dtype=jnp.int32)
  out: list[Any] = []
  index: jax.Array | None = None
  start = 0
  for i, (length, cache) in enumerate(zip(runs, caches, strict=True)):
    sequence = pruned_decoder.Stream(
      x=x, positions=positions, visual=visual, source=positions
    )
    if start == config.layer and length == 1:
      x, update, q, k = pruned_decoder.watched(
        module, variables, i, sequence, cache
      )
      held = jnp.arange(S)[None] < cache.length[0][:, None]
      keys = jnp.concatenate([cache.k[0].astype(k.dtype), k], axis=1)
      seen = jnp.concatenate([held, jnp.ones((B, 1), bool)], axis=1)
      weights = pruned_decoder.attention_rows(
        module.config, q, keys, seen[:, None]
      )
      watch = _choose(
        jnp.mean(weights[:, :, 0, :S], axis=1), visual & held, watch, config
      )
      slots, _ = primitives.compact(visual & held, V)
      chosen = jnp.zeros((B, S), bool)
      rows = jnp.arange(B)[:, None]
      chosen = chosen.at[rows, jnp.where(slots < 0, S, slots)].set(
        watch.chosen, mode='drop'
      )
      index, _ = primitives.compact(held & (chosen | ~visual), S - V + keep)
    elif index is None:
      x, update = module.apply(variables, i, x, positions, cache, method='run')
    else:
      few = _few(cache, index)
      x, update = module.apply(variables, i, x, positions, few, method='run')
    out.append(interface.append(cache, update, counts))
    start += length
  if index is None:
    raise ValueError(
      f'dynamic_step: no run of {tuple(runs)} blocks is block {config.layer} '
      'alone; its attention gives the scores. Call split with [layer + 1].'
    )
  return x, tuple(out), watch


def _choose(
  scores: jax.Array, visual: jax.Array, watch: Watch, config: Any
) -> Watch:
  """Which visual tokens (of scores (B, S)) the later layers see this step."""
  V = watch.scores.shape[1]
  keep = tokens_lib.budget_from_ratio(V, 1 - config.prune).k_max
  at, used = primitives.compact(visual, V)
  own = primitives.gather(scores, at)
  count = jnp.sum(used, axis=1, dtype=jnp.int32)
  k = jnp.minimum(count, keep)
  index, _ = primitives.select_topk(own, used, keep, k)
  chosen = primitives.scatter_slots(index, V) >= 0
  cosine = jnp.sum(
    primitives.normalize(own) * primitives.normalize(watch.scores), axis=-1
  )
  same = (watch.fresh & (cosine > config.similar))[:, None]
  return Watch(
    scores=own,
    chosen=jnp.where(same, watch.chosen, chosen),
    fresh=jnp.ones_like(watch.fresh),
  )


def _few(cache: Any, index: jax.Array) -> contiguous.ContiguousCache:
  """A stacked cache with the slots index (B, S') only."""
  rows = jax.vmap(primitives.gather, (0, None))
  length = jnp.sum(index >= 0, axis=1, dtype=jnp.int32)
  return contiguous.ContiguousCache(
    k=rows(cache.k, index),
    v=rows(cache.v, index),
    length=jnp.broadcast_to(length[None], cache.length.shape),
  )

"""Why more evidence can mean fewer right answers: noise that is needed.

A MosaicQA decoder was trained with all tokens, nine in ten of them noise, and
looks at noise where it has nothing to look for. So sets of tokens are given to
it as they are, chosen by what the cells hold (an oracle):

  digits + m noise   all cells with a digit, and m of the others, at random or
                     the first m
  random             K tokens
  class              K with the largest attention of their frame's class token,
                     what VisionZip and PruMerge go by
  class + even       three in four by it, the others evenly spaced

and beside the accuracy stand how many digits were kept; for questions of
presence whose answer is yes, how often one of the digits asked for was kept,
and of these how many were answered yes; and how many answers to questions of
presence are neither yes nor no. Last comes the attention that the question's
last token pays to noise, all tokens given.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments import mosaic_evaluation, training
from jaxq.data import mosaic
from jaxq.tokens import interface, primitives
from models import vision_language, visual_tokens

NOISE = (0, 1, 2, 4, 8, 16, 32)
_YES, _NO = mosaic.TOKENS['yes'], mosaic.TOKENS['no']


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Videos:
  """visual: of the model. text (B, Q, L). answers, kinds (B, Q). evidence
  (B, Q, N), digits (B, N) bool.
  """

  visual: visual_tokens.Visual
  text: jax.Array
  answers: np.ndarray
  kinds: np.ndarray
  evidence: np.ndarray
  digits: jax.Array


def load(trained: training.Trained, number: int) -> Videos:
  """Test videos behind the ViT, in one batch."""
  model = trained.model
  parts = list(mosaic_evaluation.batches(trained.data, number))
  batch = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
  see = jax.jit(visual_tokens.visual_of, static_argnums=0)
  digits = mosaic.token_evidence(
    batch['cells'] != mosaic.EMPTY, model.patch_size
  )
  return Videos(
    visual=see(model, trained.params, batch['frames']),
    text=jnp.asarray(batch['text']),
    answers=batch['targets'].max(axis=2),  # IGNORE is below any.
    kinds=batch['kind'],
    evidence=mosaic.token_evidence(batch['evidence'], model.patch_size),
    digits=jnp.asarray(digits),
  )


def choices(videos: Videos, K: int) -> dict[str, jax.Array]:
  """The sets (B, N) bool, by name.

  Raises:
    ValueError: K below 1 or above N.
  """
  digits, scores = videos.digits, videos.visual.class_scores
  N = digits.shape[1]
  if not 1 <= K <= N:
    raise ValueError(
      f'--kept={K} of N={N} tokens; allowed 1 to {N}. Choose one of these.'
    )
  draws = jax.random.uniform(jax.random.key(0), digits.shape)
  first = -jnp.broadcast_to(jnp.arange(N)[None], digits.shape)
  every = jnp.ones_like(digits)

  def best(scores, among, k):
    count = jnp.full((digits.shape[0],), k, jnp.int32)
    index, _ = primitives.select_topk(scores, among, max(k, 1), count)
    return primitives.scatter_slots(index, N) >= 0

  out = {'all': every}
  for m in NOISE:
    out[f'digits + {m} noise'] = digits | best(draws, ~digits, m)
  for m in (8, 16):
    out[f'digits + first {m} noise'] = digits | best(first, ~digits, m)
  out['random'] = best(draws, every, K)
  out['class'] = best(scores, every, K)
  most = best(scores, every, K - K // 4)
  rest = jnp.full((digits.shape[0],), K // 4, jnp.int32)
  out['class + even'] = most | primitives.spaced(~most, rest)
  return out


@jax.jit
def _reduced(ts: interface.TokenSet, keep: jax.Array) -> interface.Reduced:
  index, used = primitives.compact(keep, keep.shape[1])
  return primitives.selected(ts, index, used)


def measure(
  trained: training.Trained, videos: Videos, keep: jax.Array
) -> dict[str, float]:
  """What is answered from the tokens keep (B, N); see the module docstring."""
  reduced = _reduced(videos.visual.tokens, keep)
  answer = jax.jit(visual_tokens.answer, static_argnums=0)
  logits = answer(trained.model, trained.params, reduced, videos.text)
  said = np.asarray(_at_last(jnp.argmax(logits, axis=-1), videos.text))
  right, kept = said == videos.answers, np.asarray(keep)
  found = np.any(videos.evidence & kept[:, None], axis=-1)
  yes = videos.answers == _YES
  presence = videos.kinds == mosaic.KINDS.index('presence')
  return {
    'number': float(kept.sum(axis=1).mean()),
    'digits': float(kept[np.asarray(videos.digits)].mean()),
    'accuracy': float(right.mean()),
    'found': _mean(found[yes]),
    'right of found': _mean(right[yes & found]),
    'neither': _mean(~np.isin(said[presence], (_YES, _NO))),
  }


def attention(
  trained: training.Trained, videos: Videos
) -> list[dict[str, float]]:
  """The share on noise in each block, all tokens given, by kind of question."""
  model, text = trained.model, videos.text
  B, Q, L = text.shape
  module = vision_language.VisionLanguage(model)
  ts = videos.visual.tokens
  x = visual_tokens.question_of(model, trained.params, text)
  _, updated = jax.jit(
    lambda params, ts, x: module.apply(
      {'params': params},
      ts.tokens,
      ts.positions,
      ts.mask,
      x.reshape(B, Q * L, -1),
      Q,
      range(model.num_layers),
      method='layers',
      mutable=['tapped'],
    )
  )(trained.params, ts, x)
  noise = ~np.asarray(videos.digits)[:, None]
  out = []
  for i in range(model.num_layers):
    weights = updated['tapped'][f'blocks_{i}']['attention']['to_context']
    weights = _at_last(weights.reshape(B, Q, L, -1), text)  # (B, Q, N)
    share = np.sum(np.where(noise, np.asarray(weights), 0.0), axis=-1)
    out.append(
      {
        kind: float(share[videos.kinds == j].mean())
        for j, kind in enumerate(mosaic.KINDS)
        if (videos.kinds == j).any()
      }
    )
  return out


def _at_last(values: jax.Array, text: jax.Array) -> jax.Array:
  """values (B, Q, L, ...) at the last token of each question: (B, Q, ...)."""
  last = jnp.sum(text != mosaic.TOKENS['pad'], axis=2) - 1
  at = last.reshape(*last.shape, *(1,) * (values.ndim - 2))
  return jnp.take_along_axis(values, at, axis=2)[:, :, 0]


def _mean(values: np.ndarray) -> float:
  """The mean; of nothing, nan without a warning."""
  return float(values.mean()) if values.size else float('nan')

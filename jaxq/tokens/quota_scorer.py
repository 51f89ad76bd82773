"""How relevant each frame is to a question: scorers, and QuoTA's query.

Luo et al., 2025, https://arxiv.org/abs/2503.08689. The paper has the answering
model turn the question into a list of physical objects (`decouple_prompt`,
`parse_objects`), asks a small vision-language model of every frame whether it
contains any of them (`frame_prompt`), and takes the probability of "A", over
the whole vocabulary, as the relevance (`answer_probability`).

Any `FrameScorer` can stand in its place. Two cheap ones are here: cosine
similarity where frames and text share a space (`similarity`), and a light one
that is trained with frames known to be relevant (`light`, `light_loss`).
"""

import ast
import re
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxq.tokens import interface, primitives

_RANK = 64  # Width in which the light scorer compares.

_EXAMPLES = """\
Example 1. Question: What colour is the car that the man washes?
Step 1: yes. Step 2: car, man, colour. Step 3: ["car", "man"]
Example 2. Question: What is the mood of this video?
Step 1: no. Step 2: null. Step 3: null
Example 3. Question: Which animal comes after the dog? A. cat B. horse
Step 1: yes. Step 2: animal, dog, cat, horse. Step 3: ["dog", "cat", "horse"]
"""


class FrameScorer(Protocol):
  """Frames and a question to relevances."""

  def __call__(self, frames: Any, question: Any) -> jax.Array:
    """frames (T, ...) -> (T,) float32 in [0, 1]."""
    ...


def score_frames(
  scorer: FrameScorer, frames: Any, question: Any, batch: int = 64
) -> jax.Array:
  """Relevances (T,) of frames (T, ...), some at a time.

  The last batch is filled with copies of its last frame: one compile.
  """
  T, out = frames.shape[0], []
  batch = min(batch, T)
  for start in range(0, T, batch):
    index = np.minimum(np.arange(start, start + batch), T - 1)
    out.append(scorer(frames[index], question))
  return jnp.concatenate(out)[:T]


def answer_probability(
  logits: jax.Array, yes: int, no: int | None = None
) -> jax.Array:
  """P(yes) of last-position logits (..., V) -> (...) float32.

  Of the whole vocabulary as in the paper, or, with `no`, of the two only, which
  does not depend on how much a model likes to say something else. Logits of the
  last position need prompts that are padded on the left.
  """
  logits = logits.astype(jnp.float32)
  if no is None:
    return jax.nn.softmax(logits, axis=-1)[..., yes]
  return jax.nn.sigmoid(logits[..., yes] - logits[..., no])


def decouple_prompt(question: str) -> str:
  """Asks a language model which physical objects a question needs."""
  return (
    f'{question}\nAnswer in three steps.\n'
    'Step 1: is it necessary to detect specific physical entities to answer '
    'the question? Say yes or no.\n'
    'Step 2: if yes, list the objects.\n'
    'Step 3: keep physical entities only, as a list of strings, or null.\n'
    f'{_EXAMPLES}'
  )


def parse_objects(text: str) -> list[str]:
  """The objects of an answer to `decouple_prompt`; [] where there are none.

  Step 1 must say yes, and step 3 must hold a list of strings. The text of a
  model is read as literals and never run. What is malformed counts as none.
  """
  if not re.search(r'step\s*1\W*\s*yes\b', text, re.IGNORECASE):
    return []
  step3 = re.split(r'step\s*3', text, flags=re.IGNORECASE)[1:]
  found = re.search(r'\[[^\[\]]*\]', step3[-1]) if step3 else None
  if not found:
    return []
  try:
    return check_objects(ast.literal_eval(found.group()))
  except (SyntaxError, ValueError, TypeError):
    return []


def check_objects(objects: Any) -> list[str]:
  """A list of names, stripped, empty ones and repetitions left out.

  Raises:
    TypeError: it is no list of strings.
  """
  if not isinstance(objects, list) or not all(
    isinstance(name, str) for name in objects
  ):
    raise TypeError(
      f'check_objects: {objects!r}; a list of strings is needed. Pass the '
      'result of parse_objects.'
    )
  names = [name.strip() for name in objects]
  return list(dict.fromkeys(name for name in names if name))


def frame_prompt(question: str, objects: Sequence[str]) -> str:
  """Asks of one frame whether it is relevant; 'A' is yes."""
  letter = "Answer with the option's letter directly."
  if objects:
    named = ', '.join(objects)
    return (
      f'Does the image contain any object of {named}? A. yes, B. no\n{letter}'
    )
  return (
    f'{question}\nDoes the image contain sufficient information to answer the '
    f'given question? A. yes, B. no\n{letter}'
  )


def similarity(
  frames: jax.Array, question: jax.Array, temperature: float = 0.01
) -> jax.Array:
  """Softmax over frames of the cosine with a question, as CLIP compares.

  Args:
    frames: (T, D), pooled, in a space that the text shares.
    question: (D,).
    temperature: divides the cosine.

  Returns:
    (T,) float32 with sum 1.
  """
  cosine = primitives.normalize(frames) @ primitives.normalize(question)
  return jax.nn.softmax(cosine / temperature)


def init(
  rng: jax.Array, ts: interface.TokenSet, query: jax.Array
) -> dict[str, jax.Array]:
  """Parameters of the light scorer for these widths."""
  key_token, key_query = jax.random.split(rng)
  make = jax.nn.initializers.lecun_normal()
  return {
    'token': make(key_token, (ts.tokens.shape[-1], _RANK)),
    'query': make(key_query, (query.shape[-1], _RANK)),
    'bias': jnp.zeros(()),
  }


def light_logits(
  params: dict[str, jax.Array],
  ts: interface.TokenSet,
  query: jax.Array,
  query_mask: jax.Array | None = None,
) -> jax.Array:
  """Logits (B, T) that frame t is relevant.

  The best match of any token of the frame with any token of the question: an
  object is in a frame if it is anywhere in it. The maximum is a smooth one.
  """
  T, H, W = interface.square_grid(ts)
  tokens = jnp.where(ts.mask[..., None], ts.tokens, 0).astype(jnp.float32)
  query = query.astype(jnp.float32)
  if query_mask is None:
    query_mask = jnp.ones(query.shape[:2], bool)
  query = jnp.where(query_mask[..., None], query, 0.0)
  a, b = tokens @ params['token'], query @ params['query']
  match = jnp.einsum('bnr,blr->bnl', a, b) * _RANK**-0.5
  seen = ts.mask[:, :, None] & query_mask[:, None]
  match = jnp.where(seen, match, -1e9)[:, ts.special :]
  match = match.reshape(match.shape[0], T, H * W * query.shape[1])
  return jax.nn.logsumexp(match, axis=2) + params['bias']


def light(
  params: dict[str, jax.Array], ts: interface.TokenSet, given: interface.Given
) -> jax.Array:
  """Relevances (B, T) of the light scorer."""
  assert given.query is not None  # Traits ask for it.
  logits = light_logits(params, ts, given.query, given.query_mask)
  return jax.nn.sigmoid(logits)


def light_loss(
  params: dict[str, jax.Array],
  ts: interface.TokenSet,
  query: jax.Array,
  relevant: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Binary cross-entropy against relevant (B, T) bool; and the logits.

  A loss of jaxq.tokens.training.step. Frames without a token do not count.
  """
  T, H, W = interface.square_grid(ts)
  logits = light_logits(params, ts, query)
  seen = ts.mask[:, ts.special :].reshape(-1, T, H * W).any(axis=2)
  losses = optax.sigmoid_binary_cross_entropy(
    logits, relevant.astype(jnp.float32)
  )
  total = jnp.sum(jnp.where(seen, losses, 0.0))
  return total / jnp.maximum(jnp.sum(seen, dtype=jnp.float32), 1.0), logits

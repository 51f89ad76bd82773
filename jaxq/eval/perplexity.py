"""Perplexity over non-overlapping windows.

  nll_t = -log p(token_t | tokens before it in its window)
  token perplexity = exp(sum nll / tokens)

The first token of a window is given, not scored. Token perplexity depends on
the tokenizer; exp(sum nll / words), exp(sum nll / bytes) and bits per byte do
not, and stand beside it. A number without its conventions (corpus, window,
BOS, dtype) can be compared with nothing, so the result carries them.

A model is two functions, its body and its head: the head runs over `chunk`
tokens at a time, since the logits of a whole window are larger than a small
model (2,048 x 49,152 in float32: 403 MB).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxq.eval import batches

CHUNK = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
  """A language model as two pure functions; static, hashable.

  score_fn: (variables, tokens (B, T) int32) -> hidden (B, T, C), causal.
  head_fn: (variables, hidden (B, T, C)) -> logits (B, T, V).
  """

  score_fn: Callable[[Any, jax.Array], jax.Array]
  head_fn: Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Perplexity:
  """The perplexity of one model on one text.

  Attributes:
    nll: (num, T-1) float32, one number per scored token.
    words: words in the scored text, split at white space.
    num_bytes: its bytes in UTF-8.
    conventions: corpus, window, bos, dtype, tokens (the scored ones), ...
  """

  nll: np.ndarray
  words: int
  num_bytes: int
  conventions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.words < 1 or self.num_bytes < 1:
      raise ValueError(
        f'Perplexity: words={self.words}, num_bytes={self.num_bytes}; both '
        'must be at least 1. Give a text that is not empty.'
      )

  @property
  def mean(self) -> float:
    """Mean negative log-likelihood per token, in nats."""
    return float(np.mean(self.nll, dtype=np.float64))

  @property
  def token(self) -> float:
    """Token perplexity."""
    return float(self.per(self.nll.size)(self.mean))

  @property
  def word(self) -> float:
    """Perplexity per word."""
    return float(self.per(self.words)(self.mean))

  @property
  def byte(self) -> float:
    """Perplexity per byte."""
    return float(self.per(self.num_bytes)(self.mean))

  @property
  def bits_per_byte(self) -> float:
    """log2 of the perplexity per byte."""
    return self.mean * self.nll.size / self.num_bytes / float(np.log(2.0))

  def per(self, units: int) -> Callable[[ArrayLike], np.ndarray]:
    """The function from a mean NLL per token to a perplexity per unit.

    `units` is how many of them the text has. It also maps the ends of an
    interval, since it rises with its argument. A diverged model gives inf.
    """
    rate = self.nll.size / units

    def perplexity(mean):
      with np.errstate(over='ignore'):
        return np.exp(np.asarray(mean, np.float64) * rate)

    return perplexity


def token_nll(
  scorer: Scorer,
  variables: Any,
  tokens: np.ndarray,
  *,
  chunk: int = CHUNK,
  mesh: jax.sharding.Mesh | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """Scores windows.

  Args:
    scorer: the model; equal scorers share one compilation.
    variables: its first argument.
    tokens: (num, T) int32.
    chunk: tokens of a window whose logits exist at a time.
    mesh: None, or windows are shared out over its axis 'data'.
    progress: called with (windows done, num).

  Returns:
    (num, T-1) float32: -log p of each token but the first.
  """
  variables = batches.replicate(variables, mesh)

  def function(batch):
    return _nll(scorer, chunk, variables, batch)

  return batches.run(function, tokens, mesh=mesh, progress=progress)


def lower(
  scorer: Scorer, variables: Any, tokens: Any, *, chunk: int = CHUNK
) -> jax.stages.Lowered:
  """Lowers the function that token_nll runs on each batch; runs nothing.

  Args:
    scorer, chunk: as for token_nll.
    variables, tokens: arrays, or shapes with shardings; tokens (B, T) int32.
  """
  return _nll.lower(scorer, chunk, variables, tokens)


def in_chunks(
  function: Callable[..., Any], chunk: int, *arrays: jax.Array
) -> Any:
  """function over `chunk` columns at a time, one after the other.

  Args:
    function: maps slices (B, chunk, ...) to a pytree of (B, chunk).
    chunk: columns per call.
    *arrays: (B, T, ...) each; T need not be a multiple of chunk.

  Returns:
    The pytree with leaves (B, T).

  Raises:
    ValueError: chunk < 1.
  """
  if chunk < 1:
    raise ValueError(
      f'chunk={chunk}; it must be at least 1. {CHUNK} tokens are the default.'
    )
  B, T = arrays[0].shape[:2]
  chunk = min(chunk, T)
  count = -(-T // chunk)

  def split(a):
    widths = [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, widths).reshape(B, count, chunk, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0)  # (count, B, chunk, ...)

  out = jax.lax.map(lambda parts: function(*parts), tuple(map(split, arrays)))

  def join(a):
    return jnp.moveaxis(a, 0, 1).reshape(B, count * chunk)[:, :T]

  return jax.tree.map(join, out)


def log_probs(logits: jax.Array) -> jax.Array:
  """Logits (..., V) -> log-probabilities (..., V), in float32."""
  return jax.nn.log_softmax(logits.astype(jnp.float32))


def nll_of(log_p: jax.Array, targets: jax.Array) -> jax.Array:
  """log_p (B, T, V), targets (B, T) -> -log p of the targets (B, T)."""
  return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nll(scorer, chunk, variables, tokens):
  with jax.named_scope('body'):
    x = scorer.score_fn(variables, tokens)[:, :-1]  # (B, T-1, C)

  def score(x, targets):
    with jax.named_scope('head'):
      return nll_of(log_probs(scorer.head_fn(variables, x)), targets)

  return in_chunks(score, chunk, x, tokens[:, 1:])

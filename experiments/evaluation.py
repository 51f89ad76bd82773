"""Compares a model with its reference on held-out text.

`compare` is the core of `experiments.evaluate` and of the before/after table
of `experiments.calibrate`; it reads no flags. With a reference both models run
in one pass that compiles once, and every interval of the difference between
them is paired.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments import adapters, generation, results
from jaxq.data import pipeline
from jaxq.eval import bootstrap as bootstrap_lib
from jaxq.eval import divergence as divergence_lib
from jaxq.eval import perplexity
from jaxq.kvcache import interface, registry

PERPLEXITY = 'token perplexity'
WORD = 'word perplexity'
BYTE = 'byte perplexity'
BITS = 'bits per byte'
RATIO = 'perplexity ratio'
KL = 'KL'
AGREEMENT = 'top-1 agreement'
KV_CHUNK = 128


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
  """What was measured, token by token.

  Attributes:
    model: perplexity of the model, with its conventions.
    reference: of the reference, or None.
    divergence: between the two, or None.
    name, reference_name: labels of their rows.
    bootstrap: how the intervals are made.
  """

  model: perplexity.Perplexity
  name: str
  reference: perplexity.Perplexity | None = None
  reference_name: str = ''
  divergence: divergence_lib.Divergence | None = None
  bootstrap: bootstrap_lib.BootstrapConfig = bootstrap_lib.BootstrapConfig()

  @property
  def ratio(self) -> bootstrap_lib.Interval:
    """Token perplexity of the model / of the reference, paired.

    Raises:
      ValueError: there is no reference.
    """
    if self.reference is None:
      raise ValueError(
        f'Comparison: {self.name} was measured alone; a ratio needs a '
        'reference. Give one to compare.'
      )
    return self._interval(
      lambda reference, model: np.exp(model - reference),
      self.reference.nll,
      self.model.nll,
    )

  def rows(self) -> tuple[results.Row, ...]:
    """The table: the reference first, if there is one, then the model."""
    model = self._perplexities(self.model)
    if self.reference is None or self.divergence is None:
      return (results.Row(name=self.name, metrics=model),)
    conventions = {'against': self.reference_name, **self.model.conventions}
    identity = lambda mean: mean
    kl = self._interval(identity, self.divergence.kl)
    agree = self._interval(identity, self.divergence.agree)
    compared = (
      results.Metric.of(RATIO, self.ratio, conventions),
      results.Metric.of(KL, kl, conventions, unit='nats/token'),
      results.Metric.of(AGREEMENT, agree, conventions),
    )
    return (
      results.Row(
        name=self.reference_name, metrics=self._perplexities(self.reference)
      ),
      results.Row(name=self.name, metrics=model + compared),
    )

  def _perplexities(
    self, p: perplexity.Perplexity
  ) -> tuple[results.Metric, ...]:
    words = {**p.conventions, 'words': p.words}
    num_bytes = {**p.conventions, 'bytes': p.num_bytes}
    bits_per_nat = p.nll.size / p.num_bytes / np.log(2.0)
    return tuple(
      results.Metric.of(name, self._interval(function, p.nll), conventions)
      for name, function, conventions in (
        (PERPLEXITY, p.per(p.nll.size), p.conventions),
        (WORD, p.per(p.words), words),
        (BYTE, p.per(p.num_bytes), num_bytes),
        (BITS, lambda mean: mean * bits_per_nat, num_bytes),
      )
    )

  def _interval(self, statistic, *values) -> bootstrap_lib.Interval:
    return bootstrap_lib.interval(statistic, *values, config=self.bootstrap)


def load_windows(
  model: models.Model | models.OpenModel,
  *,
  source: str,
  window: int,
  tokens: int,
  bos: str = 'none',
) -> pipeline.EvaluationWindows:
  """The first `tokens` tokens of a text, in windows.

  Args:
    model: whose tokenizer and BOS are used.
    source: see `jaxq.data.text`, such as 'wiki-sample:evaluation'.
    window: tokens per window.
    tokens: in all; what does not fill a window is left out.
    bos: 'none', or BOS before each 'document' or 'window'.

  Raises:
    ValueError: tokens do not fill one window, the window is longer than the
      model's longest sequence, or the text is too short.
  """
  _check_window(model, window)
  if tokens < window:
    raise ValueError(
      f'tokens={tokens}, window={window}; at least one window is scored. Give '
      'more tokens or a shorter window.'
    )
  config = pipeline.DataConfig(
    source=source,
    num_sequences=tokens // window,
    sequence_length=window,
    bos=bos,
    bos_token_id=model.config.bos_token_id,
  )
  if isinstance(model, models.Model):
    return pipeline.evaluation_windows(config, model.tokenizer)
  return pipeline.evaluation_windows(config, model.tokenizer())


def compare(
  reference: models.Model | None,
  model: models.Model,
  windows: pipeline.EvaluationWindows,
  *,
  config: bootstrap_lib.BootstrapConfig | None = None,
  chunk: int = perplexity.CHUNK,
  mesh: jax.sharding.Mesh | None = None,
  progress: Callable[[int, int], None] | None = None,
  kv_cache: interface.CacheConfig | None = None,
  kv_chunk: int = KV_CHUNK,
) -> Comparison:
  """Scores one or two models on the same windows.

  Args:
    reference: the float model, or None to measure `model` alone.
    model: the one that is measured.
    windows: from `load_windows`.
    config: of the bootstrap; None is its default.
    chunk: tokens whose logits exist at a time.
    mesh: None, or windows are shared out over its axis 'data'.
    progress: called with (windows done, number of windows).
    kv_cache: the cache that `model` reads a window through, chunk by chunk
      (adapters.cached_scorer); None: all of a window in one pass. The
      reference has none.
    kv_chunk: tokens of a chunk.

  Returns:
    A Comparison; its `rows()` make the table.

  Raises:
    ValueError: a window longer than a model's longest sequence, a token that a
      model does not have, or vocabularies of different size.
  """
  tokens = windows.tokens
  for m in (model,) if reference is None else (reference, model):
    _check_window(m, tokens.shape[1])
    _check_ids(m, tokens)
  config = bootstrap_lib.BootstrapConfig() if config is None else config
  how: dict[str, Any] = dict(chunk=chunk, mesh=mesh, progress=progress)
  scorer, variables = adapters.scorer(model.module), model.variables
  read: dict[str, Any] = {}
  if kv_cache is not None:
    scorer = adapters.cached_scorer(model.module, kv_cache, kv_chunk)
    variables = generation.prepared(model, kv_cache)
    read = {'kv cache': registry.text_of(kv_cache), 'kv chunk': kv_chunk}
  if reference is None:
    nll = perplexity.token_nll(scorer, variables, tokens, **how)
    return Comparison(
      model=_perplexity(nll, model, windows, read),
      name=model.name,
      bootstrap=config,
    )
  _check_vocabulary(reference, model)
  divergence = divergence_lib.per_token(
    adapters.scorer(reference.module),
    reference.variables,
    scorer,
    variables,
    tokens,
    **how,
  )
  return Comparison(
    model=_perplexity(divergence.nll, model, windows, read),
    name=model.name,
    reference=_perplexity(divergence.reference_nll, reference, windows),
    reference_name=reference.name,
    divergence=divergence,
    bootstrap=config,
  )


def _perplexity(nll, model, windows, read=None) -> perplexity.Perplexity:
  return perplexity.Perplexity(
    nll=nll,
    words=int(windows.words.sum()),
    num_bytes=int(windows.nbytes.sum()),
    conventions={
      'text': windows.description,
      'dtype': jnp.dtype(model.module.dtype).name,
      'scored tokens': int(nll.size),
      **(read or {}),
    },
  )


def _check_window(model: models.Model | models.OpenModel, window: int) -> None:
  longest = model.config.max_position
  if not 2 <= window <= longest:
    raise ValueError(
      f'window={window}; {model.name} takes sequences of 2..{longest} tokens. '
      f'Give a window of at most {longest}.'
    )


def _check_ids(model: models.Model, tokens: np.ndarray) -> None:
  vocab_size = model.config.vocab_size
  if tokens.min() < 0 or tokens.max() >= vocab_size:
    raise ValueError(
      f'windows: token ids {tokens.min()}..{tokens.max()}; {model.name} has '
      f'ids 0..{vocab_size - 1}. Tokenize the text with its tokenizer.'
    )


def _check_vocabulary(reference: models.Model, model: models.Model) -> None:
  """KL and agreement compare token by token, so the ids must mean the same."""
  sizes = [m.config.vocab_size for m in (reference, model)]
  if (
    sizes[0] != sizes[1]
    or reference.tokenizer.get_vocab() != model.tokenizer.get_vocab()
  ):
    raise ValueError(
      f'reference {reference.name} ({sizes[0]} tokens), model {model.name} '
      f'({sizes[1]} tokens): their vocabularies differ; KL and agreement need '
      'one vocabulary. Give the model it was made from, or no reference.'
    )

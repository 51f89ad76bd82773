"""Reducers on a trained MosaicQA model: what is kept, and what it still knows.

A reducer stands between projector and decoder, or, as FastV and SparseVLM do,
in front of a block of the decoder. One that looks at the question is run for
every question by itself, others once per video. Beside the accuracy stand

  evidence recall  share of the tokens that a question is answered from which
                   are kept, or merged into a slot of at most 4
  tokens           slots in use, mean
  FLOPs            of the decoder reading tokens and question, as a share of
                   all tokens': 4 n d^2 + 2 n^2 d + 3 n d m per layer; what the
                   reducer itself costs is in the time only
  time             of reducer and decoder together, per video with all its
                   questions, the fastest of some batches
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
  mosaic_evaluation,
  reducer_inputs,
  results,
  token_pictures,
  trained_reducers,
  training,
)
from jaxq.data import mosaic
from jaxq.tokens import (
  interface,
  registry,
  sparsevlm,
)
from models import vision_language, visual_tokens

LARGEST_SLOT = 4.0  # A token in a larger one counts as lost.
_IN_DECODER = ('FastvConfig', 'SparseVlmConfig')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """A reducer and how it is fed.

  Attributes:
    config: of `jaxq.tokens.registry`.
    scores: of reducer_inputs.SCORES, what a reducer gets that takes scores in
      front of the decoder.
    layer: of the decoder, in front of which it stands; 0: in front of all.
    params: its own.
    model: parts of the model's parameters that were trained with it, which
      take the place of the model's.
    features: whether it reads the encoder's features, in place of the
      projector.
  """

  config: interface.Config
  scores: str = 'class'
  layer: int = 0
  params: Any = None
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  features: bool = False

  def __post_init__(self):
    if self.scores not in reducer_inputs.SCORES:
      raise ValueError(
        f'Method: scores={self.scores!r}; allowed are '
        f'{sorted(reducer_inputs.SCORES)}.'
      )

  @property
  def asks(self) -> bool:
    """Whether it is run for every question by itself."""
    return self.config.traits.query or self.scores == 'evidence'


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
  """Of videos with Q questions each; see the module docstring.

  right, recall, kinds, tokens: (videos, Q). milliseconds: of a video with all
  its questions.
  """

  right: np.ndarray
  recall: np.ndarray
  kinds: np.ndarray
  tokens: np.ndarray
  milliseconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
  """A batch of videos behind the ViT, with its questions.

  visual: of the model. text: (B, Q, L). answers, kinds: (B, Q). evidence:
  (B, Q, N) bool.
  """

  visual: visual_tokens.Visual
  text: jax.Array
  answers: np.ndarray
  evidence: jax.Array
  kinds: np.ndarray


def parse(text: str, trained: training.Trained) -> Method:
  """`--token_reducer` as a method for this model.

  It is a text of jaxq.tokens.registry, or a folder of experiments.train_reducer
  with fields behind it, as 'FOLDER:budget=0.1'. One that stands behind a layer
  the decoder has not stands in front of its last one.

  Raises:
    ValueError: unknown reducer or field, one that needs trained parameters and
      is no folder, or a folder of another model.
  """
  if trained_reducers.is_folder(text):
    found = trained_reducers.load(text, trained)
    return Method(
      config=found.config,
      params=found.params,
      model=found.model,
      features=found.features,
    )
  config: Any = registry.parse(text)
  if config.traits.params:
    raise ValueError(
      f'--token_reducer={text}: it needs parameters that are trained for this '
      'model. Train them by experiments.train_reducer and give their folder, '
      'or use one without, as tome:budget=0.25.'
    )
  layer = 0
  if type(config).__name__ in _IN_DECODER:
    layer = getattr(config, 'layer', 0) or config.layers[0]
    layer = min(layer, trained.model.num_layers - 1)
  return Method(config=config, layer=layer)


def encode(
  trained: training.Trained, videos: int, seed: int = 0
) -> list[Encoded]:
  """Test videos behind the ViT, in batches."""
  model = trained.model
  see = jax.jit(functools.partial(visual_tokens.visual_of, model))
  out = []
  for batch in mosaic_evaluation.batches(trained.data, videos, seed):
    evidence = mosaic.token_evidence(batch['evidence'], model.patch_size)
    visual = see(trained.params, batch['frames'], batch.get('audio'))
    heard = visual.tokens.mask.shape[1] - evidence.shape[-1]
    evidence = np.pad(evidence, ((0, 0), (0, 0), (0, heard)))
    out.append(
      Encoded(
        visual=visual,
        text=jnp.asarray(batch['text']),
        answers=batch['targets'].max(axis=2),  # IGNORE is below any.
        evidence=jnp.asarray(evidence),
        kinds=batch['kind'],
      )
    )
  return out


def measure(
  trained: training.Trained,
  method: Method | None,
  encoded: Sequence[Encoded],
  kv_cache: Any = None,
) -> Measured:
  """Accuracy, evidence and time of a method; None keeps all tokens."""
  run = jax.jit(functools.partial(answers, trained.model, method, kv_cache))
  parts: dict[str, list[np.ndarray]] = {}
  seconds = []
  first = encoded[0]
  for i, batch in enumerate([first, *encoded]):  # Once to compile.
    key = jax.random.fold_in(jax.random.key(0), i)
    start = time.perf_counter()
    said, recall, count = jax.block_until_ready(
      run(trained.params, batch.visual, batch.text, batch.evidence, key)
    )
    if i == 0:
      continue
    if batch.text.shape == first.text.shape:
      seconds.append(time.perf_counter() - start)
    for name, value in (
      ('right', np.asarray(said) == batch.answers),
      ('recall', np.asarray(recall)),
      ('tokens', np.asarray(count)),
      ('kinds', batch.kinds),
    ):
      parts.setdefault(name, []).append(value)
  return Measured(
    milliseconds=1e3 * min(seconds) / first.text.shape[0],
    **{name: np.concatenate(v) for name, v in parts.items()},
  )


def answers(
  model: vision_language.VisionLanguageConfig,
  method: Method | None,
  kv_cache: Any,
  params: Mapping[str, Any],
  visual: visual_tokens.Visual,
  text: jax.Array,
  evidence: jax.Array,
  rng: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What is answered (B, Q), evidence recall (B, Q), slots in use (B, Q).

  Args:
    model, params: of the model.
    method: None keeps all tokens.
    kv_cache: a cache to answer from; None: none.
    visual: of B videos. text: (B, Q, L). evidence: (B, Q, N) bool.
    rng: of methods that draw.
  """
  if method is not None:
    params = {**params, **method.model}
  B, Q, L = text.shape
  each = text.reshape(B * Q, L)
  lengths = jnp.sum(each != mosaic.TOKENS['pad'], axis=1)
  check_cached(method if kv_cache is not None else None, 'a reducer')
  every = jax.tree.map(lambda a: jnp.repeat(a, Q, axis=0), visual)
  if method is not None and method.layer:
    logits, reduced = _inside(model, method, params, every, each)
    said = _at_last(logits, lengths)
  else:
    seen: Any = visual.tokens
    if method is not None and method.asks:
      truth = evidence.reshape(B * Q, -1)
      seen = reduce(model, method, params, every, each, rng, truth)
      logits = visual_tokens.answer(model, params, seen, each[:, None])
    elif method is not None:
      seen = reduce(model, method, params, visual, None, rng)
    if isinstance(seen, interface.Reduced):
      # Not all of aux is per row.
      seen = dataclasses.replace(seen, aux={})
    if seen.mask.shape[0] == B:
      logits = visual_tokens.answer(model, params, seen, text)
      seen = jax.tree.map(lambda a: jnp.repeat(a, Q, axis=0), seen)
    said = _at_last(logits.reshape(B * Q, L, -1), lengths)
    if kv_cache is not None:
      said = visual_tokens.generate(
        model,
        params,
        seen,
        each,
        lengths,
        max_new_tokens=1,
        kv_cache=kv_cache,
      )[:, 0]
    reduced = seen
  count = jnp.sum(reduced.mask, axis=1)
  if isinstance(reduced, interface.Reduced):
    recall = evidence_recall(reduced, evidence.reshape(B * Q, -1))
  else:
    recall = jnp.ones((B * Q,))
  return said.reshape(B, Q), recall.reshape(B, Q), count.reshape(B, Q)


def reduce(
  model: vision_language.VisionLanguageConfig,
  method: Method,
  params: Mapping[str, Any],
  visual: visual_tokens.Visual,
  text: jax.Array | None,
  rng: jax.Array,
  evidence: jax.Array | None = None,
) -> interface.Reduced:
  """What the decoder gets, of text (B, L) where the method asks for it.

  evidence (B, N) is what the oracle's scores are made of.

  Where a method needs a class token, the mean of the frames' goes in front and
  is taken out of what it keeps.
  """
  config, traits = method.config, method.config.traits
  ts, given = visual.tokens, {}
  if method.features:
    ts = dataclasses.replace(ts, tokens=visual.features)
  scores = reducer_inputs.scores_of(method.scores, model, visual, evidence)
  if traits.scores:
    given['scores'] = scores
  if traits.query:
    assert text is not None
    given['query'] = visual_tokens.question_of(model, params, text)
    given['query_mask'] = text != mosaic.TOKENS['pad']
  if traits.rng:
    given['rng'] = rng
  if traits.params:
    given['params'] = method.params
  budget = config.budget_for(ts)
  if not traits.class_token:
    return config.reduce(ts, budget=budget, **given)
  with_class = reducer_inputs.with_class(visual)
  given['scores'] = jnp.pad(scores, ((0, 0), (1, 0)))
  reduced = config.reduce(with_class, budget=budget, **given)
  return reducer_inputs.without_first(reduced)


def evidence_recall(
  reduced: interface.Reduced, evidence: jax.Array
) -> jax.Array:
  """Share (B,) of evidence (B, N) in slots of at most LARGEST_SLOT; 1 of none.

  A resampler's slots may hold parts of a token; it counts for the one that
  `assignment` names.
  """
  slot = jnp.maximum(reduced.assignment, 0)
  size = jnp.take_along_axis(reduced.size, slot, axis=1)
  kept = (reduced.assignment >= 0) & (size <= LARGEST_SLOT)
  total = jnp.sum(evidence, axis=1)
  found = jnp.sum(evidence & kept, axis=1)
  return jnp.where(total > 0, found / jnp.maximum(total, 1), 1.0)


def flops(
  model: vision_language.VisionLanguageConfig, tokens: float, layer: int = 0
) -> float:
  """Of the decoder, relative to all tokens; a question is counted with them."""
  d, m = model.hidden_size, model.intermediate_size

  def of(n: float) -> float:
    return 4 * n * d * d + 2 * n * n * d + 3 * n * d * m

  text, L = mosaic.QUESTION_LENGTH, model.num_layers
  full, less = of(model.num_visual + text), of(tokens + text)
  return (layer * full + (L - layer) * less) / (L * full)


def row(
  name: str,
  trained: training.Trained,
  method: Method | None,
  measured: Measured,
  conventions: Mapping[str, Any],
) -> results.Row:
  """One line of the table."""
  layer = method.layer if method else 0
  tokens = float(measured.tokens.mean())
  metrics = mosaic_evaluation.accuracy_metrics(
    measured.right, measured.kinds, conventions
  )
  return results.Row(
    name=name,
    metrics=(
      *metrics,
      results.Metric(
        name='evidence recall', value=float(measured.recall.mean())
      ),
      results.Metric(name='tokens', value=tokens),
      results.Metric(name='FLOPs', value=flops(trained.model, tokens, layer)),
      results.Metric(name='time', value=measured.milliseconds, unit='ms'),
    ),
  )


def picture(trained: training.Trained, method: Method, video: int = 0) -> str:
  """An SVG of what a method keeps of a test video, for its first question."""
  sample = mosaic_evaluation.source(trained.data)[video]
  model = trained.model

  @jax.jit
  def kept(params, frames, text):
    params = {**params, **method.model}
    visual = visual_tokens.visual_of(model, params, frames)
    if method.layer:
      reduced = _inside(model, method, params, visual, text)[1]
    else:
      key = jax.random.key(0)
      reduced = reduce(model, method, params, visual, text, key)
    return reduced.assignment[0], reduced.index[0]

  assignment, index = kept(
    trained.params, sample['frames'][None], sample['text'][:1]
  )
  return token_pictures.svg(sample['frames'], assignment, index, model.grid)


def compare(
  trained: training.Trained,
  texts: list[str],
  videos: int,
  kv_cache: Any = None,
) -> tuple[results.Row, ...]:
  """All tokens, and each `--token_reducer` beside them.

  Args:
    trained: the model.
    texts: reducers as `jaxq.tokens.registry.parse` reads them.
    videos: of the test digits.
    kv_cache: a cache that the decoder answers from; None: none.

  Raises:
    NotImplementedError: a cache, and a reducer inside the decoder.
  """
  encoded = encode(trained, videos)
  conventions = {
    'data': dataclasses.replace(trained.data, split='test').description,
    'videos': videos,
    'kv_cache': str(kv_cache) if kv_cache is not None else 'none',
  }
  methods: dict[str, Method | None] = {'all tokens': None}
  methods |= {text: parse(text, trained) for text in texts}
  return tuple(
    row(
      name,
      trained,
      method,
      measure(trained, method, encoded, kv_cache=kv_cache),
      conventions,
    )
    for name, method in methods.items()
  )


def _inside(
  model: vision_language.VisionLanguageConfig,
  method: Method,
  params: Mapping[str, Any],
  visual: visual_tokens.Visual,
  text: jax.Array,
) -> tuple[jax.Array, interface.Reduced]:
  """Logits (B, L, V) with the reducer in front of a block of the decoder."""
  ts, real = visual.tokens, text != mosaic.TOKENS['pad']
  last = jnp.sum(real, axis=1, keepdims=True) - 1
  rows = jnp.arange(text.shape[1])[None] == last
  if isinstance(method.config, sparsevlm.SparseVlmConfig):
    query = visual_tokens.question_of(model, params, text)
    rows = sparsevlm.rate(ts.tokens, query, ts.mask, real)
  return visual_tokens.answer_pruned(
    model,
    params,
    ts,
    text,
    method.config,
    layer=method.layer,
    budget=method.config.budget_for(ts),
    rows=rows,
  )


def _at_last(logits: jax.Array, lengths: jax.Array) -> jax.Array:
  """Logits (B, L, V) -> the token (B,) behind the last of each row."""
  last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)
  return jnp.argmax(last[:, 0], axis=-1)


def check_cached(method: Method | None, text: str | None) -> None:
  """A decoder that drops tokens has caches of two lengths."""
  if method is not None and method.layer:
    raise NotImplementedError(
      f'--token_reducer={text} stands inside the decoder and needs caches of '
      'two lengths, which this command has not. Use a reducer in front of the '
      'decoder, as visionzip, or leave --kv_cache out.'
    )

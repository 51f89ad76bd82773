"""EmbedLens: what visual tokens say in the words of the language model.

"What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in
Multimodal Large Language Models", CVPR 2026, arXiv 2603.00510.

  ids(v) = top-3 of cos(v, E[id]),  E the model's input embeddings (V, D)
  class(v) = the first of (ViT sink, LLM sink, dead) that has one of ids(v);
             alive if none has

Projected visual tokens gather around a few rows of E that say nothing of the
image: sinks (of the encoder or of the language model) and one dead direction.
In LLaVA-1.5-7B only some 60 % are alive; the others can go before layer 0. What
else the paper does with the classes, leaving out updates and showing the
visual tokens to the upper layers only, is in tokens.decoder_interventions.

The ids belong to one projector and one language model: `GROUPS` has the
published ones, tokens.embedlens_groups finds those of another model.

Departures: one class per token, by the order above, where the reference lets
groups overlap; the controls are options by name, not ids of -1; if an image has
none of the dropped classes, nothing is dropped.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.tokens import interface, primitives
from pallas_kernels.nearest_center import api as nearest_center

CLASSES = ('alive', 'vit_sink', 'llm_sink', 'dead')
ALIVE, VIT_SINK, LLM_SINK, DEAD = range(4)
CONTROLS = ('none', 'alive', 'complement')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
  """Vocabulary ids that mark the tokens of a class."""

  vit_sink: tuple[int, ...] = ()
  llm_sink: tuple[int, ...] = ()
  dead: tuple[int, ...] = ()


GROUPS: Mapping[str, Groups] = {
  'llava-1.5-7b': Groups(vit_sink=(1141,), llm_sink=(26673,), dead=(30296,)),
}


@flax.struct.dataclass
class Probe:
  """What tokens are compared with; made by `make_probe`.

  embedding: (V, D), rows of length 1, 0 where an id is left out.
  bias: (V,) float32, 0, or -inf where an id is left out.
  classes: (V,) int32, the class an id marks.
  dead: (G, D) float32, the rows that mark dead tokens.
  """

  embedding: jax.Array
  bias: jax.Array
  classes: jax.Array
  dead: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedLensConfig(interface.Config):
  """Drops tokens of some classes.

  budget: the bound on what survives, as a share of N. Where more survive, those
    least like a dead token are kept.
  drop: classes to drop, of CLASSES but the first; () drops none.
  top_k: nearest ids that decide on a class.
  min_sim: cosines below it do not count; -1 counts all.
  control: 'alive' drops as many random alive tokens instead (needs rng),
    'complement' keeps nothing but the dropped.

  Its params are a Probe.
  """

  budget: float = 0.75
  drop: tuple[str, ...] = ('vit_sink', 'llm_sink', 'dead')
  top_k: int = 3
  min_sim: float = -1.0
  control: str = 'none'

  def __post_init__(self):
    super().__post_init__()
    unknown = sorted(set(self.drop) - set(CLASSES[1:]))
    if unknown:
      raise ValueError(
        f'EmbedLensConfig: drop has the groups {unknown}; allowed '
        f'{sorted(CLASSES[1:])}. Write drop=vit_sink/dead.'
      )
    if self.control not in CONTROLS:
      raise ValueError(
        f'EmbedLensConfig: control={self.control!r}; allowed '
        f'{sorted(CONTROLS)}.'
      )
    if self.top_k < 1:
      raise ValueError(
        f'EmbedLensConfig: top_k={self.top_k}; at least 1 id is needed. Use 3.'
      )

  @property
  def traits(self) -> interface.Traits:
    """Needs the probe, and a key for the random control."""
    return interface.Traits(
      kind='selector', params=True, rng=self.control == 'alive'
    )

  def init_params(
    self, rng: jax.Array, ts: interface.TokenSet, query: jax.Array | None = None
  ) -> Probe:
    """A probe with random embeddings that knows no groups: all is alive."""
    del query
    embedding = jax.random.normal(rng, (64, ts.tokens.shape[-1]))
    return make_probe(embedding, Groups())

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    probe: Probe = given.params
    ids, cosines = nearest_vocab(ts.tokens, probe, self.top_k)
    classes = classify(ids, cosines, probe.classes, self.min_sim)
    survives = surviving(
      classes, ts.mask, self.drop, control=self.control, rng=given.rng
    )
    alive = 1.0 - _dead_cosine(ts.tokens, probe)
    index, mask = primitives.select_topk(
      alive, survives, budget.k_max, budget.counts(ts.mask.shape[0])
    )
    share = jnp.sum((classes == ALIVE) & ts.mask, axis=1) / jnp.maximum(
      jnp.sum(ts.mask, axis=1), 1
    )
    aux = {'ids': ids, 'cosines': cosines, 'classes': classes}
    aux['alive_share'] = share
    return primitives.selected(ts, index, mask, aux)


def groups_of(model: str) -> Groups:
  """The published groups of a model.

  Raises:
    ValueError: none are known.
  """
  if model not in GROUPS:
    raise ValueError(
      f'embedlens: no groups are known for {model!r}; allowed '
      f'{sorted(GROUPS)}. Run embedlens_groups.discover_groups on your images.'
    )
  return GROUPS[model]


def make_probe(
  embedding: jax.Array,
  groups: Groups,
  *,
  left_out: Sequence[int] = (),
  dtype: Any = jnp.float32,
) -> Probe:
  """A probe of an embedding table.

  Args:
    embedding: (V, D), the INPUT table, also where the head shares it.
    groups: ids that mark classes.
    left_out: ids that training has never seen (reserved, padding); they would
      attract tokens.
    dtype: of the stored rows.

  Raises:
    ValueError: an id outside the vocabulary.
  """
  V = embedding.shape[0]
  classes = np.zeros(V, np.int32)
  # The first of the order wins, so it is written last.
  for code, ids in reversed(
    (
      (VIT_SINK, groups.vit_sink),
      (LLM_SINK, groups.llm_sink),
      (DEAD, groups.dead),
    )
  ):
    _check_ids(f'group {CLASSES[code]!r}', ids, V)
    classes[list(ids)] = code
  _check_ids('left_out', left_out, V)
  bias = np.zeros(V, np.float32)
  bias[list(left_out)] = -np.inf
  rows = primitives.normalize(jnp.asarray(embedding))
  return Probe(
    embedding=rows.astype(dtype),
    bias=jnp.asarray(bias),
    classes=jnp.asarray(classes),
    dead=rows[np.flatnonzero(classes == DEAD)],
  )


def nearest_vocab(
  tokens: jax.Array,
  probe: Probe,
  k: int,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The k ids whose embeddings are most like each token.

  Args:
    tokens: (B, N, D), projected.
    probe: of the language model behind the projector.
    k: how many.
    implementation: of pallas_kernels.nearest_center; None picks.

  Returns:
    ids (B, N, k) int32 and cosines (B, N, k) float32, best first, ties to the
    lower id.

  Raises:
    ValueError: the probe is of another width.
  """
  V, D = probe.embedding.shape
  if tokens.shape[-1] != D or k > V:
    raise ValueError(
      f'nearest_vocab: tokens of {tokens.shape[-1]} channels and k={k} for an '
      f'embedding of {V} x {D}; channels must be equal and k at most {V}. '
      'Probe behind the projector.'
    )
  cosines, ids = nearest_center.nearest_center(
    primitives.normalize(tokens).astype(probe.embedding.dtype),
    probe.embedding,
    top=k,
    bias=probe.bias,
    implementation=implementation,
  )
  return ids.astype(jnp.int32), cosines


def classify(
  ids: jax.Array,
  cosines: jax.Array,
  classes: jax.Array,
  min_sim: float = -1.0,
) -> jax.Array:
  """The class of each token: (B, N) int32.

  Args:
    ids, cosines: (B, N, k), of `nearest_vocab`.
    classes: (V,), of the probe.
    min_sim: cosines below it do not count.
  """
  marked = jnp.where(cosines >= min_sim, classes[ids], ALIVE)  # (B, N, k)
  first = jnp.min(jnp.where(marked == ALIVE, len(CLASSES), marked), axis=-1)
  return jnp.where(first == len(CLASSES), ALIVE, first).astype(jnp.int32)


def surviving(
  classes: jax.Array,
  mask: jax.Array,
  drop: Sequence[str],
  *,
  control: str = 'none',
  rng: jax.Array | None = None,
) -> jax.Array:
  """Which tokens stay: (B, N) bool.

  Args:
    classes: (B, N), of `classify`.
    mask: (B, N), False: padding, which never stays.
    drop: names of classes.
    control: of CONTROLS; 'alive' drops the same number of random alive tokens,
      all of them where there are fewer.
    rng: for 'alive'.
  """
  dropped = jnp.zeros(mask.shape, bool)
  for name in drop:
    dropped |= classes == CLASSES.index(name)
  dropped &= mask
  if control == 'complement':
    return dropped
  if control == 'alive':
    assert rng is not None
    number = jnp.sum(dropped, axis=1, dtype=jnp.int32)
    index, _ = primitives.select_topk(
      jax.random.uniform(rng, mask.shape),
      mask & (classes == ALIVE),
      mask.shape[1],
      number,
    )
    dropped = primitives.scatter_slots(index, mask.shape[1]) >= 0
  return mask & ~dropped


def informative(
  tokens: jax.Array, mask: jax.Array, probe: Probe, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Whether nearest ids mean anything for a model.

  Returns:
    The mean over tokens (B, N, D) of the largest cosine, and the 95th
    percentile of it over as many random vectors. The first must be larger: a
    projector whose output lies far from the embeddings has meaningless
    neighbours.
  """
  _, cosines = nearest_vocab(tokens, probe, 1)
  noise = jax.random.normal(rng, tokens.shape)
  _, random = nearest_vocab(noise, probe, 1)
  total = jnp.sum(jnp.where(mask, cosines[..., 0], 0.0))
  mean = total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
  return mean, jnp.percentile(random, 95)


def margin(tokens: jax.Array, probe: Probe) -> jax.Array:
  """How much nearer than any other id one that marks a group is.

  tokens (B, N, D) -> (B, N) float32 in [-2, 2]; above 0 the nearest id marks a
  group, so with top_k=1 the token is not alive. -2 where no id marks any.
  """
  unit = primitives.normalize(tokens).astype(probe.embedding.dtype)
  marks, left_out = probe.classes != ALIVE, probe.bias == -jnp.inf

  def largest(ids):
    bias = jnp.where(ids & ~left_out, 0.0, -jnp.inf)
    cosines, _ = nearest_center.nearest_center(unit, probe.embedding, bias=bias)
    return jnp.maximum(cosines[..., 0], -1.0)

  return jnp.where(jnp.any(marks), largest(marks) - largest(~marks), -2.0)


def _dead_cosine(tokens: jax.Array, probe: Probe) -> jax.Array:
  """(B, N): the largest cosine with a row that marks dead tokens, or 0."""
  if not probe.dead.shape[0]:
    return jnp.zeros(tokens.shape[:2], jnp.float32)
  values, _ = primitives.nearest(primitives.normalize(tokens), probe.dead[None])
  return values[..., 0]


def _check_ids(what: str, ids: Sequence[int], V: int) -> None:
  outside = sorted(i for i in ids if not 0 <= i < V)
  if outside:
    raise ValueError(
      f'make_probe: {what} has the ids {outside}; the vocabulary has ids 0 to '
      f'{V - 1}. Use the groups of this language model.'
    )

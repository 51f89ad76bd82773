"""EmbedLens for a new model: finding its groups, and what one token says.

An id marks a group if it is the nearest one in nearly every image and of many
tokens: then it says nothing of the image. Where its tokens also have a large
norm, or are much attended to, the group is a sink, of the encoder or of the
language model; else it is dead. The thresholds are ours: how the paper came to
its ids is not published. A group is borne out (`holds`) if accuracy stays when
its tokens are dropped and falls when as many alive ones are.

The patch-compression benchmark puts a picture into one patch of a plain image:
what a linear classifier reads from that one token is there before the language
model does anything.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

from jaxq.tokens import embedlens


@flax.struct.dataclass
class Observed:
  """What one image shows: (N,) arrays of its visual tokens.

  ids: the nearest id. encoder_norm, llm_norm: lengths of the encoder's output
  and of the states in layers 1 to 3 of the language model (their mean).
  encoder_attention, llm_attention: attention received there; None: not known.
  """

  ids: jax.Array
  encoder_norm: jax.Array
  llm_norm: jax.Array
  encoder_attention: jax.Array | None = None
  llm_attention: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
  """When an id marks a group, and when the group is a sink.

  images: share of images it is in. tokens: share of all tokens. norm: times the
  image's median. attention: times the image's mean.
  """

  images: float = 0.9
  tokens: float = 0.02
  norm: float = 3.0
  attention: float = 5.0


class Candidate(NamedTuple):
  """An id that may mark a group.

  images, tokens: its shares. specificity: 1 - images * H / log(number of
  images), H the entropy of its tokens over the images; 0: evenly in all.
  encoder_norm, llm_norm, encoder_attention, llm_attention: over the image's
  median or mean, averaged. name: of embedlens.CLASSES.
  """

  id: int
  images: float
  tokens: float
  specificity: float
  encoder_norm: float
  llm_norm: float
  encoder_attention: float
  llm_attention: float
  name: str


def discover_groups(
  images: Iterable[Observed], thresholds: Thresholds | None = None
) -> tuple[embedlens.Groups, list[Candidate]]:
  """The groups of a model, from many diverse images; on the host.

  A model may have none of a kind; then that group is (). Check what is found:
  without the group accuracy must not change, without as many alive tokens it
  must (`holds`).

  Returns:
    The groups, and every candidate with what decided.

  Raises:
    ValueError: no images.
  """
  thresholds = Thresholds() if thresholds is None else thresholds
  seen = [jax.tree.map(np.asarray, image) for image in images]
  if not seen:
    raise ValueError(
      'discover_groups: 0 images; at least 1 is needed, and 500 make a good '
      'estimate. Pass one Observed per image.'
    )
  total = sum(image.ids.size for image in seen)
  found: dict[str, list[int]] = {name: [] for name in embedlens.CLASSES}
  candidates = []
  for i in np.unique(np.concatenate([image.ids for image in seen])):
    counts = np.array([np.sum(image.ids == i) for image in seen])
    share, tokens = np.mean(counts > 0), counts.sum() / total
    if share < thresholds.images or tokens < thresholds.tokens:
      continue
    p = counts[counts > 0] / counts.sum()
    even = -np.sum(p * np.log(p)) / max(math.log(len(seen)), 1e-9)
    ratios = {
      name: _ratio(seen, i, name)
      for name in (
        'encoder_norm',
        'llm_norm',
        'encoder_attention',
        'llm_attention',
      )
    }
    name = _class_of(ratios, thresholds)
    found[name].append(int(i))
    candidates.append(
      Candidate(
        id=int(i),
        images=float(share),
        tokens=float(tokens),
        specificity=float(1 - share * even),
        name=name,
        **ratios,
      )
    )
  groups = embedlens.Groups(
    **{name: tuple(found[name]) for name in embedlens.CLASSES[1:]}
  )
  return groups, candidates


def holds(
  full: float, without_group: float, without_alive: float, most: float = 0.005
) -> bool:
  """Whether accuracies bear a group out.

  Without it less than `most` is lost, without as many alive tokens more.
  """
  change = abs(full - without_group)
  return change < most and abs(full - without_alive) > change


def single_patch_images(
  patches: np.ndarray, side: int, cells: np.ndarray, background: float = 0.0
) -> np.ndarray:
  """Plain images with one patch each: the patch-compression benchmark.

  What a single visual token tells of its patch, and what the language model
  adds: compare `linear_readout` of that token with the whole model's answer.

  Args:
    patches: (M, p, p, C), one patch-sized picture per image.
    side: of the images, in pixels; a multiple of p.
    cells: (M, 2) int, row and column of the cell the picture is put in.
    background: of all other pixels.

  Returns:
    (M, side, side, C).
  """
  M, p, _, C = patches.shape
  if side % p:
    raise ValueError(
      f'single_patch_images: side={side} for patches of {p} pixels; it must '
      f'be a multiple of {p}. Use {-(-side // p) * p}.'
    )
  images = np.full(
    (M, side // p, p, side // p, p, C), background, patches.dtype
  )
  images[np.arange(M), cells[:, 0], :, cells[:, 1]] = patches
  return images.reshape(M, side, side, C)


def linear_readout(
  features: np.ndarray,
  labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  ridge: float = 1e-2,
) -> float:
  """Accuracy of a ridge classifier of features (M, D), labels (M,) int."""
  x = np.column_stack([features, np.ones(len(features))]).astype(np.float64)
  y = np.eye(int(max(labels.max(), test_labels.max())) + 1)[labels]
  gram = x.T @ x
  gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
  weights = np.linalg.solve(gram, x.T @ y)
  test = np.column_stack([test_features, np.ones(len(test_features))])
  return float(np.mean(np.argmax(test @ weights, axis=1) == test_labels))


def _ratio(seen: Sequence[Observed], i: int, name: str) -> float:
  """How far the tokens of id i stand out, averaged; nan: not known."""
  usual = np.median if name.endswith('norm') else np.mean
  ratios = []
  for image in seen:
    values = getattr(image, name)
    mine = image.ids == i
    if values is not None and mine.any():
      ratios.append(values[mine] / max(float(usual(values)), 1e-12))
  return float(np.mean(np.concatenate(ratios))) if ratios else math.nan


def _class_of(ratios: Mapping[str, float], thresholds: Thresholds) -> str:
  """Sink of the encoder, else of the language model, else dead."""
  for kind, name in (('encoder', 'vit_sink'), ('llm', 'llm_sink')):
    if (
      ratios[f'{kind}_norm'] >= thresholds.norm
      or ratios[f'{kind}_attention'] >= thresholds.attention
    ):
      return name
  return 'dead'

"""How far sentence embeddings moved, and whether search still finds the same.

  cosine_i = <e_i, r_i> / |e_i| |r_i|        e quantized, r float
  found_i  = argmax_j <q_i, k_j>             first sentence -> rest of paragraph

The cosine needs no labels and sees the smallest change; retrieval says what a
user would notice. Both models rank the same keys: agreement is the share of
queries whose best key is the same, and the rank correlation (Spearman) compares
all of the order. All vectors are compared at length one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.eval import batches


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Retrieval:
  """What one model finds, one number per query, all (N,) float32.

  found: index of the best key (int). correct: 1.0 where it is the query's own.
  """

  found: np.ndarray
  correct: np.ndarray


def encode(
  module: Any,
  variables: Any,
  data: Any,
  *,
  batch_size: int = 32,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """module.apply(variables, batch) over all samples, compiled once.

  Args:
    module: hashable; gives (B, C). Equal modules share one compilation.
    variables: its parameters.
    data: a pytree of arrays with the samples first.
    batch_size: samples a call; on a mesh, a multiple of its axis 'data'.
    mesh: None is the default device.

  Returns:
    (samples, C) float32, on every process.
  """
  variables = batches.replicate(variables, mesh)
  num = len(jax.tree.leaves(data)[0])
  size = min(batch_size, num) if mesh is None else batch_size
  outputs = []
  for start in range(0, num, size):
    rows = np.arange(start, start + size)
    rows = np.where(rows < num, rows, 0)  # Filled up; dropped below.
    batch = jax.tree.map(
      lambda a, rows=rows: batches.place(np.asarray(a)[rows], mesh), data
    )
    out = batches.fetch(_apply(module, variables, batch))
    outputs.append(out[: num - start])
  return np.concatenate(outputs)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Cosine of each row of a (N, C) with that of b: (N,).

  Raises:
    ValueError: shapes differ.
  """
  if a.shape != b.shape or a.ndim != 2:
    raise ValueError(
      f'cosine: shapes {a.shape} and {b.shape}; both must be (N, C). Encode '
      'the same samples with both models.'
    )
  return np.sum(normalised(a) * normalised(b), axis=1)


def retrieve(queries: np.ndarray, keys: np.ndarray) -> Retrieval:
  """The best key of each query; key i belongs to query i. Both (N, C)."""
  found = np.argmax(normalised(queries) @ normalised(keys).T, axis=1)
  correct = found == np.arange(len(queries))
  return Retrieval(found=found, correct=correct.astype(np.float32))


def rank_correlation(
  queries: np.ndarray,
  keys: np.ndarray,
  other_queries: np.ndarray,
  other_keys: np.ndarray,
) -> np.ndarray:
  """Spearman's correlation of how two models order the keys: (N,)."""
  ranks = [
    np.argsort(np.argsort(normalised(q) @ normalised(k).T, axis=1), axis=1)
    for q, k in ((queries, keys), (other_queries, other_keys))
  ]
  a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
  norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
  return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)


def normalised(x: np.ndarray) -> np.ndarray:
  """Rows of x (N, C) at length one, float64."""
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, variables, batch):
  return module.apply(variables, batch).astype(jnp.float32)

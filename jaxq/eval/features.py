"""How far image features moved, and whether neighbours stay neighbours.

  cosine_i    = <f_i, r_i> / |f_i| |r_i|           f quantized, r float
  neighbour_i = argmax_{j != i} <f_i, f_j>         each crop against the others

The neighbours need no labels: agreement is the share of crops whose nearest
neighbour is the float model's. Crops know their photo, and the share of crops
whose neighbour is of the same photo is the 1-NN accuracy of instance retrieval.
"""

import numpy as np

from jaxq.eval import embedding


def nearest(features: np.ndarray) -> np.ndarray:
  """Index of each row's nearest other row by cosine: (N, C) -> (N,).

  Raises:
    ValueError: fewer than two rows.
  """
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(
      f'nearest: features of shape {features.shape}; at least two rows (N, C) '
      'are needed. Give more images.'
    )
  unit = embedding.normalised(features)
  similarity = unit @ unit.T
  np.fill_diagonal(similarity, -np.inf)
  return np.argmax(similarity, axis=1)


def agreement(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """1.0 where the nearest neighbour is the reference's: (N,) float32."""
  return (nearest(features) == nearest(reference)).astype(np.float32)


def accuracy(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """1.0 where the nearest neighbour has the same label: (N,) float32."""
  return (labels[nearest(features)] == labels).astype(np.float32)

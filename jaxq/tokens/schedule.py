"""How many tokens are left behind each layer of an encoder.

A reducer that can work between the attention and the MLP of an encoder's
layers has `schedule(num_layers, n, special)`; it gives the slots behind every
layer, of n tokens in front of the first.
"""

from typing import Protocol, runtime_checkable

from jaxq.tokens import interface


@runtime_checkable
class InEncoder(Protocol):
  """A reducer that can work inside an encoder.

  proportional: whether attention weighs a key by its size, softmax(q k^T scale
    + log size); matters to mergers only.
  """

  proportional: bool

  def schedule(self, num_layers: int, n: int, special: int) -> tuple[int, ...]:
    """Slots behind each layer."""
    ...


def by_count(
  r: int,
  num_layers: int,
  n: int,
  special: int,
  *,
  inflect: float = 0.0,
  most: float = 0.5,
) -> tuple[int, ...]:
  """r tokens fewer behind each layer.

  Args:
    r: on average over the layers.
    num_layers, n, special: as of `InEncoder.schedule`.
    inflect: -1..1; r grows linearly from int(r (1 - inflect)) in the first
      layer to 2 r less that in the last; 0: constant.
    most: share of the tokens, special ones apart, that a layer may take.
  """
  first = int(r * (1 - inflect))
  step = (2 * r - 2 * first) / max(num_layers - 1, 1)
  left = []
  for layer in range(num_layers):
    n -= max(0, min(int(first + step * layer), int((n - special) * most)))
    left.append(n)
  return tuple(left)


def at_layer(
  layer: int, num_layers: int, n: int, special: int, ratio: float
) -> tuple[int, ...]:
  """All tokens up to `layer` layers, then the share `ratio` of them.

  Raises:
    ValueError: the model has no such layer.
  """
  if not 0 < layer < num_layers:
    raise ValueError(
      f'token reduction behind layer={layer} of {num_layers} layers; allowed '
      f'1..{num_layers - 1}. Name a layer of this model.'
    )
  kept = interface.budget_from_ratio(n - special, ratio).k_max + special
  return (n,) * (layer - 1) + (kept,) * (num_layers - layer + 1)

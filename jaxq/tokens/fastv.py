"""FastV: after a few layers of a decoder, keep the tokens it looks at.

Chen et al., 2024, "An Image is Worth 1/2 Tokens After Layer 2", arXiv
2403.06764. In front of layer K the visual tokens are ranked by the attention
that the last token of the prompt pays them in layer K - 1, mean over heads;
the best R stay, with the positions they had. FLOPs become
(K f(n) + (L - K) f(n')) / (L f(n)) of those of all tokens.

The scores come from outside: models.pruned_decoder runs a decoder in two parts
around this reducer. Inside an encoder they are the attention of the class
token, or what a token receives on average.
"""

import dataclasses

from jaxq.tokens import interface, primitives, schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastvConfig(interface.Config):
  """budget: R as a share of the visual tokens. layer: K, from 1 on."""

  budget: float = 0.5
  layer: int = 2

  proportional = False

  def __post_init__(self):
    super().__post_init__()
    if self.layer < 1:
      raise ValueError(
        f'FastvConfig: layer={self.layer}; it must be at least 1, since the '
        'layer before it gives the scores. The paper uses 2 and 3.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A selector by attention."""
    return interface.Traits(kind='selector', scores=True)

  def schedule(self, num_layers: int, n: int, special: int) -> tuple[int, ...]:
    """All up to layer K, then R."""
    return schedule.at_layer(self.layer, num_layers, n, special, self.budget)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    assert given.scores is not None
    index, mask = primitives.select_topk(
      primitives.protect(ts, given.scores),
      ts.mask,
      budget.k_max,
      budget.counts(ts.mask.shape[0]),
    )
    return primitives.selected(ts, index, mask)

"""SmoothQuant: moves the outliers of activations into the weights.

Xiao et al., 2022, https://arxiv.org/abs/2211.10438.

  a_j = max |x_j|,  w_j = max over consumers and columns of |W[j, :]|
  s_j = max(a_j^alpha / w_j^(1 - alpha), 1e-5),  w_j clamped at 1e-5 first
  x_j / s_j (folded into the producer),  W[j, :] * s_j

The float block is unchanged. A few channels of x are tens of times larger than
the rest and spend the range of one scale per token; the weights are even, and
quantize well still. alpha is the share of the range that the weights take on.
Costs a pass over the weights.

The paper folds into norms only, whose scale takes 1 / s for free. `sites='all'`
also smooths v -> o and up -> down; with grouped-query attention s is then the
mean over the heads that share a channel of v.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.calibrate import observers
from jaxq.nn import blocks
from jaxq.quant import equivalence, preconditions, transform

Params = Mapping[str, Any]
SITES = ('all', 'norms')
_LEAST = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuantConfig:
  """What is smoothed, and how far.

  Attributes:
    alpha: in [0, 1]; the paper's code has 0.85 for Llama, 0.8 for Mistral, 0.5
      for OPT.
    sites: 'norms' smooths what norms feed; 'all' every site of the block.
  """

  alpha: float = 0.85
  sites: str = 'norms'

  def __post_init__(self):
    if not 0 <= self.alpha <= 1:
      raise ValueError(
        f'SmoothQuantConfig: alpha={self.alpha}; it must lie in [0, 1]. Use '
        '0.85 for Llama, 0.5 where outliers are mild.'
      )
    if self.sites not in SITES:
      raise ValueError(
        f'SmoothQuantConfig: sites={self.sites!r}; allowed {list(SITES)}. The '
        "paper's choice is 'norms'."
      )


def scales(
  x_absmax: jax.Array, w_absmax: jax.Array, config: SmoothQuantConfig
) -> jax.Array:
  """Smoothing scales s (K,) float32, positive.

  Args:
    x_absmax: (K,), largest |x| of each input channel.
    w_absmax: (K,), largest |W| of each row over the consumers.
    config: static.
  """
  x_absmax = x_absmax.astype(jnp.float32)
  w_absmax = jnp.maximum(w_absmax.astype(jnp.float32), _LEAST)
  s = x_absmax**config.alpha / w_absmax ** (1 - config.alpha)
  return jnp.maximum(s, _LEAST)


def smoothquant(config: SmoothQuantConfig) -> transform.Transform:
  """The method. Sites whose consumers are all ignored are left alone."""

  def observe(block: blocks.BlockSpec) -> transform.Requests:
    return {
      tap: {'absmax': observers.absmax} for _, tap in _sites(block, config)
    }

  def apply(
    block: blocks.BlockSpec,
    params: Params,
    quant: Params,
    stats: transform.Stats,
  ) -> tuple[Params, Params]:
    for site, tap in _sites(block, config):
      _check(params, quant, site)
      w_absmax = equivalence.consumer_absmax(params, site)
      s = scales(stats[tap]['absmax'].absmax, w_absmax, config)
      params = equivalence.divide_producer(params, site, site.reduce(s))
    return params, quant

  return transform.Transform(name='smoothquant', apply=apply, observe=observe)


def _check(params: Params, quant: Params, site: blocks.Site) -> None:
  # A norm has no kernel; a linear as producer must be float too.
  paths = (site.producer, *site.consumers)
  preconditions.require_float(params, paths, 'smoothquant')
  preconditions.require_dynamic_inputs(quant, site.consumers, 'smoothquant')


def _sites(
  block: blocks.BlockSpec, config: SmoothQuantConfig
) -> list[tuple[blocks.Site, str]]:
  """The sites to smooth, each with the tap that its consumers' input passes."""
  norms = {norm for norm, _ in block.norms}
  chosen = []
  for site in block.sites:
    tap = block.tap_of(site)
    if tap and (config.sites == 'all' or site.producer in norms):
      chosen.append((site, tap))
  return chosen

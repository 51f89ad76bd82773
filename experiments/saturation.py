"""How often static input steps cut values off on text that is measured.

A step that was calibrated says nothing where a value lies beyond its range: the
code stays at the end of it. OutlierTune and MergeQuant have such steps
(jaxq.quant.outliertune, jaxq.quant.mergequant); a longer text than that of the
calibration, or another kind of it, may go beyond them unseen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import models
from experiments import results
from jaxq.nn import blocks, linear
from jaxq.quant import outliertune


def has_steps(variables: Any) -> bool:
  """Whether some inputs of a model, {'params', 'quant'}, arrive in steps."""
  is_step = lambda node: isinstance(node, linear.StepInput)
  nodes = jax.tree.leaves(variables['quant'], is_leaf=is_step)
  return any(map(is_step, nodes))


def rates(opened: models.OpenModel, tokens: np.ndarray) -> dict[str, float]:
  """{linear: share of its input's codes at the end of the range}.

  Of the linears whose inputs arrive in static steps; block by block.

  Args:
    opened: a quantized decoder.
    tokens: (B, T) int32.
  """
  outside = jax.tree.map(jnp.asarray, opened.outside())
  carry = opened.embed(outside, jnp.asarray(tokens))
  out = {}
  for i in range(opened.num_blocks):
    variables = jax.tree.map(jnp.asarray, opened.block_variables(i))
    found, carry = _step(opened.block_at(i), variables, carry)
    for path, rate in found.items():
      out[blocks.name_of(i, path)] = float(rate)
  return out


def metrics(
  opened: models.OpenModel, tokens: np.ndarray
) -> tuple[results.Metric, ...]:
  """The mean and the largest of the rates of a model that has steps.

  Warns where the largest is above outliertune.SATURATION_ALARM.
  """
  found = rates(opened, tokens)
  worst = max(found, key=lambda name: found[name])
  if found[worst] > outliertune.SATURATION_ALARM:
    logging.warning(
      '%.2f %% of the inputs of %s are at the ends of their static ranges, '
      'above %.1f %%; values beyond are cut off. Calibrate on data more like '
      'this, or on more of it.',
      100 * found[worst],
      worst,
      100 * outliertune.SATURATION_ALARM,
    )
  conventions = {'tokens': int(tokens.size)}
  return (
    results.Metric(
      name='saturated inputs',
      value=float(np.mean(list(found.values()))),
      conventions=conventions,
    ),
    results.Metric(
      name='saturated, worst linear',
      value=found[worst],
      conventions={**conventions, 'linear': worst},
    ),
  )


@functools.partial(jax.jit, static_argnums=0)
def _step(
  block: blocks.BlockSpec, variables: Any, carry: blocks.Carry
) -> tuple[dict[str, jax.Array], blocks.Carry]:
  found = outliertune.saturation_rates(block, variables, carry)
  return found, block.apply(variables, carry)

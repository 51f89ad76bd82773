"""A small decoder block, real enough for every method, and its statistics.

The driver of jaxq.calibrate does the same over a whole model: observer states
by request, one forward pass that updates them, then `apply`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.calibrate import steps
from jaxq.nn import blocks, taps
from jaxq.quant import transform as transform_lib
from models import decoder

C, F, H, HKV, D = 32, 64, 4, 2, 8


def small_block(seed: int = 0) -> tuple[blocks.BlockSpec, dict[str, Any]]:
  """A BlockSpec with C=32, F=64, H=4, Hkv=2, D=8, and its float32 params.

  Norm scales are not ones, so that folding them wrongly shows.
  """
  config = decoder.DecoderConfig(
    vocab_size=64,
    hidden_size=C,
    intermediate_size=F,
    num_layers=1,
    num_heads=H,
    num_kv_heads=HKV,
    head_dim=D,
  )
  keys = iter(jax.random.split(jax.random.key(seed), 9))

  def kernel(K, N):
    return {'kernel': jax.random.normal(next(keys), (K, N)) / K**0.5}

  def norm():
    return {'scale': jax.random.uniform(next(keys), (C,), minval=0.5, maxval=2)}

  params = {
    'input_norm': norm(),
    'attention': {
      'q_proj': kernel(C, H * D),
      'k_proj': kernel(C, HKV * D),
      'v_proj': kernel(C, HKV * D),
      'o_proj': kernel(H * D, C),
    },
    'post_norm': norm(),
    'mlp': {
      'gate_proj': kernel(C, F),
      'up_proj': kernel(C, F),
      'down_proj': kernel(F, C),
    },
  }
  return decoder.block_spec(config), params


def inputs(
  seed: int = 1, batch: int = 4, length: int = 24, channels: int = C
) -> jax.Array:
  """(batch, length, channels): correlated channels, two of them outliers."""
  key_z, key_mix = jax.random.split(jax.random.key(seed))
  z = jax.random.normal(key_z, (batch, length, channels))
  mix = jax.random.normal(key_mix, (channels, channels)) / channels**0.5
  x = z * 0.3 + jnp.matmul(z[..., : channels // 4], mix[: channels // 4])
  return x.at[..., 3].multiply(20.0).at[..., 7].multiply(8.0)


def observe(
  block: blocks.BlockSpec,
  params: Any,
  quant: Any,
  transform: transform_lib.Transform,
  x: jax.Array,
) -> dict[str, dict[str, Any]]:
  """The finished statistics that a single transform asks for.

  Args:
    block, params, quant: the block as the transform finds it.
    transform: its `rest` is not looked at.
    x: (B, T, C), one calibration batch.

  Returns:
    {tap path: {name: state}}, {} where it asks for nothing.
  """
  requests = transform.observe(block)
  if not requests:
    return {}
  variables = {'params': params, 'quant': quant}
  states = steps.initial_states(block, requests, variables, x)
  _, updated = block.observe({**variables, 'taps': states}, x)
  return {tap: dict(taps.get_path(updated, tap)) for tap in requests}


def run(
  block: blocks.BlockSpec,
  params: Any,
  transform: transform_lib.Transform,
  x: jax.Array,
  quant: Any = None,
) -> tuple[Any, Any]:
  """Observes and applies every stage of a chain; returns (params, quant)."""
  quant = {} if quant is None else quant
  for stage in transform_lib.stages(transform):
    stats = observe(block, params, quant, stage, x)
    stats = steps.with_streams(stage, stats, [x], None)
    apply = jax.jit(stage.apply, static_argnums=0)
    params, quant = apply(block, params, quant, stats)
  return params, quant


def output(
  block: blocks.BlockSpec, params: Any, quant: Any, x: jax.Array
) -> jax.Array:
  """The block's output (B, T, C)."""
  return block.apply({'params': params, 'quant': quant}, x)


def primitives(jaxpr: Any) -> list[str]:
  """Names of the primitives of a jaxpr, those inside it included."""
  found = []
  for equation in jaxpr.eqns:
    inner = _inner(equation)
    found += [] if inner else [equation.primitive.name]
    for sub in inner:
      found += primitives(sub)
  return found


def primitives_on_width(jaxpr: Any, width: int) -> set[str]:
  """Names of the primitives that read an array (.., T, width), at any depth.

  Kernels are (width, N), so these are what runs on activations.
  """
  used = set()
  for equation in jaxpr.eqns:
    inner = _inner(equation)
    if inner:
      for sub in inner:
        used |= primitives_on_width(sub, width)
      continue
    shapes = [
      v.aval.shape
      for v in equation.invars
      if hasattr(v, 'aval') and hasattr(v.aval, 'shape')
    ]
    if any(s and s[-1] == width and len(s) >= 2 for s in shapes):
      used.add(equation.primitive.name)
  return used


def _inner(equation: Any) -> list[Any]:
  """The jaxprs within an equation."""
  holds = lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr')
  found = jax.tree.leaves(list(equation.params.values()), is_leaf=holds)
  return [getattr(p, 'jaxpr', p) for p in found if holds(p)]

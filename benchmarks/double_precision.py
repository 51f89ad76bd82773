"""Runs an entry point in double precision: the control of sharding_check.

  python -m benchmarks.double_precision experiments.calibrate --flag=...

jaxq says `jnp.float32` wherever a method computes in it. Here that name means
float64 and weights are widened as they are read, so the same program does the
same sums with 29 more bits. What then still differs between two ways to take a
sum is not its rounding. Only for controls: it is slow, and stored arrays keep
the types that the format gives them.
"""

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _widen(read: Any) -> Any:
  """A reader of parameters, whose float32 arrays become float64."""

  def wide(leaf):
    floating = np.issubdtype(leaf.dtype, np.floating)
    return leaf.astype(np.float64) if floating else leaf

  return lambda *args: jax.tree.map(wide, read(*args))


def _exponent(x: jax.Array) -> jax.Array:
  """formats.exponent, which reads the bits of a float32, of any float."""
  return jnp.where(x == 0, -127, jnp.frexp(x)[1] - 1)


def _exp2(e: jax.Array) -> jax.Array:
  """formats.exp2 in float64."""
  return jnp.ldexp(jnp.ones(jnp.shape(e), jnp.float64), e)


def _by_float32(rne_saturate: Any) -> Any:
  """Rounds to float32 first, as torch casts a float64 to fp8.

  One value of a million lies so near a boundary that this moves it, and one is
  enough to change all that follows.
  """
  return lambda x, fmt: rne_saturate(
    lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23), fmt
  )


def main() -> None:
  """argv: module of the entry point, then its flags."""
  if len(sys.argv) < 2:
    sys.exit('usage: python -m benchmarks.double_precision MODULE [--flag ...]')
  jax.config.update('jax_enable_x64', True)
  vars(jnp)['float32'] = jnp.float64  # Before jaxq is imported.
  del sys.argv[0]
  cli = importlib.import_module('experiments.cli')
  loading = importlib.import_module('models.loading')
  spec: Any = importlib.import_module('jaxq.numerics.spec').QuantSpec
  stored = spec.stored_scale_dtype.fget
  # Scales of tokens are never on disk.
  spec.stored_scale_dtype = property(
    lambda self: jnp.float64 if self.granularity == 'token' else stored(self)
  )
  formats: Any = importlib.import_module('jaxq.numerics.formats')
  formats.exponent, formats.exp2 = _exponent, _exp2
  formats.rne_saturate = _by_float32(formats.rne_saturate)
  loading.DTYPES = (*loading.DTYPES, 'float64')
  opened: Any = loading.OpenModel
  opened.outside = _widen(opened.outside)
  opened.block_params = _widen(opened.block_params)
  cli.run(importlib.import_module(sys.argv[0]).main)


if __name__ == '__main__':
  main()

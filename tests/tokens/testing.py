"""Parameters for tests, without compiling an initializer."""

import jax
import jax.numpy as jnp
import numpy as np


def filled(init, *args, seed=0):
  """The tree that `init(*args)` would give, filled by NumPy.

  Kernels are normal with a variance of one over their rows, what scales is 1,
  biases are small.
  """
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    if 'scale' in name or 'final_norm' in name:
      return jnp.ones(leaf.shape, leaf.dtype)
    size = 0.1
    if 'bias' not in name and leaf.ndim > 1:
      size = leaf.shape[-2] ** -0.5
    return jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)

  shapes = jax.eval_shape(init, *args)
  with jax.ensure_compile_time_eval():  # Also where a test is being traced.
    return jax.tree_util.tree_map_with_path(fill, shapes)

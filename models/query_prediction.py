"""A layer's queries from another layer's input.

Double Sparsity (Yang et al., 2024, https://arxiv.org/abs/2408.07092) fetches
what the next layer will read while this one runs. The residual stream changes
little from layer to layer, so that layer l + 1's projection of layer l's
normalised attention input resembles its own query.
"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxq.nn import attention, linear, norms, taps
from jaxq.nn import rope as rope_lib


def of_run(variables: Mapping[str, Any], i: int) -> dict[str, Any]:
  """Variables of the query projections of run i of a Decoder, stacked."""
  found = {}
  for kind, tree in variables.items():
    attentions = taps.get_path(tree, f'blocks_{i}/attention') or {}
    own = {n: attentions[n] for n in ('q_proj', 'q_norm') if n in attentions}
    found[kind] = own
  return found


def queries(
  module: attention.Attention,
  variables: Mapping[str, Any],
  x: jax.Array,
  positions: jax.Array,
) -> jax.Array:
  """The queries (B, T, H, D) that an attention makes of its input (B, T, C).

  Args:
    module: the attention, or one of the same shape.
    variables: {'params', 'quant'} with its q_proj and q_norm; those of another
      layer give what it would ask if its input were this.
    x: the input, normalised.
    positions: (B, T) int32.
  """

  def of(name):
    return {k: tree[name] for k, tree in variables.items() if name in tree}

  B, T, _ = x.shape
  dense = linear.QuantDense(
    module.num_heads * module.head_dim,
    module.qkv_bias,
    implementation=module.implementation,
    parent=None,
  )
  q: Any = dense.apply(of('q_proj'), x)
  q = q.reshape(B, T, module.num_heads, module.head_dim)
  if module.qk_norm:
    norm = norms.RMSNorm(module.norm_eps, parent=None)
    q = norm.apply(of('q_norm'), q)
  if module.rope is not None:
    q = rope_lib.rotate(q, positions, module.rope)
  turned: jax.Array = q
  return turned

"""Decoder layers whose attention and positions the caller chooses.

  x = x + o(attend(rotate(q), rotate(k), v));  x = x + mlp(norm(x))

Some reducers run a few layers of a language model in another way than it does:
without the causal mask (EchoingPixels' sieve), up to a layer whose states they
want (LangDC's captioner), with updates left out (EmbedLens). What is the same
is here: `attend` is a function of the caller, `tables` are any rotary tables,
and `run` scans over stacked layers and hands out the state in front of one.

Parameters have the names of models.decoder.Block with RMSNorm and gated MLP
(Llama, Mistral, Qwen2), so the stacked blocks of such a model run as they are,
with quantized leaves too.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear, mlp, norms
from jaxq.tokens import primitives, sync_rope

Variables = Mapping[str, Any]

# (q (B, T, H, D), k, v (B, T, Hkv, D)) -> ((B, T, H, D), what is to be kept).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
  """num_heads (H), num_kv_heads (Hkv), head_dim (D), intermediate_size (F).

  norm_eps: of the norms. qkv_bias: whether q, k and v have biases.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  intermediate_size: int
  norm_eps: float = 1e-6
  qkv_bias: bool = False

  def __post_init__(self):
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'LayerConfig: num_heads={self.num_heads}, num_kv_heads='
        f'{self.num_kv_heads}; the second must divide the first. Check the '
        "model's configuration."
      )


class Attention(nn.Module):
  """Projections and positions around the caller's attention."""

  config: LayerConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    tables: sync_rope.Tables,
    attend: Attend,
    rows: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """(B, T, C) -> (B, T, C), attend's second result.

    rows (B, R) int32 asks for the output of these tokens only, (B, R, C).
    """
    c, C = self.config, x.shape[-1]

    def heads(n, name, x, tables):
      y = linear.QuantDense(n * c.head_dim, c.qkv_bias, name=f'{name}_proj')(x)
      y = y.reshape(*x.shape[:2], n, c.head_dim)
      return y if tables is None else sync_rope.rotate(y, tables)

    asked, asked_tables = x, tables
    if rows is not None:
      asked = primitives.gather(x, rows)
      cos, sin = (primitives.gather(table, rows) for table in tables)
      asked_tables = cos, sin
    q = heads(c.num_heads, 'q', asked, asked_tables)
    k = heads(c.num_kv_heads, 'k', x, tables)
    v = heads(c.num_kv_heads, 'v', x, None)
    out, kept = attend(q, k, v)
    out = out.reshape(*asked.shape[:2], c.num_heads * c.head_dim)
    return linear.QuantDense(C, name='o_proj')(out), kept


class Layer(nn.Module):
  """One layer; its two updates can be had apart."""

  config: LayerConfig

  def setup(self):
    c = self.config
    self.input_norm = norms.RMSNorm(c.norm_eps)
    self.attention = Attention(c)
    self.post_norm = norms.RMSNorm(c.norm_eps)
    self.mlp = mlp.MLP(c.intermediate_size)

  def __call__(
    self, x: jax.Array, tables: sync_rope.Tables, attend: Attend
  ) -> tuple[jax.Array, Any]:
    """(B, T, C) -> (B, T, C), attend's second result."""
    out, kept = self.attention_update(x, tables, attend)
    x = x + out
    return x + self.mlp_update(x), kept

  def attention_update(
    self,
    x: jax.Array,
    tables: sync_rope.Tables,
    attend: Attend,
    rows: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """What attention adds to x, or to the tokens `rows` of it."""
    return self.attention(self.input_norm(x), tables, attend, rows)

  def mlp_update(self, x: jax.Array) -> jax.Array:
    """What the MLP adds to x."""
    return self.mlp(self.post_norm(x))


def init(
  rng: jax.Array, config: LayerConfig, width: int, layers: int
) -> Variables:
  """{'params': ...} of `layers` stacked layers of `width` channels."""
  x = jnp.zeros((1, 1, width))
  half = jnp.zeros((1, 1, config.head_dim // 2))

  def one(key):
    return Layer(config).init(key, x, (half, half), lambda q, k, v: (q, None))

  return jax.vmap(one)(jax.random.split(rng, layers))


def number(variables: Variables) -> int:
  """How many layers are stacked."""
  return jax.tree.leaves(variables['params'])[0].shape[0]


def part(variables: Variables, start: int, stop: int) -> Variables:
  """Layers start..stop-1."""
  return jax.tree.map(lambda leaf: leaf[start:stop], dict(variables))


def run(
  config: LayerConfig,
  variables: Variables,
  x: jax.Array,
  tables: sync_rope.Tables,
  attend: Callable[..., tuple[jax.Array, Any]],
  per_layer: Any = None,
  capture: int | None = None,
) -> tuple[jax.Array, Any, jax.Array | None]:
  """x through stacked layers.

  Args:
    config: of every layer.
    variables: {'params', perhaps 'quant'}, layers first.
    x: (B, T, C).
    tables: rotary tables of x.
    attend: (q, k, v, per_layer of this layer) -> (out, kept).
    per_layer: a pytree, layers first (caches).
    capture: l in 0..L: the state in front of layer l is handed out, 0 is x
      itself and L the last layer's output.

  Returns:
    The last layer's output, what the layers keep (stacked), the captured state.
  """
  layer = Layer(config)

  def body(carry, inputs):
    i, x, captured = carry
    layer_variables, extra = inputs
    if capture is not None:
      captured = jnp.where(i == capture, x, captured)
    x, kept = layer.apply(
      layer_variables, x, tables, functools.partial(_with, attend, extra)
    )
    return (i + 1, x, captured), kept

  first = None if capture is None else x
  (_, out, captured), kept = jax.lax.scan(
    body, (jnp.int32(0), x, first), (dict(variables), per_layer)
  )
  if capture == number(variables):
    captured = out
  return out, kept, captured


def masked_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """q (B, T, H, D), k, v (B, S, Hkv, D), mask (B, 1 or T, S) -> as q."""
  return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
  """Softmax of the scores: (B, H, T, S) float32, 0 where mask is False.

  For what needs the weights themselves; mask (B, 1 or T, S).
  """
  B, T, H, D = q.shape
  Hkv = k.shape[2]
  q = q.reshape(B, T, Hkv, H // Hkv, D)
  scores = jnp.einsum(
    'btkgd,bskd->bkgts', q, k, preferred_element_type=jnp.float32
  )
  seen = mask[:, None, None]
  scores = jnp.where(seen, scores * D**-0.5, jnp.finfo(jnp.float32).min)
  weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)
  return weights.reshape(B, H, T, -1)


def weigh(weights: jax.Array, v: jax.Array) -> jax.Array:
  """weights (B, H, T, S), v (B, S, Hkv, D) -> (B, T, H, D) in v.dtype."""
  B, H, T, S = weights.shape
  Hkv = v.shape[2]
  grouped = weights.reshape(B, Hkv, H // Hkv, T, S).astype(v.dtype)
  out = jnp.einsum('bkgts,bskd->btkgd', grouped, v)
  return out.reshape(B, T, H, -1)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """The final norm of a model whose `scale` (C,) is at hand."""
  out: Any = norms.RMSNorm(eps).apply({'params': {'scale': scale}}, x)
  return out


def _with(attend, extra, q, k, v):
  return attend(q, k, v, extra)

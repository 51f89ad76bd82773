"""Blocks and models with planted outliers, where a mechanism's gain is large.

Small pretrained models have milder outliers than those of 7B and more. Here
they are put where those have them, at the sizes that the methods' papers
report, in otherwise random blocks of C = 64:

  shift  two channels of each norm's output lie around +shift and -shift with a
         deviation of one (LayerNorm's bias; Outlier Suppression+); the biases
         behind take it back, so that the block computes what it did
  scale  two channels are `scale` times the others, around zero (the norm's
         scale; SmoothQuant, OutlierTune, MergeQuant); the rows that read them
         are smaller by its root
  first_token  one channel of the residual stream is that large at position 0
         (massive activations: attention sinks)

  block, params = planted.block('layer', planted.SHIFTED)
  x = planted.inputs(planted.SHIFTED)
  planted.error(block, params, transform, x)      of the block's output

`block` makes OPT's ('layer': LayerNorm, biases, ReLU), Llama's ('rms': RMSNorm,
no biases, SwiGLU), BERT's ('post': LayerNorms on the residual stream, read by
Shortcuts) and Falcon's ('parallel': one norm for attention and MLP).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import blocks, linear, norms, shortcut, taps
from jaxq.quant import equivalence
from jaxq.quant import transform as transform_lib
from models import decoder, loading
from tests.calibrate import testing as models_testing
from tests.quant import testing

C, F, H, D = 64, 128, 4, 16
# Channels that are large for all tokens, and for those of either modality.
COMMON, MODAL = (2, 33), ((5, 12, 41, 50), (8, 23, 30, 61))
MASSIVE_CHANNEL = 20
LARGE = 7  # Of the hidden channels.
KINDS = ('layer', 'parallel', 'post', 'rms')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plant:
  """What is planted (module docstring).

  Attributes:
    channels: of the norms' outputs that are outliers.
    scale: factor on the norm's scale there.
    shift: added to the norm's bias there, with alternating sign; not for 'rms'.
    first_token: value of MASSIVE_CHANNEL of the block's input at position 0.
  """

  channels: tuple[int, ...] = (5, 41)
  scale: float = 1.0
  shift: float = 0.0
  first_token: float = 0.0


NOTHING = Plant()
SHIFTED = Plant(shift=30.0)
SCALED = Plant(scale=50.0)
MASSIVE = Plant(first_token=1000.0)


class Attention(nn.Module):
  """Causal attention without positions; q, k, v and o with biases."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, T, C) -> (B, T, C)."""
    B, T, _ = x.shape
    q, k, v = (
      linear.QuantDense(C, use_bias=True, name=f'{name}_proj')(x)
      for name in 'qkv'
    )
    q, k, v = (y.reshape(B, T, H, D) for y in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    out = out.reshape(B, T, C)
    return linear.QuantDense(C, use_bias=True, name='o_proj')(out)


class MLP(nn.Module):
  """fc2(relu(fc1(x))), with biases."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, T, C) -> (B, T, C)."""
    x = jax.nn.relu(linear.QuantDense(F, use_bias=True, name='fc1')(x))
    return linear.QuantDense(C, use_bias=True, name='fc2')(x)


class Block(nn.Module):
  """A block with LayerNorms; kind is one of KINDS but 'rms'."""

  kind: str

  def setup(self):
    self.input_norm = norms.LayerNorm()
    self.attention = Attention()
    if self.kind != 'parallel':
      self.post_norm = norms.LayerNorm()
    self.mlp = MLP()
    if self.kind == 'post':
      self.attention_shortcut = shortcut.Shortcut()
      self.mlp_shortcut = shortcut.Shortcut()

  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    """(B, T, C) -> (B, T, C), None."""
    h = self.input_norm(x)
    if self.kind == 'parallel':
      return x + self.attention(h) + self.mlp(h), None
    if self.kind == 'layer':
      x = x + self.attention(h)
      return x + self.mlp(self.post_norm(x)), None
    u = self.post_norm(self.attention_shortcut(h) + self.attention(h))
    return self.mlp_shortcut(u) + self.mlp(u), None

  def attention_output(self, x: jax.Array) -> jax.Array:
    """The attention's output from its normalised input (B, T, C)."""
    return self.attention(x)

  def both_outputs(self, x: jax.Array) -> jax.Array:
    """Attention's and MLP's outputs side by side: (B, T, 2 C)."""
    return jnp.concatenate([self.attention(x), self.mlp(x)], axis=-1)


def block(
  kind: str, plant: Plant = NOTHING, seed: int = 0
) -> tuple[blocks.BlockSpec, dict[str, Any]]:
  """A BlockSpec and its float32 params, with the plant in its norms."""
  if kind == 'rms':
    spec = decoder.block_spec(_config(num_layers=1))
  else:
    spec = _spec(kind)
  x = jnp.zeros((1, 2, C))
  params = jax.jit(spec.module.init)(jax.random.key(seed), x)['params']
  # Biases that are not zero, so that one that is lost shows.
  keys = jax.random.split(jax.random.key(seed + 1), 64)
  for i, (path, leaf) in enumerate(taps.leaves(params)):
    if path.endswith('_proj/bias') or '/fc' in path and path.endswith('bias'):
      noise = 0.1 * jax.random.normal(keys[i], leaf.shape)
      params = taps.set_path(params, path, noise)
  return spec, plant_in(params, plant, spec)


def plant_in(
  params: Any, plant: Plant, spec: blocks.BlockSpec
) -> dict[str, Any]:
  """A block's params with outliers in what its norms put out."""
  params = jax.tree.map(jnp.asarray, dict(params))
  channels = jnp.array(plant.channels)
  signs = jnp.where(jnp.arange(len(plant.channels)) % 2 == 0, 1.0, -1.0)
  s = jnp.ones(C).at[channels].set(plant.scale)
  z = jnp.zeros(C).at[channels].set(plant.shift * signs)
  for site in spec.sites:
    norm = taps.get_path(params, site.producer)
    if 'kernel' in norm:
      continue
    # The inverse of a migration: nothing is shifted behind the consumers.
    if plant.shift:
      params = equivalence.shift_producer(params, site, -z)
    norm = taps.get_path(params, f'{site.producer}/scale')
    params = taps.set_path(params, f'{site.producer}/scale', norm * s)
    for path in site.consumers:
      kernel = blocks.kernel_of(params, path) / jnp.sqrt(s)[:, None]
      params = taps.set_path(params, f'{path}/kernel', kernel)
  return params


def large_hidden_channel() -> tuple[blocks.BlockSpec, dict[str, Any]]:
  """Llama's block, one channel of up * silu(gate) fifty times the others."""
  spec, params = block('rms')
  up, down = (
    blocks.kernel_of(params, f'mlp/{name}_proj') for name in ('up', 'down')
  )
  up = up.at[:, LARGE].multiply(50.0)
  params = taps.set_path(params, 'mlp/up_proj/kernel', up)
  down = down.at[LARGE].divide(50.0**0.5)
  return spec, taps.set_path(params, 'mlp/down_proj/kernel', down)


def inputs(
  plant: Plant = NOTHING, seed: int = 1, batch: int = 4, length: int = 24
) -> jax.Array:
  """(batch, length, C) of the residual stream."""
  x = jax.random.normal(jax.random.key(seed), (batch, length, C))
  if plant.first_token:
    x = x.at[:, 0, MASSIVE_CHANNEL].set(plant.first_token)
  return x


def modal_inputs(
  seed: int = 1, batch: int = 8, length: int = 32, size: float = 20.0
) -> tuple[jax.Array, jax.Array]:
  """Two modalities whose outliers lie in other channels, and common ones.

  Outliers have a sign of their own, as those of language models, and half of
  their size as deviation. The first half of a sequence is of modality 0.

  Returns:
    x (batch, length, C), modality (batch, length) int32.
  """
  noise = jax.random.normal(jax.random.key(seed), (batch, length, C))
  late = (jnp.arange(length) >= length // 2).astype(jnp.int32)
  modality = jnp.broadcast_to(late, (batch, length))
  signs = jnp.where(jnp.arange(C) % 3 == 0, -1.0, 1.0)[None, None]
  outliers = size * (signs + 0.5 * noise)
  masks = []
  for modal in MODAL:
    channels = jnp.array(COMMON + modal)
    masks.append(jnp.zeros(C, bool).at[channels].set(True))
  return jnp.where(jnp.stack(masks)[modality], outliers, noise), modality


def model(plant: Plant, num_layers: int = 2) -> loading.OpenModel:
  """A random Llama of C = 64 with the plant in its norms, for the driver."""
  opened = models_testing.small_model(_config(num_layers=num_layers))
  opened.source.blocks = [
    jax.device_get(plant_in(params, plant, opened.block))
    for params in opened.source.blocks
  ]
  return opened


def error(
  spec: blocks.BlockSpec,
  params: Any,
  transform: transform_lib.Transform,
  x: jax.Array,
) -> float:
  """Relative squared error of what the block adds, after `transform`."""
  exact = testing.output(spec, params, {}, x)
  made = testing.run(spec, params, transform, x)
  y = testing.output(spec, *made, x)
  power = jnp.mean((exact - x) ** 2)
  return float(jnp.mean((y - exact) ** 2) / power)


def _config(num_layers: int) -> decoder.DecoderConfig:
  return decoder.DecoderConfig(
    vocab_size=models_testing.VOCAB,
    hidden_size=C,
    intermediate_size=F,
    num_layers=num_layers,
    num_heads=H,
    num_kv_heads=H // 2,
    head_dim=D,
  )


def _spec(kind: str) -> blocks.BlockSpec:
  if kind not in KINDS:
    raise ValueError(f'planted.block: kind={kind!r}; allowed {list(KINDS)}.')
  qkv = tuple(f'attention/{n}_proj' for n in 'qkv')
  o, fc1, fc2 = 'attention/o_proj', 'mlp/fc1', 'mlp/fc2'
  value = blocks.Site(
    producer='attention/v_proj', consumers=(o,), heads=(H, 1, D)
  )
  if kind == 'parallel':
    taps_of = {**dict.fromkeys((*qkv, fc1), f'{qkv[0]}/in')}
    sites = (
      blocks.Site(
        producer='input_norm', consumers=(*qkv, fc1), method='both_outputs'
      ),
      value,
    )
    feeds = (('input_norm', (*qkv, fc1)),)
  else:
    taps_of = {**dict.fromkeys(qkv, f'{qkv[0]}/in'), fc1: f'{fc1}/in'}
    post = kind == 'post'
    sites = (
      blocks.Site(
        producer='input_norm',
        consumers=qkv,
        method='attention_output',
        shortcuts=('attention_shortcut',) if post else (),
      ),
      value,
      blocks.Site(
        producer='post_norm',
        consumers=(fc1,),
        shortcuts=('mlp_shortcut',) if post else (),
      ),
    )
    feeds = (('input_norm', qkv), ('post_norm', (fc1,)))
  taps_of |= {o: f'{o}/in', fc2: f'{fc2}/in'}
  return blocks.BlockSpec(
    module=Block(kind),
    linears=tuple(
      blocks.Linear(path=path, tap=taps_of[path])
      for path in (*qkv, o, fc1, fc2)
    ),
    sites=sites,
    residual_out=(o, fc2),
    norms=feeds,
    rotated=(o, fc2),
  )

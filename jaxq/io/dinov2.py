"""DINOv2-shaped vision transformers: Hugging Face's names, and directories.

`jaxq.io.onnx_vit` finds tensors of the same names in exported graphs.
"""

import numpy as np

from jaxq.io import encoder_source

CLASS_TOKEN = 'embeddings.cls_token'
POSITIONS = 'embeddings.position_embeddings'
PATCHES = 'embeddings.patch_embeddings.projection'
_LINEARS = {
  'attention/q_proj': 'attention.attention.query',
  'attention/k_proj': 'attention.attention.key',
  'attention/v_proj': 'attention.attention.value',
  'attention/o_proj': 'attention.output.dense',
  'mlp/up_proj': 'mlp.fc1',
  'mlp/down_proj': 'mlp.fc2',
}


class Dinov2Source(encoder_source.EncoderSource):
  """A weight source over a Dinov2 directory."""

  family = 'vit'
  model_type = 'dinov2'
  keys = encoder_source.Keys(
    sizes=(
      'hidden_size',
      'num_hidden_layers',
      'num_attention_heads',
      'mlp_ratio',
      'patch_size',
      'image_size',
    ),
    others=('layer_norm_eps', 'hidden_act'),
    fixed={
      'num_channels': (3,),
      'qkv_bias': (True,),
      'use_swiglu_ffn': (False,),
      'quantization_config': (),
    },
  )
  prefixes = ('', 'dinov2.')
  ignored = ('embeddings.mask_token', 'classifier.')

  def outside_table(self) -> encoder_source.Table:
    """Patches, class token, positions and the last norm."""
    return outside_table()

  def block_table(self, i: int) -> encoder_source.Table:
    """Block i."""
    return block_table(i)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Every tensor -> its shape."""
    c = self.config
    C, P = c['hidden_size'], c['patch_size']
    grid = (c['image_size'] // P) ** 2
    shapes: dict[str, tuple[int, ...]] = {
      CLASS_TOKEN: (1, 1, C),
      POSITIONS: (1, 1 + grid, C),
      f'{PATCHES}.weight': (C, 3, P, P),
    }
    tables = [block_table(i) for i in range(c['num_hidden_layers'])]
    for table in (outside_table(), *tables):
      for path, name in table.items():
        N = C * c['mlp_ratio'] if 'up_proj' in path else C
        K = C * c['mlp_ratio'] if 'down_proj' in path else C
        shapes.setdefault(name, (N, K) if path.endswith('/kernel') else (N,))
    return shapes

  def outside(self) -> dict:
    """Parameters outside the blocks; tables without their batch axis."""
    params = super().outside()
    for name in ('class_token', 'positions'):
      table = params[name]['embedding']
      params[name]['embedding'] = np.ascontiguousarray(table[0])
    return params


def outside_table() -> encoder_source.Table:
  """The leaves outside the blocks."""
  return {
    'class_token/embedding': CLASS_TOKEN,
    'positions/embedding': POSITIONS,
    **encoder_source.dense('patches', PATCHES),
    **encoder_source.norm('final_norm', 'layernorm'),
  }


def block_table(i: int) -> encoder_source.Table:
  """The leaves of block i."""
  layer = f'encoder.layer.{i}'
  table = {
    'attention_scale/scale': f'{layer}.layer_scale1.lambda1',
    'mlp_scale/scale': f'{layer}.layer_scale2.lambda1',
    **encoder_source.norm('input_norm', f'{layer}.norm1'),
    **encoder_source.norm('post_norm', f'{layer}.norm2'),
  }
  for path, name in _LINEARS.items():
    table |= encoder_source.dense(path, f'{layer}.{name}')
  return table

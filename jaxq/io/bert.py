"""BERT in Hugging Face directories.

The tensors may stand under 'bert.' (a model with a head) or without it. Pooler
and heads are left out: sentence embeddings do not use them. The norms are dealt
out to the blocks as models/encoder.py has them: a block begins with the norm
that the layer before it ends with.
"""

import numpy as np
import tokenizers

from jaxq.io import encoder_source
from jaxq.io import tokenizer as tokenizer_lib

_OUTSIDE = {
  'embed/embedding': 'embeddings.word_embeddings.weight',
  'positions/embedding': 'embeddings.position_embeddings.weight',
  'types/embedding': 'embeddings.token_type_embeddings.weight',
}
_FIRST_NORM = 'embeddings.LayerNorm'
_LINEARS = {
  'attention/q_proj': 'attention.self.query',
  'attention/k_proj': 'attention.self.key',
  'attention/v_proj': 'attention.self.value',
  'attention/o_proj': 'attention.output.dense',
  'mlp/up_proj': 'intermediate.dense',
  'mlp/down_proj': 'output.dense',
}
_SHORTCUTS = ('attention_shortcut', 'mlp_shortcut')


class BertSource(encoder_source.EncoderSource):
  """A weight source over a BERT directory."""

  family = 'encoder'
  model_type = 'bert'
  keys = encoder_source.Keys(
    sizes=(
      'vocab_size',
      'hidden_size',
      'intermediate_size',
      'num_hidden_layers',
      'num_attention_heads',
      'max_position_embeddings',
      'type_vocab_size',
    ),
    others=('layer_norm_eps', 'hidden_act', 'pad_token_id'),
    fixed={
      'position_embedding_type': ('absolute',),
      'is_decoder': (False,),
      'add_cross_attention': (False,),
      'quantization_config': (),
    },
  )
  prefixes = ('', 'bert.')
  ignored = (
    *('pooler.', 'bert.pooler.', 'cls.', 'classifier.', 'qa_outputs.'),
    'embeddings.position_ids',  # 0, 1, 2, ...: older files have it.
  )

  def outside_table(self) -> encoder_source.Table:
    """Embeddings and the last norm."""
    last = _last_norm(self.config['num_hidden_layers'] - 1)
    return _OUTSIDE | encoder_source.norm('final_norm', last)

  def block_table(self, i: int) -> encoder_source.Table:
    """Block i: the norm before it, its middle norm, its linears."""
    layer = f'encoder.layer.{i}'
    first = _FIRST_NORM if i == 0 else _last_norm(i - 1)
    table = encoder_source.norm('input_norm', first)
    table |= encoder_source.norm(
      'post_norm', f'{layer}.attention.output.LayerNorm'
    )
    for path, name in _LINEARS.items():
      table |= encoder_source.dense(path, f'{layer}.{name}')
    return table

  def block(self, i: int) -> dict:
    """Parameters of block i, its shortcuts at ones and zeros."""
    params = super().block(i)
    size = self.config['hidden_size']
    for name in _SHORTCUTS:
      params[name] = {
        'scale': np.ones(size, np.float32),
        'bias': np.zeros(size, np.float32),
      }
    return params

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Every tensor -> its shape."""
    c = self.config
    C, F = c['hidden_size'], c['intermediate_size']
    shapes: dict[str, tuple[int, ...]] = {
      _OUTSIDE['embed/embedding']: (c['vocab_size'], C),
      _OUTSIDE['positions/embedding']: (c['max_position_embeddings'], C),
      _OUTSIDE['types/embedding']: (c['type_vocab_size'], C),
    }
    tables = [self.block_table(i) for i in range(c['num_hidden_layers'])]
    for table in (self.outside_table(), *tables):
      for path, name in table.items():
        N = F if 'up_proj' in path else C
        K = F if 'down_proj' in path else C
        shapes.setdefault(name, (N, K) if path.endswith('/kernel') else (N,))
    return shapes

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json, without truncation and padding."""
    return tokenizer_lib.from_file(
      self.path / 'tokenizer.json', self.config['vocab_size']
    )


def _last_norm(i: int) -> str:
  return f'encoder.layer.{i}.output.LayerNorm'

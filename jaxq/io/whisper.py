"""Where a Whisper model's tensors stand in each file format.

One table for both halves: a path in our parameter tree, the tensor's name in
Hugging Face and in CTranslate2 files, and its shape there in letters

  C width, F intermediate size, V vocabulary, M mels, S and T the positions of
  encoder and decoder.

Both formats store a linear as (out, in) and a convolution as (out, in, taps);
our kernels are (in, out) and (taps, in, out). CTranslate2 stores the
projections of one input fused, `part` says which rows are ours.
"""

import dataclasses
from typing import Any

import numpy as np

Config = dict[str, Any]
SIZES = (
  'vocab_size',
  'd_model',
  'num_mel_bins',
  'encoder_layers',
  'encoder_attention_heads',
  'encoder_ffn_dim',
  'decoder_layers',
  'decoder_attention_heads',
  'decoder_ffn_dim',
  'max_source_positions',
  'max_target_positions',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """One tensor: tree path, file names ('{i}' is the layer), file shape.

  part: (index, number) of equal parts of the rows of the CTranslate2 tensor.
  """

  path: str
  hf: str
  ctranslate2: str
  shape: tuple[str | int, ...]
  part: tuple[int, int] = (0, 1)


def _norm(path: str, hf: str, ctranslate2: str) -> tuple[Entry, ...]:
  return tuple(
    Entry(
      path=f'{path}/{ours}',
      hf=f'{hf}.{theirs}',
      ctranslate2=f'{ctranslate2}/{greek}',
      shape=('C',),
    )
    for ours, theirs, greek in (
      ('scale', 'weight', 'gamma'),
      ('bias', 'bias', 'beta'),
    )
  )


def _linear(
  path: str,
  hf: str,
  ctranslate2: str,
  shape: tuple[str, str] = ('C', 'C'),
  part: tuple[int, int] = (0, 1),
  bias: bool = True,
) -> tuple[Entry, ...]:
  entries = [
    Entry(
      path=f'{path}/kernel',
      hf=f'{hf}.weight',
      ctranslate2=f'{ctranslate2}/weight',
      shape=shape,
      part=part,
    )
  ]
  if bias:
    entries.append(
      Entry(
        path=f'{path}/bias',
        hf=f'{hf}.bias',
        ctranslate2=f'{ctranslate2}/bias',
        shape=shape[:1],
        part=part,
      )
    )
  return tuple(entries)


def _layer(half: str) -> tuple[Entry, ...]:
  """The block of 'encoder' or 'decoder'."""
  hf, other = f'model.{half}.layers.{{i}}', f'{half}/layer_{{i}}'
  self_attention = f'{other}/self_attention'
  entries = (
    *_norm(
      'input_norm', f'{hf}.self_attn_layer_norm', f'{self_attention}/layer_norm'
    ),
    *_attention(
      'attention',
      f'{hf}.self_attn',
      (f'{self_attention}/linear_0',) * 3 + (f'{self_attention}/linear_1',),
      ((0, 3), (1, 3), (2, 3), (0, 1)),
    ),
    *_norm('post_norm', f'{hf}.final_layer_norm', f'{other}/ffn/layer_norm'),
    *_linear('mlp/up_proj', f'{hf}.fc1', f'{other}/ffn/linear_0', ('F', 'C')),
    *_linear('mlp/down_proj', f'{hf}.fc2', f'{other}/ffn/linear_1', ('C', 'F')),
  )
  if half == 'encoder':
    return entries
  cross = f'{other}/attention'
  return entries + (
    *_norm(
      'cross_norm', f'{hf}.encoder_attn_layer_norm', f'{cross}/layer_norm'
    ),
    *_attention(
      'cross',
      f'{hf}.encoder_attn',
      tuple(f'{cross}/linear_{n}' for n in (0, 1, 1, 2)),
      ((0, 1), (0, 2), (1, 2), (0, 1)),
    ),
  )


def _attention(path, hf, names, parts) -> tuple[Entry, ...]:
  """q, k, v and o of one attention; k has no bias."""
  found: list[Entry] = []
  for ours, name, part in zip('qkvo', names, parts, strict=True):
    theirs = 'out' if ours == 'o' else ours
    found += _linear(
      f'{path}/{ours}_proj',
      f'{hf}.{theirs}_proj',
      name,
      part=part,
      bias=ours != 'k',
    )
  return tuple(found)


def _table(path: str, hf: str, ctranslate2: str, *shape: str | int) -> Entry:
  return Entry(path=path, hf=hf, ctranslate2=ctranslate2, shape=shape)


ENCODER, DECODER = _layer('encoder'), _layer('decoder')
OUTSIDE = (
  _table(
    'conv1/kernel',
    'model.encoder.conv1.weight',
    'encoder/conv1/weight',
    *('C', 'M', 3),
  ),
  _table('conv1/bias', 'model.encoder.conv1.bias', 'encoder/conv1/bias', 'C'),
  _table(
    'conv2/kernel',
    'model.encoder.conv2.weight',
    'encoder/conv2/weight',
    *('C', 'C', 3),
  ),
  _table('conv2/bias', 'model.encoder.conv2.bias', 'encoder/conv2/bias', 'C'),
  _table(
    'encoder_positions/embedding',
    'model.encoder.embed_positions.weight',
    'encoder/position_encodings/encodings',
    *('S', 'C'),
  ),
  *_norm('encoder_norm', 'model.encoder.layer_norm', 'encoder/layer_norm'),
  _table(
    'embed/embedding',
    'model.decoder.embed_tokens.weight',
    'decoder/embeddings/weight',
    *('V', 'C'),
  ),
  _table(
    'positions/embedding',
    'model.decoder.embed_positions.weight',
    'decoder/position_encodings/encodings',
    *('T', 'C'),
  ),
  *_norm('final_norm', 'model.decoder.layer_norm', 'decoder/layer_norm'),
)


def block(config: Config, i: int, where: str) -> tuple[str, int]:
  """Block i as (half, layer of it).

  Raises:
    ValueError: there is no block i.
  """
  first, number = config['encoder_layers'], config['decoder_layers']
  if not 0 <= i < first + number:
    raise ValueError(
      f'{where}: block {i} was asked for; allowed are 0..{first + number - 1}.'
    )
  return ('encoder', i) if i < first else ('decoder', i - first)


def entries(half: str) -> tuple[Entry, ...]:
  """The tensors of a block of 'encoder' or 'decoder'."""
  return ENCODER if half == 'encoder' else DECODER


def every_tensor(config: Config, style: str) -> dict[str, tuple[int, ...]]:
  """Name -> shape of all tensors a file of 'hf' or 'ctranslate2' must hold."""
  found: dict[str, tuple[int, ...]] = {}
  for half, layers in (
    ('encoder', config['encoder_layers']),
    ('decoder', config['decoder_layers']),
  ):
    rows: list[tuple[Entry, int | None]] = []
    if half == 'encoder':
      rows += [(e, None) for e in OUTSIDE]
    rows += [(e, i) for i in range(layers) for e in entries(half)]
    for entry, i in rows:
      shape = shape_of(entry, config, half)
      if style == 'ctranslate2':
        shape = (shape[0] * entry.part[1], *shape[1:])
      found[getattr(entry, style).format(i=i)] = shape
  return found


def shape_of(entry: Entry, config: Config, half: str) -> tuple[int, ...]:
  """The shape of a tensor in a Hugging Face file."""
  sizes = {
    'C': config['d_model'],
    'F': config[f'{half}_ffn_dim'],
    'V': config['vocab_size'],
    'M': config['num_mel_bins'],
    'S': config['max_source_positions'],
    'T': config['max_target_positions'],
  }
  return tuple(n if isinstance(n, int) else sizes[n] for n in entry.shape)


def check_tensors(
  found: dict[str, tuple[int, ...]], config: Config, style: str, where: str
) -> None:
  """Raises ValueError for tensors missing, not expected or of another shape."""
  expected = every_tensor(config, style)
  missing = [name for name in expected if name not in found]
  if missing:
    raise ValueError(
      f'{where}: {len(missing)} tensors are missing, first {missing[:3]}; a '
      f'Whisper model of {config["encoder_layers"]} + '
      f'{config["decoder_layers"]} layers needs {len(expected)}. Fetch the '
      'file again.'
    )
  extra = sorted(set(found) - set(expected))
  if extra:
    raise ValueError(
      f'{where}: {len(extra)} tensors are not expected in a Whisper model, '
      f'first {extra[:3]}; allowed are those of {sorted(expected)[:3]} and so '
      'on. This is another architecture.'
    )
  for name, shape in expected.items():
    if tuple(found[name]) != shape:
      raise ValueError(
        f'{where}: tensor {name} has shape {tuple(found[name])}; the '
        f'configuration asks for {shape}. File and configuration do not '
        'belong together.'
      )


def check_config(config: Config, where: str) -> None:
  """Raises ValueError unless all sizes are positive and the heads divide."""
  for key in SIZES:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(
        f'{where}: {key}={value!r}; it must be a positive integer. Check that '
        'the file is a complete Whisper model.'
      )
  for half in ('encoder', 'decoder'):
    heads = config[f'{half}_attention_heads']
    if config['d_model'] % heads:
      raise ValueError(
        f'{where}: d_model={config["d_model"]}, {half}_attention_heads='
        f'{heads}; heads must divide d_model. Check the configuration.'
      )


def place(params: dict, entry: Entry, array: np.ndarray, where: str) -> None:
  """Writes a tensor of the file's layout into the tree, float32.

  Raises:
    ValueError: NaN or Inf in it.
  """
  array = np.asarray(array, np.float32)
  bad = array.size - np.count_nonzero(np.isfinite(array))
  if bad:
    raise ValueError(
      f'{where}: {bad} of {array.size} values are NaN or infinite; weights '
      'must be finite. Fetch or export the file again.'
    )
  *folders, leaf = entry.path.split('/')
  if leaf == 'kernel':
    array = array.T  # (out, in[, taps]) -> ([taps,] in, out)
  for folder in folders:
    params = params.setdefault(folder, {})
  params[leaf] = np.ascontiguousarray(array)

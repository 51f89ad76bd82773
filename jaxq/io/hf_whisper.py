"""Whisper in Hugging Face directories.

config.json, generation_config.json (which holds the suppressed tokens in newer
files), model.safetensors or shards, tokenizer.json. Each read opens the file,
takes its tensors and closes it. A key that would change the maths is refused,
and so is one that we do not know.
"""

import pathlib
from typing import Any

import numpy as np
import tokenizers

from jaxq.io import files, hf, hf_config, whisper
from jaxq.io import tokenizer as tokenizer_lib

MODEL_TYPE = 'whisper'
_HEAD = 'proj_out.weight'  # The embedding again; some files repeat it.
_FLOATING = ('F64', 'F32', 'F16', 'BF16')
_TOKENS = (
  'decoder_start_token_id',
  'eos_token_id',
  'suppress_tokens',
  'begin_suppress_tokens',
)
# Keys that change the maths -> the values that models/whisper.py computes.
_FIXED: dict[str, tuple[Any, ...]] = {
  'activation_function': ('gelu',),
  'scale_embedding': (False,),
  'tie_word_embeddings': (True,),
  'is_encoder_decoder': (True,),
  'quantization_config': (),
}
# Of training, of word timestamps and of other tasks on the encoder.
_HARMLESS = hf_config.HARMLESS | frozenset(
  (
    *('model_type', 'num_hidden_layers', 'bos_token_id', 'max_length'),
    *('encoder_layerdrop', 'decoder_layerdrop', 'forced_decoder_ids'),
    *('apply_spec_augment', 'median_filter_width', 'classifier_proj_size'),
    *('use_weighted_layer_sum', 'alignment_heads', 'is_decoder'),
    *('add_cross_attention', 'cross_attention_hidden_size', 'begin_index'),
    *(
      f'mask_{of}_{what}'
      for of in ('time', 'feature')
      for what in ('prob', 'length', 'min_masks')
    ),
  )
)


class HfWhisperSource:
  """A weight source (jaxq.io.sources.WeightSource) over a directory.

  Raises:
    FileNotFoundError: config.json or weights are missing.
    ValueError: files that are damaged or contradict the configuration.
    NotImplementedError: an option that our model does not compute.
  """

  family = 'whisper'

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.config = _config(self.path)
    self._file_of: dict[str, pathlib.Path] = {}
    shapes = {}
    for shard in sorted(set(hf.tensor_files(self.path).values())):
      path = self.path / shard
      with hf.open_file(path) as file:
        for name in file.keys():  # noqa: SIM118  Not a dict.
          entry = file.get_slice(name)
          if entry.get_dtype() not in _FLOATING:
            raise NotImplementedError(
              f'{path}: tensor {name} has dtype {entry.get_dtype()}; allowed '
              f'are {sorted(_FLOATING)}. Use the unquantized model.'
            )
          self._file_of[name] = path
          shapes[name] = tuple(entry.get_shape())
    shapes.pop(_HEAD, None)
    whisper.check_tensors(shapes, self.config, 'hf', str(self.path))

  def outside(self) -> dict:
    """Parameters outside the blocks, float32; read on each call."""
    return self._read(whisper.OUTSIDE, None)

  def block(self, i: int) -> dict:
    """Parameters of block i, the encoder's first; read on each call."""
    half, layer = whisper.block(self.config, i, str(self.path))
    return self._read(whisper.entries(half), layer)

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json."""
    return tokenizer_lib.from_file(
      self.path / 'tokenizer.json', self.config['vocab_size']
    )

  def fingerprint(self) -> str:
    """Identity of the directory's content, independent of where it lies."""
    paths = set(self._file_of.values())
    paths |= {self.path / n for n in ('config.json', 'tokenizer.json')}
    return files.fingerprint(
      [(path.name, path, 0) for path in paths if path.is_file()], self.config
    )

  def _read(self, table: tuple[whisper.Entry, ...], i: int | None) -> dict:
    params: dict = {}
    by_file: dict[pathlib.Path, list[whisper.Entry]] = {}
    for entry in table:
      path = self._file_of[entry.hf.format(i=i)]
      by_file.setdefault(path, []).append(entry)
    for path, entries in by_file.items():
      with hf.open_file(path) as file:
        for entry in entries:
          name = entry.hf.format(i=i)
          array = file.get_tensor(name).astype(np.float32)
          whisper.place(params, entry, array, f'{path}: tensor {name}')
    return params


def _config(folder: pathlib.Path) -> dict[str, Any]:
  """Reads and checks config.json; returns the keys we use."""
  path = folder / 'config.json'
  raw = hf.read_json(path)
  known = {*whisper.SIZES, *_TOKENS}
  hf_config.refuse_keys(raw, known, _FIXED, _HARMLESS, MODEL_TYPE, str(path))
  config = {key: raw.get(key) for key in whisper.SIZES}
  whisper.check_config(config, str(path))
  generation = folder / 'generation_config.json'
  given = hf.read_json(generation) if generation.is_file() else {}
  tokens = {
    key: raw.get(key) if given.get(key) is None else given[key]
    for key in _TOKENS
  }
  return {'model_type': MODEL_TYPE, **config, **tokens}

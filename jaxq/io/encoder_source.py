"""Encoders in Hugging Face directories: config.json and one safetensors file.

A subclass is an architecture (jaxq.io.bert, jaxq.io.dinov2): which keys of the
configuration it computes with, and two tables that say where each leaf of our
parameter tree stands in the file. This reads and checks; nothing of it knows an
architecture. A key of the configuration is computed with, has the one value
that is computed, or is harmless: none is ignored in silence.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.io import files, hf, hf_config

WEIGHTS = 'model.safetensors'
_DTYPES = ('BF16', 'F16', 'F32', 'F64')
# Beside those of every model: regularizers of training, heads, tokens.
_HARMLESS = frozenset(
  (
    *('attention_probs_dropout_prob', 'hidden_dropout_prob', 'drop_path_rate'),
    *('classifier_dropout', 'tie_word_embeddings', 'bos_token_id'),
    *('eos_token_id', 'is_encoder_decoder', 'use_bfloat16', 'cls_token_id'),
    *('out_features', 'out_indices', 'stage_names', 'reshape_hidden_states'),
    *('apply_layernorm', 'use_mask_token', 'num_labels', 'layerscale_value'),
  )
)

Table = dict[str, str]  # Path in our tree -> name in the file.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
  """The keys of a config.json.

  sizes: positive integers that must be there. others: computed with, where
  they are. fixed: key -> the values that are computed; null is one.
  """

  sizes: tuple[str, ...]
  others: tuple[str, ...] = ()
  fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


class EncoderSource:
  """A jaxq.io.sources.WeightSource over a directory.

  Raises:
    FileNotFoundError: config.json or the weights are missing.
    ValueError: files that are damaged or contradict the configuration.
    NotImplementedError: an option that our models do not compute.
  """

  family: str
  model_type: str
  keys: Keys
  prefixes: tuple[str, ...] = ('',)  # Of all names; '' comes first.
  ignored: tuple[str, ...] = ()  # Beginnings of names that are left out.

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.config = self._read_config()
    weights = self.path / WEIGHTS
    if not weights.is_file():
      raise FileNotFoundError(
        f'{weights}: no such file; weights must be in one safetensors file. '
        'Save the model with save_pretrained.'
      )
    with hf.open_file(weights) as file:
      self._prefix = self._check_names(set(file.keys()))
      for name, shape in self.shapes().items():
        self._check(file.get_slice(self._prefix + name), name, shape)

  def outside_table(self) -> Table:
    """The leaves outside the blocks."""
    raise NotImplementedError

  def block_table(self, i: int) -> Table:
    """The leaves of block i that the file has."""
    raise NotImplementedError

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Every tensor that the file must hold -> its shape there."""
    raise NotImplementedError

  def outside(self) -> dict:
    """Parameters outside the blocks, float32; read on each call."""
    return self._read(self.outside_table())

  def block(self, i: int) -> dict:
    """Parameters of block i, float32; read on each call."""
    check_block(i, self.config, str(self.path))
    return self._read(self.block_table(i))

  def tokenizer(self) -> Any:
    """The tokenizer; None where the model reads no text."""
    return None

  def fingerprint(self) -> str:
    """Identity of the directory's content, independent of where it lies."""
    names = ('config.json', 'tokenizer.json', WEIGHTS)
    entries = [
      (name, self.path / name, 0)
      for name in names
      if (self.path / name).is_file()
    ]
    return files.fingerprint(entries, self.config)

  def _read(self, table: Table) -> dict:
    params: dict = {}
    with hf.open_file(self.path / WEIGHTS) as file:
      for path, name in table.items():
        array = file.get_tensor(self._prefix + name).astype(np.float32)
        put(params, path, array)
    return params

  def _check_names(self, names: set[str]) -> str:
    """Raises where tensors are missing or unknown; returns their prefix."""
    expected = set(self.shapes())
    anchor = min(expected)
    prefix = next((p for p in self.prefixes if p + anchor in names), '')
    found = {name.removeprefix(prefix) for name in names}
    missing = sorted(expected - found)
    if missing:
      raise ValueError(
        f'{self.path}: {len(missing)} tensors are missing, first {missing[:3]};'
        f' a {self.model_type} of {self.config["num_hidden_layers"]} layers '
        f'needs {len(expected)}. Fetch the file again.'
      )
    extra = sorted(
      n for n in found - expected if not n.startswith(self.ignored)
    )
    if extra:
      raise ValueError(
        f'{self.path}: {len(extra)} tensors are not expected in a '
        f'{self.model_type}, first {extra[:3]}; this is another architecture, '
        'or config.json is of another model.'
      )
    return prefix

  def _check(self, entry: Any, name: str, shape: tuple[int, ...]) -> None:
    found = tuple(entry.get_shape())
    if found != shape:
      raise ValueError(
        f'{self.path}: tensor {name} has shape {found}; the configuration asks '
        f'for {shape}. File and configuration do not belong together.'
      )
    if entry.get_dtype() not in _DTYPES:
      raise NotImplementedError(
        f'{self.path}: tensor {name} has dtype {entry.get_dtype()}; allowed '
        f'are {list(_DTYPES)}. Use the unquantized model.'
      )

  def _read_config(self) -> dict:
    path, keys = self.path / 'config.json', self.keys
    raw = hf.read_json(path)
    hf_config.refuse_keys(
      raw,
      {*keys.sizes, *keys.others, 'model_type'},
      keys.fixed,
      hf_config.HARMLESS | _HARMLESS,
      self.model_type,
      str(path),
    )
    for key in keys.sizes:
      value = raw.get(key)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
          f'{path}: {key}={value!r}; it must be a positive integer. Check that '
          f'the file is of a complete {self.model_type}.'
        )
    config = {key: raw[key] for key in keys.sizes}
    config |= {key: raw[key] for key in keys.others if raw.get(key) is not None}
    return {'model_type': self.model_type, **config}


def check_block(i: int, config: Mapping[str, Any], where: str) -> None:
  """Raises ValueError unless i is a block of the model."""
  count = config['num_hidden_layers']
  if not 0 <= i < count:
    raise ValueError(
      f'{where}: block {i} was asked for; allowed are 0..{count - 1}.'
    )


def put(params: dict, path: str, array: np.ndarray) -> None:
  """Writes a tensor of the file to our tree; kernels become (K, N).

  A linear is (out, in) in the file, a convolution over patches (out, 3, P, P).
  """
  if path.endswith('/kernel'):
    axes = (2, 3, 1, 0) if array.ndim == 4 else (1, 0)
    array = array.transpose(axes).reshape(-1, array.shape[0])
    array = np.ascontiguousarray(array)
  *folders, leaf = path.split('/')
  for folder in folders:
    params = params.setdefault(folder, {})
  params[leaf] = array


def norm(path: str, name: str) -> Table:
  """The two leaves of a LayerNorm."""
  return {f'{path}/scale': f'{name}.weight', f'{path}/bias': f'{name}.bias'}


def dense(path: str, name: str) -> Table:
  """The two leaves of a linear."""
  return {f'{path}/kernel': f'{name}.weight', f'{path}/bias': f'{name}.bias'}

"""Trained reducers as folders: what experiments.train_reducer leaves behind.

  config.json     what was trained, and on which model
  params/         {'reducer': its params, 'model': what replaces the model's}

and the other files of experiments.training_files. A reducer belongs to the
model it was trained on: `load` refuses another one.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import training, training_files
from jaxq import config_text
from jaxq.io import manifest, trees
from jaxq.tokens import embedlens, interface, registry

# Params that are no dicts: how they are made of the stored arrays.
_TYPES: dict[type, Callable[..., Any]] = {
  embedlens.EmbedLensConfig: embedlens.Probe
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainedReducer:
  """A reducer with its params.

  model: parts of the model's parameters that were trained with it, by name.
  features: whether it reads the encoder's features, not the projected tokens.
  """

  config: interface.Config
  params: Any
  model: Mapping[str, Any]
  features: bool


def fingerprint(params: training.Params) -> str:
  """16 hexadecimal digits of the bytes of a model's parameters."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def storable(params: Any) -> Any:
  """Params of a reducer as nested dicts of arrays; None: an empty one."""
  if params is None:
    return {}
  if dataclasses.is_dataclass(params):
    names = [field.name for field in dataclasses.fields(params)]
    return {name: getattr(params, name) for name in names}
  return params


def is_folder(text: str) -> bool:
  """Whether `--token_reducer` names a folder, with fields behind a colon."""
  name = text.partition(':')[0]
  return name not in registry.REDUCERS and pathlib.Path(name).is_dir()


def load(text: str, trained: training.Trained) -> TrainedReducer:
  """The reducer of 'FOLDER' or 'FOLDER:field=value', with fields replaced.

  Args:
    text: a folder that experiments.train_reducer finished.
    trained: the model it is for.

  Raises:
    FileNotFoundError: it holds no finished training of a reducer.
    ValueError: it is of another model, or damaged; unknown field or value.
  """
  name = text.partition(':')[0]
  folder = pathlib.Path(name)
  found: Mapping[str, Any] = {}
  if training_files.is_complete(folder):
    found = manifest.read_json(folder / training_files.CONFIG)
  if 'reducer' not in found:
    raise FileNotFoundError(
      f'{folder}: holds no trained reducer; it is a folder that '
      'experiments.train_reducer finished. Train it, or give another folder.'
    )
  mine = fingerprint(trained.params)
  if found['model']['params'] != mine:
    raise ValueError(
      f'{folder}: is a reducer for the model {found["model"]["params"]}; this '
      f'model is {mine}, and a reducer serves one. Train it on this model.'
    )
  config: Any = registry.parse(found['reducer']['text'])
  stored = trees.load(folder / training_files.PARAMS)
  params = jax.tree.map(jnp.asarray, stored)
  reducer = params['reducer']
  if type(config) in _TYPES:
    reducer = _TYPES[type(config)](**reducer)
  return TrainedReducer(
    config=config_text.parse(
      text,
      {name: config},
      flag='token_reducer',
      noun='trained reducer',
      example=f'{os.path.basename(name)}:budget=0.1',
    ),
    params=reducer,
    model=params['model'],
    features=found['reducer']['features'],
  )

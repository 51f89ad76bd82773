"""Writes a model in the format of another library.

  python -m experiments.export --format=gguf --gguf_type=Q4_0 \
      --source=DIR --output=model.gguf
  python -m experiments.export --format=compressed-tensors \
      --source=DIR --output=hf/

A quantized source is written with its integers unchanged, or refused with the
reason; a float source is rounded to nearest by the rule of the target.
"""

import pathlib
from collections.abc import Callable, Sequence

from absl import flags

import models
from experiments import cli
from jaxq.io import ct_export, gguf_export
from models import loading

_FORMAT = flags.DEFINE_string('format', None, 'One of FORMATS.', required=True)
_SOURCE = flags.DEFINE_string(
  'source',
  None,
  'What to write: packaged name, .gguf, Hugging Face or jaxq directory.',
  required=True,
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The file or directory to make.', required=True
)
_GGUF_TYPE = flags.DEFINE_enum(
  'gguf_type', 'Q4_0', sorted(gguf_export.TYPES), 'gguf: of the linears.'
)
_GGUF_REST = flags.DEFINE_enum(
  'gguf_rest',
  'F16',
  sorted(gguf_export.REST_TYPES),
  'gguf: of embedding, head and the linears that a quantized source keeps '
  'float.',
)


def main(argv: Sequence[str]) -> None:
  """Opens, writes and says what was written."""
  del argv
  write = FORMATS.get(_FORMAT.value)
  if write is None:
    raise ValueError(
      f'--format={_FORMAT.value}; allowed are {sorted(FORMATS)}. Use one of '
      'these.'
    )
  output = pathlib.Path(_OUTPUT.value).expanduser()
  if output.exists():
    raise ValueError(
      f'--output={output} exists; a new path is needed, so that nothing is '
      'overwritten. Choose another, or delete it.'
    )
  output.parent.mkdir(parents=True, exist_ok=True)
  print(write(models.open_model(_SOURCE.value), output))


def _gguf(model: loading.OpenModel, output: pathlib.Path) -> str:
  config = gguf_export.GgufExportConfig(
    type=_GGUF_TYPE.value, rest=_GGUF_REST.value
  )
  return str(gguf_export.export(model.source, output, config))


def _compressed_tensors(model: loading.OpenModel, output: pathlib.Path) -> str:
  return str(ct_export.export(model.source, output))


# --format: (an opened model, a path that is free) -> a line for the user.
FORMATS: dict[str, Callable[[loading.OpenModel, pathlib.Path], str]] = {
  'compressed-tensors': _compressed_tensors,
  'gguf': _gguf,
}

if __name__ == '__main__':
  cli.run(main)

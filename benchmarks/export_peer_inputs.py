"""Writes what a peer needs to be measured beside us: weights and token ids.

  python -m benchmarks.export_peer_inputs --output_dir=/tmp/peer

Below --output_dir, `model/` is a Hugging Face directory (config.json, one
float32 model.safetensors, tokenizer.json) of exactly the values our own loader
reads, and `tokens.npz` has `calibration` (samples, sample_tokens) and
`evaluation` (windows, window_tokens), int32, from our own data pipeline.
"""

import json
import pathlib

import numpy as np
import safetensors.numpy
from absl import flags

from experiments import cli
from jaxq.data import pipeline
from jaxq.io import architectures, sources

_MODEL = flags.DEFINE_string(
  'model', 'smollm2-135m', 'Packaged name, GGUF file or Hugging Face directory.'
)
_OUTPUT_DIR = flags.DEFINE_string('output_dir', None, 'Folder to write to.')
_CALIBRATION = flags.DEFINE_string(
  'calibration', 'wiki-sample:calibration', 'Text to calibrate on.'
)
_SAMPLES = flags.DEFINE_integer(
  'samples', 64, 'Calibration sequences.', lower_bound=1
)
_SAMPLE_TOKENS = flags.DEFINE_integer(
  'sample_tokens', 512, 'Tokens in each.', lower_bound=2
)
_EVALUATION = flags.DEFINE_string(
  'evaluation', 'wiki-sample:evaluation', 'Text to evaluate on.'
)
_WINDOWS = flags.DEFINE_integer(
  'windows', 4, 'Evaluation windows; 0 takes all.', lower_bound=0
)
_WINDOW_TOKENS = flags.DEFINE_integer(
  'window_tokens', 2048, 'Tokens in each.', lower_bound=2
)
flags.mark_flag_as_required('output_dir')


def hf_config(config: dict) -> dict:
  """config.json for LlamaForCausalLM; rope_theta in the old and new place."""
  rope = {'rope_theta': config['rope_theta'], 'rope_type': 'default'}
  return {
    **config,
    'architectures': ['LlamaForCausalLM'],
    'torch_dtype': 'float32',
    'rope_parameters': rope,
  }


def hf_tensors(source: sources.WeightSource) -> dict[str, np.ndarray]:
  """Every tensor under its Hugging Face name, float32, linears (out, in)."""
  config = source.config
  tensors = {}

  def take(params, entries):
    for entry in entries:
      array = params
      for key in entry.path:
        array = array[key]
      if entry.path[-1] == 'kernel':
        array = array.T  # (K, N) -> (out, in)
      tensors[entry.hf.name] = np.ascontiguousarray(array, np.float32)

  take(source.outside(), architectures.outside(config))
  for i in range(config['num_hidden_layers']):
    take(source.block(i), architectures.block(config, i))
  return tensors


def write_model(source: sources.WeightSource, folder: pathlib.Path) -> None:
  """Writes the Hugging Face directory of `source`."""
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(
    hf_tensors(source), folder / 'model.safetensors', metadata={'format': 'pt'}
  )
  config = json.dumps(hf_config(source.config), indent=2)
  (folder / 'config.json').write_text(config + '\n', encoding='utf-8')
  tokenizer_config = json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'})
  (folder / 'tokenizer_config.json').write_text(tokenizer_config + '\n')
  source.tokenizer().save(str(folder / 'tokenizer.json'))


def main(argv) -> None:
  """Writes model/ and tokens.npz below --output_dir and says how big."""
  del argv
  source = sources.open_source(_MODEL.value)
  tokenizer = source.tokenizer()
  # The text first: where it does not suffice, no half gigabyte is written.
  calibration = pipeline.calibration_tokens(
    pipeline.DataConfig(
      source=_CALIBRATION.value,
      num_sequences=_SAMPLES.value,
      sequence_length=_SAMPLE_TOKENS.value,
    ),
    tokenizer,
  )
  evaluation = pipeline.evaluation_windows(
    pipeline.DataConfig(
      source=_EVALUATION.value,
      num_sequences=_WINDOWS.value or None,
      sequence_length=_WINDOW_TOKENS.value,
    ),
    tokenizer,
  )
  folder = pathlib.Path(_OUTPUT_DIR.value).expanduser()
  write_model(source, folder / 'model')
  np.savez(
    folder / 'tokens.npz', calibration=calibration, evaluation=evaluation.tokens
  )
  print(f'{folder / "model"}: {_MODEL.value}, float32')
  print(
    f'{folder / "tokens.npz"}: calibration {calibration.shape}, '
    f'evaluation {evaluation.tokens.shape} ({evaluation.description})'
  )


if __name__ == '__main__':
  cli.run(main)

"""The peer of the side-by-side benchmark: llm-compressor on the same tokens.

Quantizes a Hugging Face directory with llm-compressor's `oneshot` on the CPU,
on exactly the calibration token ids it is given, and measures four things:
the wall seconds of `oneshot` alone (the model is loaded before, perplexity is
taken after), those of the process from its first line to the end of `oneshot`,
the peak resident memory up to there, and the token perplexity over
non-overlapping windows in float32.

It imports nothing of jaxq and runs with the peer's own interpreter (README.md
beside this file says how to make it), one scheme per process, so that neither
memory nor caches leak from one measurement to the next:

  .venv-peer/bin/python benchmarks/peer_llmcompressor.py \
    --model_dir=DIR --tokens=TOKENS.npz --scheme=gptq_w4g64 --output=OUT.json

The peer keeps its own defaults (dampening 0.01, blocks of 128 columns, min-max
ranges, static activation order for GPTQ); the options below change them one by
one. Its symmetric step is absmax / ((2^b - 1) / 2), not absmax / (2^(b-1) - 1).
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
import time
from typing import Any
from unittest import mock

import numpy as np

_STARTED = time.perf_counter()

METHODS = ('rtn', 'gptq', 'awq')
# bits and group size of the weights (-1: per channel), bits of the activations.
SETTINGS = {
  'w4g64': (4, 64, None),
  'w4pc': (4, -1, None),
  'w3g64': (3, 64, None),
  'w8a8': (8, -1, 8),
}
SCHEMES = ('float',) + tuple(
  f'{method}_{setting}' for method in METHODS for setting in SETTINGS
)
PACKAGES = ('torch', 'transformers', 'llmcompressor', 'compressed-tensors')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line; --help reads well without importing the peer."""
  parser = argparse.ArgumentParser(
    description='llm-compressor oneshot: seconds, memory, perplexity.'
  )
  add = parser.add_argument
  add(
    '--model_dir',
    required=True,
    help='Hugging Face directory: config.json, float32 safetensors, tokenizer',
  )
  add(
    '--tokens',
    required=True,
    help='npz with int32 arrays calibration (n, T) and evaluation (w, T)',
  )
  add('--scheme', required=True, choices=SCHEMES, help='what to measure')
  add('--output', help='JSON file to write the result line to')
  add(
    '--actorder',
    default='static',
    choices=('static', 'none'),
    help='GPTQ activation order; static is the default of the peer',
  )
  add(
    '--observer',
    default='minmax',
    choices=('minmax', 'mse'),
    help='how the weight ranges are taken',
  )
  add('--dampening', type=float, default=0.01, help='GPTQ dampening fraction')
  add('--asymmetric', action='store_true', help='weights with zero points')
  add(
    '--samples', type=int, help='calibrate on the first SAMPLES rows, not all'
  )
  add('--windows', type=int, help='evaluate the first WINDOWS rows, not all')
  add('--batch_size', type=int, default=1, help='calibration batch size')
  add('--threads', type=int, help='torch threads; default: its own choice')
  return parser.parse_args(argv)


def load_tokens(
  path: str, samples: int | None, windows: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Reads calibration (n, T) and evaluation (w, T) token ids.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: an array is absent, not (rows, tokens) integers, or too short.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f'--tokens={path}: no such file; make it with '
      'benchmarks/export_peer_inputs.py.'
    )
  arrays = []
  with np.load(path) as stored:
    for name, limit in (('calibration', samples), ('evaluation', windows)):
      if name not in stored:
        raise ValueError(
          f'--tokens={path}: arrays {sorted(stored)}; calibration and '
          'evaluation are needed. Make it with '
          'benchmarks/export_peer_inputs.py.'
        )
      array = stored[name]
      if array.ndim != 2 or array.dtype.kind != 'i' or array.shape[1] < 2:
        raise ValueError(
          f'--tokens={path}: {name} is {array.dtype}{list(array.shape)}; '
          'integers (rows, tokens) with at least 2 tokens are needed.'
        )
      if limit is not None and not 0 < limit <= array.shape[0]:
        raise ValueError(
          f'--tokens={path}: {limit} rows of {name} were asked for; it has '
          f'{array.shape[0]}. Ask for 1..{array.shape[0]}.'
        )
      arrays.append(array[:limit])
  return arrays[0], arrays[1]


def recipe(scheme: str, args: argparse.Namespace) -> list[Any]:
  """The modifiers of `scheme` ('float' excluded), lm_head left alone."""
  from compressed_tensors import quantization
  from llmcompressor.modifiers import gptq
  from llmcompressor.modifiers import quantization as modifiers
  from llmcompressor.modifiers.transform import awq

  method, setting = scheme.split('_')
  bits, group_size, activation_bits = SETTINGS[setting]
  weights = {
    'num_bits': bits,
    'type': 'int',
    'symmetric': not args.asymmetric,
    'strategy': 'channel' if group_size == -1 else 'group',
    'observer': f'memoryless_{args.observer}',
  }
  if group_size != -1:
    weights['group_size'] = group_size
  group = {
    'targets': ['Linear'],
    'weights': quantization.QuantizationArgs(**weights),
  }
  if activation_bits is not None:
    group['input_activations'] = quantization.QuantizationArgs(
      num_bits=activation_bits,
      type='int',
      symmetric=True,
      strategy='token',
      dynamic=True,
    )
  common = {
    'config_groups': {'group_0': quantization.QuantizationScheme(**group)},
    'ignore': ['lm_head'],
  }
  if method == 'gptq':
    actorder = None if args.actorder == 'none' else args.actorder
    return [
      gptq.GPTQModifier(
        actorder=actorder, dampening_frac=args.dampening, **common
      )
    ]
  quantize = modifiers.QuantizationModifier(**common)
  return [awq.AWQModifier(), quantize] if method == 'awq' else [quantize]


def compress(
  model: Any, calibration: np.ndarray, args: argparse.Namespace
) -> float:
  """Runs oneshot on `model` in place; returns its wall seconds.

  Round-to-nearest of weights and dynamic activations need no data: the peer
  then passes over none, whatever it is given, so it is given none.
  """
  import datasets
  import llmcompressor
  import transformers

  method = args.scheme.split('_')[0]
  modifiers = recipe(args.scheme, args)
  keywords: dict[str, Any] = {}
  if method != 'rtn':
    n, T = calibration.shape
    keywords = {
      'dataset': datasets.Dataset.from_dict(
        {
          'input_ids': calibration.tolist(),
          'attention_mask': np.ones_like(calibration).tolist(),
        }
      ),
      'num_calibration_samples': n,
      'max_seq_length': T,
      'batch_size': args.batch_size,
      'shuffle_calibration_samples': False,
    }
  # The ids are ready, so the tokenizer is only carried; reading it here keeps
  # the peer from looking for a processor of its own.
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=os.path.join(args.model_dir, 'tokenizer.json')
  )
  with contextlib.ExitStack() as stack:
    if method == 'awq':
      stack.enter_context(_without_pinning())
    start = time.perf_counter()
    llmcompressor.oneshot(
      model=model, processor=tokenizer, recipe=modifiers, **keywords
    )
    return time.perf_counter() - start


def _without_pinning() -> contextlib.AbstractContextManager:
  """Lets the peer's AWQ run where there is no accelerator.

  It pins its cached activations for copies to a device; with none, pinning
  raises (seen in 0.14.0.1). On the CPU a pinned tensor is the same tensor, so
  skipping it changes no number. The result names it under `workarounds`.
  """
  from llmcompressor.pipelines import cache

  return mock.patch.object(
    cache.IntermediatesCache, 'pin_memory', lambda *args, **kwargs: None
  )


def window_nlls(model: Any, evaluation: np.ndarray) -> list[float]:
  """Mean negative log-likelihood of tokens 1..T-1 of each window (w, T).

  No BOS is added and windows share no context; logits are float32.
  """
  import torch

  nlls = []
  with torch.inference_mode():
    for window in evaluation:
      ids = torch.from_numpy(window.astype(np.int64))[None]  # (1, T)
      logits = model(input_ids=ids, use_cache=False).logits  # (1, T, V)
      nlls.append(
        float(
          torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        )
      )
  return nlls


def peak_rss_mb() -> float:
  """Peak resident memory of this process so far, in MB (1e6 bytes).

  VmHWM where the kernel shows it: ru_maxrss survives exec, so that a child
  would start from the size of its parent.
  """
  try:
    with open('/proc/self/status', encoding='utf-8') as f:
      for line in f:
        if line.startswith('VmHWM:'):
          return int(line.split()[1]) * 1024 / 1e6
  except OSError:
    pass
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Loads, compresses and evaluates; returns the result as plain JSON data."""
  calibration, evaluation = load_tokens(args.tokens, args.samples, args.windows)
  for name in ('config.json', 'tokenizer.json'):
    if not os.path.isfile(os.path.join(args.model_dir, name)):
      raise FileNotFoundError(
        f'--model_dir={args.model_dir}: no {name}; make the directory with '
        'benchmarks/export_peer_inputs.py.'
      )
  # Before torch is imported: CPU only, nothing looked up on a network.
  os.environ['CUDA_VISIBLE_DEVICES'] = ''
  os.environ['HF_HUB_OFFLINE'] = '1'
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
  import torch
  import transformers

  if args.threads is not None:
    torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    args.model_dir, dtype=torch.float32
  ).eval()
  vocab_size = model.config.vocab_size
  largest = int(max(calibration.max(), evaluation.max()))
  if largest >= vocab_size:
    raise ValueError(
      f'--tokens={args.tokens}: token id {largest}; the model has '
      f'{vocab_size}. Use the tokens of the same tokenizer.'
    )
  loaded = peak_rss_mb()
  seconds = None
  if args.scheme != 'float':
    seconds = compress(model, calibration, args)
  process_seconds = time.perf_counter() - _STARTED
  peak = peak_rss_mb()
  nlls = window_nlls(model, evaluation)
  return {
    'scheme': args.scheme,
    'seconds': seconds,
    'process_seconds': process_seconds,
    'peak_rss_mb': round(peak, 1),
    'loaded_rss_mb': round(loaded, 1),
    'perplexity': math.exp(sum(nlls) / len(nlls)),
    'window_nlls': nlls,
    'calibration_shape': list(calibration.shape),
    'evaluation_shape': list(evaluation.shape),
    'options': {
      'actorder': args.actorder,
      'observer': args.observer,
      'dampening': args.dampening,
      'symmetric': not args.asymmetric,
      'batch_size': args.batch_size,
    },
    'workarounds': (
      ['pin_memory skipped'] if args.scheme.startswith('awq') else []
    ),
    'versions': {
      'python': platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
    'threads': torch.get_num_threads(),
  }


def main(argv: list[str] | None = None) -> int:
  """Prints the result as one JSON line; 1 and one sentence on bad input."""
  args = parse_args(argv)
  try:
    # The peer logs to stdout; there only the result line is wanted.
    with contextlib.redirect_stdout(sys.stderr):
      result = json.dumps(measure(args))
  except ModuleNotFoundError as e:
    print(
      f'{e.name} is not installed in {sys.executable}; run this file with '
      "the peer's interpreter (benchmarks/README.md says how to make it).",
      file=sys.stderr,
    )
    return 1
  except (OSError, ValueError) as e:
    print(e, file=sys.stderr)
    return 1
  if args.output:
    with open(args.output, 'w', encoding='utf-8') as f:
      f.write(result + '\n')
  print(result)
  return 0


if __name__ == '__main__':
  sys.exit(main())

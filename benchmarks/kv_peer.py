"""transformers' side of benchmarks/kv_peers.py.

It imports nothing of jaxq and runs with the peer's own interpreter, which has
torch, transformers and optimum-quanto:

  .venv-peer/bin/python benchmarks/kv_peer.py --model_dir=HF \
    --tokens=TOKENS.npy --output=OUT.json --settings='float;4,0,0,64'

A setting is 'float' (DynamicCache) or nbits,axis_key,axis_value,group_size of a
quanto QuantizedCache with a residual of --chunk tokens. Windows are read in
chunks of so many tokens, as ours are: a token sees its own chunk as it is and
all before as the cache holds it. On every flush this cache encodes everything
anew, and says nothing of its bytes: bits are nbits and a 16-bit scale and shift
a group, less than it really takes in float32.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import time

import numpy as np


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--model_dir', required=True, help='HF directory')
  parser.add_argument('--tokens', required=True, help='.npy (windows, T)')
  parser.add_argument('--output', required=True, help='JSON file')
  parser.add_argument('--settings', required=True, help='with semicolons')
  parser.add_argument('--chunk', type=int, default=128)
  parser.add_argument('--steps', type=int, default=16, help='steps to time')
  parser.add_argument('--threads', type=int, default=0, help='0: all')
  return parser.parse_args(argv)


def make_cache(setting: str, config, chunk: int):
  """A transformers cache."""
  import transformers

  if setting == 'float':
    return transformers.DynamicCache(config=config)
  nbits, axis_key, axis_value, group = (int(x) for x in setting.split(','))
  return transformers.QuantizedCache(
    backend='quanto',
    config=config,
    nbits=nbits,
    axis_key=axis_key,
    axis_value=axis_value,
    q_group_size=group,
    residual_length=chunk,
  )


def bits(setting: str) -> float:
  """Per element, scale and shift of a group in 16 bits each."""
  if setting == 'float':
    return 32.0
  nbits, _, _, group = (int(x) for x in setting.split(','))
  return nbits + 32 / group


def measure(model, tokens, setting: str, chunk: int, steps: int) -> dict:
  """Mean NLL of tokens 1..T-1 and the median milliseconds of a step."""
  import torch

  total, count = 0.0, 0
  times: list[float] = []
  for window in tokens:
    ids = torch.from_numpy(window.astype(np.int64))[None]
    cache = make_cache(setting, model.config, chunk)
    logits = [
      model(
        input_ids=ids[:, i : i + chunk], past_key_values=cache, use_cache=True
      ).logits.float()
      for i in range(0, ids.shape[1], chunk)
    ]
    scores = torch.cat(logits, 1)[0, :-1]
    loss = torch.nn.functional.cross_entropy(scores, ids[0, 1:])
    total += float(loss) * (ids.shape[1] - 1)
    count += ids.shape[1] - 1
    if not times:
      for i in range(steps):
        begin = time.monotonic()
        model(input_ids=ids[:, i : i + 1], past_key_values=cache)
        times.append(1e3 * (time.monotonic() - begin))
  return {
    'nll': total / count,
    'perplexity': math.exp(total / count),
    'bits': bits(setting),
    'ms': statistics.median(times),
  }


def main() -> None:
  """Measures every setting and writes after each."""
  args = parse_args()
  os.environ['CUDA_VISIBLE_DEVICES'] = ''
  os.environ['HF_HUB_OFFLINE'] = '1'
  import torch
  import transformers

  if args.threads:
    torch.set_num_threads(args.threads)
  load = transformers.AutoModelForCausalLM.from_pretrained
  model = load(args.model_dir, dtype=torch.float32).eval()
  tokens = np.load(args.tokens)
  found = {}
  with torch.inference_mode():
    for setting in args.settings.split(';'):
      found[setting] = measure(model, tokens, setting, args.chunk, args.steps)
      print(setting, found[setting], flush=True)
      pathlib.Path(args.output).write_text(
        json.dumps({'versions': transformers.__version__, 'rows': found})
      )


if __name__ == '__main__':
  main()

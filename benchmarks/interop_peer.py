"""llm-compressor and transformers' side of the interoperability check.

It imports nothing of jaxq and runs with the peer's own interpreter (README.md
beside this file says how to make it):

  .venv-peer/bin/python benchmarks/interop_peer.py --write \
    --model_dir=HF --tokens=TOKENS.npy --root=OUT --schemes=W4A16,W8A8
  .venv-peer/bin/python benchmarks/interop_peer.py \
    --tokens=TOKENS.npy --root=OUT --schemes=W4A16,W8A8

With --write it quantizes HF with llm-compressor to OUT/SCHEME, compressed.
Then, in both forms, it loads OUT/SCHEME with transformers and writes the mean
negative log-likelihood of TOKENS, (windows, T) int, to OUT/SCHEME.peer.json,
with two attention implementations: equal but for rounding, they show how far
rounding alone moves a model with quantized inputs. benchmarks/interop.py is the
other side. --double is the control in float64 on both.
"""

import argparse
import json
import os
import pathlib
from unittest import mock

import numpy as np

GROUP_SIZE = 64
OFF_BOUNDARY = 1 + 1e-6  # On the steps of dynamic inputs, with --double.


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--write', action='store_true', help='quantize first')
  parser.add_argument('--model_dir', help='float Hugging Face directory')
  parser.add_argument('--tokens', required=True, help='.npy (windows, T)')
  parser.add_argument('--root', required=True, help='one folder per scheme')
  parser.add_argument('--schemes', required=True, help='names, with commas')
  parser.add_argument('--double', action='store_true', help='in float64')
  return parser.parse_args(argv)


def write(args: argparse.Namespace, scheme: str, tokens: np.ndarray) -> None:
  """Quantizes to args.root/scheme with round-to-nearest.

  Groups of 128, which do not divide every width, become groups of GROUP_SIZE.
  """
  import datasets
  import llmcompressor
  import torch
  import transformers
  from compressed_tensors import quantization
  from llmcompressor.modifiers import quantization as modifiers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    args.model_dir, dtype=torch.float32
  )
  group = quantization.preset_name_to_scheme(scheme, ['Linear'])
  if group.weights.group_size == 128:
    group.weights.group_size = GROUP_SIZE
  data = datasets.Dataset.from_dict(
    {
      'input_ids': tokens.tolist(),
      'attention_mask': np.ones_like(tokens).tolist(),
    }
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=os.path.join(args.model_dir, 'tokenizer.json')
  )
  llmcompressor.oneshot(
    model=model,
    processor=tokenizer,
    recipe=modifiers.QuantizationModifier(
      config_groups={'group_0': group}, ignore=['lm_head']
    ),
    dataset=data,
    num_calibration_samples=tokens.shape[0],
    max_seq_length=tokens.shape[1],
  )
  folder = os.path.join(args.root, scheme)
  model.save_pretrained(folder, save_compressed=True)
  tokenizer.save_pretrained(folder)


def nll(
  folder: str, tokens: np.ndarray, attention: str, double: bool = False
) -> float:
  """Mean NLL of tokens 1..T-1 of each window, through transformers.

  Block formats are decoded to bfloat16, which is all that transformers decodes
  them to, and then computed with in float32 like the others; in float64 if
  `double`, where transformers' own code asks for float32 too. The format's step
  for dynamic integers puts the largest value of every token on the boundary of
  two codes (127.5 steps), where the last bit decides, so `double` takes it
  OFF_BOUNDARY; in fp8 that value is a code (448 steps).
  """
  import torch
  import transformers

  config = json.loads(pathlib.Path(folder, 'config.json').read_text())
  quantization = json.dumps(config['quantization_config'])
  how = {'dtype': torch.float32, 'attn_implementation': attention}
  if 'fp4-pack-quantized' in quantization or 'mxfp8' in quantization:
    decode = transformers.CompressedTensorsConfig(dequantize=True)
    how |= {'dtype': torch.bfloat16, 'quantization_config': decode}
  load = transformers.AutoModelForCausalLM.from_pretrained
  # Not model.float(): transformers refuses it, decoded or not.
  model = torch.nn.Module.float(load(folder, **how).eval())
  ids = torch.from_numpy(tokens.astype(np.int64))

  def forward():
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return float(
      torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
      )
    )

  with torch.inference_mode():
    if not double:
      return forward()
    from compressed_tensors.quantization.lifecycle import forward as lifecycle

    dynamic = lifecycle.compute_dynamic_scales_and_zp

    def off_boundary(*, args, **keywords):
      scale, zero = dynamic(args=args, **keywords)
      return scale * (OFF_BOUNDARY if args.type == 'int' else 1), zero

    # Norms, angles and softmax are float32 by these names, whatever the model.
    with (
      mock.patch.object(
        lifecycle, 'compute_dynamic_scales_and_zp', off_boundary
      ),
      mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
      mock.patch.object(torch.Tensor, 'float', torch.Tensor.double),
    ):
      model = torch.nn.Module.double(model)
      rotary = model.model.rotary_emb
      model.model.rotary_emb = type(rotary)(model.config)
      return forward()


def main() -> None:
  """Writes, reads, and says what it saw."""
  args = parse_args()
  os.environ['CUDA_VISIBLE_DEVICES'] = ''
  os.environ['HF_HUB_OFFLINE'] = '1'
  tokens = np.load(args.tokens)
  for scheme in args.schemes.split(','):
    if args.write:
      write(args, scheme, tokens)
    folder = os.path.join(args.root, scheme)
    found = {a: nll(folder, tokens, a, args.double) for a in ('eager', 'sdpa')}
    pathlib.Path(f'{folder}.peer.json').write_text(json.dumps(found))
    print(scheme, found, flush=True)


if __name__ == '__main__':
  main()

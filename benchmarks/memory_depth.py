"""Does the memory of a calibration grow with the depth of the model?

  python -m benchmarks.memory_depth --work=/tmp/jaxq_memory_depth

Writes random Llama checkpoints that differ in the number of blocks alone (of
SmolLM2-135M's shapes, but with a small vocabulary), quantizes each with GPTQ
in a fresh process and compares the peaks of resident memory. Exit code 1 if
the deepest needs more than 10 % more than the shallowest.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import safetensors.numpy
import tokenizers
from absl import flags
from tokenizers import pre_tokenizers

from experiments import cli, results

FLAGS = flags.FLAGS
flags.DEFINE_string('work', '/tmp/jaxq_memory_depth', 'Where to write.')
flags.DEFINE_multi_integer(
  'blocks', [4, 30], 'Numbers of blocks, growing.', lower_bound=1
)
flags.DEFINE_integer('sequences', 64, 'Calibration sequences.', lower_bound=1)
flags.DEFINE_float(
  'tolerance', 0.1, 'Growth of the peak that is allowed.', lower_bound=0.0
)

CONFIG = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'hidden_act': 'silu',
  'vocab_size': 2048,
  'hidden_size': 576,
  'intermediate_size': 1536,
  'num_attention_heads': 9,
  'num_key_value_heads': 3,
  'head_dim': 64,
  'rope_theta': 10000.0,
  'rms_norm_eps': 1e-5,
  'tie_word_embeddings': True,
  'max_position_embeddings': 2048,
}
LENGTH = 512
_WIDTH, _FFN, _KV = 576, 1536, 192
_SHAPES = {  # As in the file: (out, in).
  'input_layernorm': (_WIDTH,),
  'self_attn.q_proj': (_WIDTH, _WIDTH),
  'self_attn.k_proj': (_KV, _WIDTH),
  'self_attn.v_proj': (_KV, _WIDTH),
  'self_attn.o_proj': (_WIDTH, _WIDTH),
  'post_attention_layernorm': (_WIDTH,),
  'mlp.gate_proj': (_FFN, _WIDTH),
  'mlp.up_proj': (_FFN, _WIDTH),
  'mlp.down_proj': (_WIDTH, _FFN),
}


def main(argv: Sequence[str]) -> int:
  """Measures each depth; prints the table and the verdict."""
  del argv
  work = pathlib.Path(FLAGS.work)
  work.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  letters = rng.choice(list('abcdefgh ij klmn opqr stuvwxyz'), 80 * LENGTH)
  text = work / 'text.txt'
  text.write_text(''.join(letters.tolist()))
  rows, peaks = [], []
  for blocks in FLAGS.blocks:
    model = write_model(work / f'model_{blocks}', blocks)
    output = work / f'out_{blocks}'
    shutil.rmtree(output, ignore_errors=True)
    peaks.append(_peak_megabytes(model, text, output))
    stored = sum(p.stat().st_size for p in output.rglob('*') if p.is_file())
    checkpoint = (model / 'model.safetensors').stat().st_size
    metric = results.Metric
    rows.append(
      results.Row(
        name=f'{blocks} blocks',
        metrics=(
          metric(name='peak RSS', value=peaks[-1], unit='MB'),
          metric(name='checkpoint', value=checkpoint / 1e6, unit='MB'),
          metric(name='stored result', value=stored / 1e6, unit='MB'),
        ),
      )
    )
  results.print_table(rows)
  growth = peaks[-1] / peaks[0] - 1
  verdict = 'within' if growth <= FLAGS.tolerance else 'ABOVE'
  print(f'growth of the peak: {growth:.1%}, {verdict} {FLAGS.tolerance:.0%}')
  return int(growth > FLAGS.tolerance)


def write_model(folder: pathlib.Path, blocks: int) -> pathlib.Path:
  """Writes a Hugging Face directory with random weights; returns it."""
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)

  def normal(shape):
    if len(shape) == 1:
      return np.ones(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5

  tensors = {
    'model.embed_tokens.weight': normal((CONFIG['vocab_size'], _WIDTH)),
    'model.norm.weight': normal((_WIDTH,)),
  }
  for i in range(blocks):
    for name, shape in _SHAPES.items():
      tensors[f'model.layers.{i}.{name}.weight'] = normal(shape)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  config = {**CONFIG, 'num_hidden_layers': blocks}
  (folder / 'config.json').write_text(json.dumps(config))
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {letter: i for i, letter in enumerate(alphabet)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


def _peak_megabytes(
  model: pathlib.Path, text: pathlib.Path, output: pathlib.Path
) -> float:
  """Quantizes in a fresh process; returns its peak resident memory."""
  command = [
    *(sys.executable, '-m', 'experiments.calibrate'),
    *(f'--model={model}', f'--output={output}', f'--data={text}'),
    *('--scheme=W4A16', '--group_size=64', '--method=gptq', '--noevaluate'),
    *(f'--sequences={FLAGS.sequences}', f'--sequence_length={LENGTH}'),
  ]
  print('$', ' '.join(command), file=sys.stderr, flush=True)
  child = subprocess.Popen(command, env=os.environ)
  _, status, usage = os.wait4(child.pid, 0)
  if status:
    raise ValueError('the run failed; its own message is above.')
  unit = 1 if sys.platform == 'darwin' else 1024
  return usage.ru_maxrss * unit / 1e6


if __name__ == '__main__':
  cli.run(main)

r"""Says ahead of time whether a run fits, on devices that need not be there.

  python -m experiments.plan --model=llama3-70b --scheme=W4A16 \
      --method=gptq --topology=v5e:16x16

Compiles the calibration of a block, the evaluation and the decode step for the
topology from shapes alone, and prints what a device needs of memory, what
crosses devices, FLOPs, and a lower bound on time. Exit code 1 if it does not
fit; then the smallest topology that does is looked for.

The model is a shape by name (llama3-8b, llama3-70b, llama3-405b, mixtral-8x7b,
qwen3-32b, smollm2-135m) or a checkpoint, of which only the configuration is
read. `--plan` of the other entry points does the same for their own flags.
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli, plan_job, planning, recipe
from jaxq.calibrate import plan
from jaxq.quant import schemes

FLAGS = flags.FLAGS

_MODEL = flags.DEFINE_string(
  'model', None, 'A shape by name, or a checkpoint.', required=True
)
_SCHEME = flags.DEFINE_string(
  'scheme', 'W4A16', 'How weights and inputs are stored.'
)
_METHOD = flags.DEFINE_list(
  'method', ['gptq'], f'Methods, in order, of {", ".join(recipe.METHODS)}.'
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'A field of a method: method.field=value.'
)
_GROUP_SIZE = flags.DEFINE_integer(
  'group_size', None, "Weights that share a scale. Default: the scheme's own."
)
_SEQUENCES = flags.DEFINE_integer(
  'sequences', 128, 'Calibration sequences.', lower_bound=1
)
_LENGTH = flags.DEFINE_integer(
  'sequence_length',
  2048,
  'Tokens of a sequence, of a window and of the caches.',
  lower_bound=2,
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', None, 'Sequences per step. Default: chosen for the mesh.'
)
_STEPS = flags.DEFINE_list(
  'steps', ['calibrate', 'evaluate', 'decode'], 'What to plan, of these three.'
)
_DECODE_BATCH = flags.DEFINE_integer(
  'decode_batch', None, 'Rows of a decode step. Default: 8 or more.'
)
_INPUTS = flags.DEFINE_enum(
  'inputs', 'quantized', ['quantized', 'float'], 'What feeds the next block.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'Of float weights and activations in evaluation and decoding.',
)
_MESH = flags.DEFINE_string(
  'mesh', '', 'As data:32,model:8. Default: the one that needs least memory.'
)

STEPS = ('calibrate', 'decode', 'evaluate')


def main(argv: Sequence[str]) -> int:
  """Plans; returns 1 if it does not fit."""
  del argv
  for step in _STEPS.value:
    if step not in STEPS:
      raise ValueError(
        f'--steps={step}; allowed are {list(STEPS)}, several with commas.'
      )
  scheme = schemes.parse(_SCHEME.value, group_size=_GROUP_SIZE.value)
  built = recipe.build(_METHOD.value, scheme, _SET.value)
  job = plan_job.Job(
    model=_MODEL.value,
    label=plan_job.label(built.description),
    transform=built.transform,
    settings=plan.Settings(
      samples=_SEQUENCES.value,
      length=_LENGTH.value,
      batch_size=_BATCH_SIZE.value,
      inputs=_INPUTS.value,
    ),
    calibrates='calibrate' in _STEPS.value,
    evaluates='alone' if 'evaluate' in _STEPS.value else '',
    decodes='decode' in _STEPS.value,
    window=_LENGTH.value,
    decode_batch=_DECODE_BATCH.value,
    dtype=_DTYPE.value,
    mesh=_MESH.value,
  )
  return planning.run(job, 'experiments.plan')


if __name__ == '__main__':
  cli.run(main)

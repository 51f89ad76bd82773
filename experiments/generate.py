r"""Continues a prompt with a language model.

  python -m experiments.generate --model=smollm2-135m --prompt='The capital of'
  python -m experiments.generate ... --kv_cache=oscar:bits=2

The text is streamed to stdout as it comes; speed goes to stderr. Special
tokens in the prompt are understood, so a chat model's turns can be written
out: $'<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n'. A MosaicQA
model (experiments.train) is asked about a test video: --prompt='presence d3'.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

import models
from experiments import (
  cli,
  generation,
  mosaic_dialogue,
  plan_job,
  planning,
  training,
  training_files,
)
from jaxq.calibrate import plan
from jaxq.decode import sampling as sampling_lib
from jaxq.kvcache import registry
from jaxq.parallel import mesh as mesh_lib

_MODEL = flags.DEFINE_string(
  'model',
  None,
  'Packaged name, .gguf file, Hugging Face or jaxq directory.',
  required=True,
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'The text to continue.', required=True
)
_AND_PROMPT = flags.DEFINE_multi_string(
  'and_prompt',
  [],
  'Another text to continue in the same batch. Of several texts none is '
  'streamed: they are printed in order.',
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', 64, 'Tokens to generate at most.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.0, 'Divides the logits; 0 is greedy.'
)
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Most likely tokens kept; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Probability mass kept; 1: all.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the sampling.')
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'Of float weights, activations and the cache.',
)
_KV_CACHE = flags.DEFINE_string(
  'kv_cache',
  None,
  'What keys and values are kept in, as in oscar:bits=2 or ring:window=512; '
  'docs/kv_cache.md lists them. Default: as they are.',
)
_TOKEN_REDUCER = flags.DEFINE_string(
  'token_reducer',
  None,
  'Of a MosaicQA model: what keeps or merges visual tokens, as in '
  'tome:budget=0.25.',
)
_VIDEO = flags.DEFINE_integer(
  'video', 0, 'Test video that a MosaicQA model is asked about.', lower_bound=0
)
_PREFILL_CHUNK = flags.DEFINE_integer(
  'prefill_chunk',
  None,
  'Prompt tokens that are read at a time; default: all.',
  lower_bound=1,
)
_MESH = flags.DEFINE_string(
  'mesh',
  '',
  'Device mesh, as in model:4. Default: one device; of several processes all.',
)


def main(argv: Sequence[str]) -> int | None:
  """Loads, generates and prints; or plans that."""
  del argv
  sampling = sampling_lib.Sampling(
    temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value
  )
  kv_cache = registry.parse(_KV_CACHE.value) if _KV_CACHE.value else None
  if planning.asked():
    return planning.run(_planned(kv_cache), 'experiments.generate')
  if training_files.is_complete(_MODEL.value) or _TOKEN_REDUCER.value:
    trained = training.load(_MODEL.value)
    said = mosaic_dialogue.say(
      trained,
      _TOKEN_REDUCER.value,
      _PROMPT.value,
      _VIDEO.value,
      _MAX_NEW_TOKENS.value,
      kv_cache,
    )
    print(said, flush=True)
    return None
  mesh = mesh_lib.choose(_MESH.value, batch_size=1)
  model = models.load(_MODEL.value, dtype=_DTYPE.value, mesh=mesh)
  how: dict[str, Any] = {
    'max_new_tokens': _MAX_NEW_TOKENS.value,
    'sampling': sampling,
    'seed': _SEED.value,
    'kv_cache': kv_cache,
    'prefill_chunk': _PREFILL_CHUNK.value,
  }
  if _AND_PROMPT.value:
    prompts = [_PROMPT.value, *_AND_PROMPT.value]
    for text in generation.batch(model, prompts, **how):
      print(text, flush=True)
    return None
  watch = generation.Stopwatch()
  tokens = generation.stream(model, _PROMPT.value, **how)
  for text in generation.pieces(model.tokenizer, watch.time(tokens)):
    print(text, end='', flush=True)
  print(flush=True)
  print(watch.summary(), file=sys.stderr)
  return None


def _planned(kv_cache: Any) -> plan_job.Job:
  """What --plan plans: a step with caches that hold prompt and text.

  The prompt is counted in bytes: no tokenizer makes more tokens of it.
  """
  length = len(_PROMPT.value.encode()) + _MAX_NEW_TOKENS.value
  return plan_job.Job(
    model=_MODEL.value,
    label='as it is stored',
    transform=None,
    settings=plan.Settings(samples=1, length=-(-length // 128) * 128),
    calibrates=False,
    evaluates='',
    decode_batch=1,
    dtype=_DTYPE.value,
    kv_cache=kv_cache,
    mesh=_MESH.value,
  )


if __name__ == '__main__':
  cli.run(main)

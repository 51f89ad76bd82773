"""transformers on the CPU, as plain functions on NumPy arrays.

The oracle is optional: without torch or transformers the tests skip and say
so. Attention is transformers' own 'eager' code and all weights are float32.
"""

import importlib
import pathlib
import unittest
from collections.abc import Sequence
from typing import Any

import numpy as np


def require() -> None:
  """Skips the tests of a module when the oracle is not installed."""
  try:
    import torch  # noqa: F401
    import transformers
  except ImportError as e:
    raise unittest.SkipTest(f'the oracle is not installed: {e}') from e
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()


def torch() -> Any:
  """The module, or skips the test where it is not installed."""
  try:
    return importlib.import_module('torch')
  except ImportError as e:
    raise unittest.SkipTest(f'the oracle is not installed: {e}') from e


def load_gguf(path: pathlib.Path) -> tuple[Any, Any]:
  """(model, tokenizer) of a GGUF file, read by transformers."""
  import torch
  import transformers

  folder, file = str(path.parent), path.name
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    gguf_file=file,
    dtype=torch.float32,
    attn_implementation='eager',
    local_files_only=True,
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    folder, gguf_file=file, local_files_only=True
  )
  return model.eval(), tokenizer


def random_llama(seed: int, **config: Any) -> Any:
  """A Llama with random float32 weights, no two norms alike.

  Args:
    seed: of the weights.
    **config: fields of transformers.LlamaConfig.
  """
  import torch
  import transformers

  torch.manual_seed(seed)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(attn_implementation='eager', **config)
  )
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'norm' in name:
        parameter.uniform_(0.5, 1.5)
      elif 'embed' in name or 'lm_head' in name:
        parameter.normal_(0.0, 1.0)
      else:
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
  return model.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
  """tokens (B, T) -> logits (B, T, V) float32."""
  import torch

  with torch.no_grad():
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    return model(input_ids=ids).logits.numpy()


def greedy(
  model: Any,
  prompt: Sequence[int],
  max_new_tokens: int,
  stop_ids: Sequence[int],
) -> list[int]:
  """The new tokens of transformers' own greedy generation."""
  import torch

  ids = torch.tensor([list(prompt)])
  with torch.no_grad():
    out = model.generate(
      input_ids=ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=max_new_tokens,
      do_sample=False,
      eos_token_id=list(stop_ids) or None,
      pad_token_id=0,
    )
  return out[0, len(prompt) :].tolist()


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
  """max |got - expected| / max |expected|."""
  return float(np.abs(got - expected).max() / np.abs(expected).max())

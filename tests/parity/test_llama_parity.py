"""Random small Llamas, saved by transformers and loaded by models.load.

Grouped-query attention with 1, 3 and 8 query heads per key/value head, tied
and untied heads: every logit and every greedy token agree.
"""

import os
import tempfile

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from experiments import adapters
from jaxq.decode import autoregressive
from tests.decode import testing
from tests.parity import oracle

V = testing.VOCAB_SIZE
PROMPTS = ([3, 141, 59], [26, 5, 35, 89, 79, 32, 38, 46, 26, 43, 38], [1])


def setUpModule():
  oracle.require()


class LlamaParityTest(parameterized.TestCase):
  @parameterized.product(group=(1, 3, 8), tied=(True, False))
  def test_logits_and_greedy_tokens(self, group, tied):
    kv_heads = 1 if group == 8 else 2
    reference = oracle.random_llama(
      seed=group,
      vocab_size=V,
      hidden_size=48,
      intermediate_size=80,
      num_hidden_layers=3,
      num_attention_heads=group * kv_heads,
      num_key_value_heads=kv_heads,
      head_dim=16,
      rope_theta=50000.0,
      rms_norm_eps=1e-5,
      max_position_embeddings=256,
      tie_word_embeddings=tied,
      bos_token_id=0,
      eos_token_id=testing.EOS,
    )
    folder = self.enter_context(tempfile.TemporaryDirectory())
    reference.save_pretrained(folder)
    testing.tokenizer().save(os.path.join(folder, 'tokenizer.json'))
    model = models.load(folder)
    self.assertEqual(model.config.tie_embeddings, tied)
    self.assertEqual(model.config.rope_theta, 50000.0)

    tokens = np.random.default_rng(group).integers(0, V, (2, 100))
    got, _ = model.module.apply(model.variables, jnp.asarray(tokens, jnp.int32))
    expected = oracle.logits(reference, tokens)
    self.assertLess(oracle.relative_error(np.asarray(got), expected), 1e-3)

    out = autoregressive.generate(
      adapters.language_model(model.module),
      model.variables,
      PROMPTS,
      max_new_tokens=16,
    )
    for prompt, row, n in zip(PROMPTS, out.tokens, out.lengths, strict=True):
      self.assertEqual(
        row[:n].tolist(),
        oracle.greedy(reference, prompt, 16, (testing.EOS,)),
      )


if __name__ == '__main__':
  absltest.main()

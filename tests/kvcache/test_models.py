"""Decoders that keep their keys and values in each of the caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments import adapters, evaluation, generation, passkey
from jaxq.data import pipeline
from jaxq.decode import autoregressive, sampling
from jaxq.eval import perplexity
from jaxq.kvcache import contiguous, ring
from models import decoder
from tests.decode import testing as decode_testing
from tests.kvcache import testing

# Budgets for all 41 tokens, in caches of 64; their code still selects.
SELECTING = {
  'evict': dataclasses.replace(
    testing.EVICT, policy='expected', budget=48, head_budgets=True
  ),
  'tokenselect': dataclasses.replace(testing.TOKENSELECT, budget=40, theta=-1),
}
PROMPTS = ([5, 200, 7], list(range(40, 57)), [9])
CONFIG = dataclasses.replace(decode_testing.CONFIG, head_dim=testing.D)


@functools.cache
def model():
  """That of decode_testing, with heads that can be packed."""
  module = decoder.Decoder(CONFIG)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(module.init)(jax.random.key(0), tokens)['params']
  params = {**params, 'embed': jax.tree.map(lambda e: e * 50, params['embed'])}
  return dataclasses.replace(
    decode_testing.model(),
    config=CONFIG,
    module=module,
    variables={'params': params, 'quant': {'blocks_0': {}}},
  )


def generate(config, prompts=PROMPTS, **kwargs):
  made = model()
  return autoregressive.generate(
    adapters.language_model(made.module, config),
    made.variables,
    prompts,
    max_new_tokens=24,
    **kwargs,
  )


@functools.cache
def float_text():
  """The greedy tokens of PROMPTS with everything in float."""
  return generate(None).tokens


class GenerateTest(parameterized.TestCase):
  @parameterized.named_parameters(*((name, name) for name in testing.LOSSLESS))
  def test_lossless_is_the_float_text(self, name):
    chunk = None if name == 'oscar_16' else 8
    got = generate(testing.LOSSLESS[name], prefill_chunk=chunk)
    np.testing.assert_array_equal(got.tokens, float_text())

  @parameterized.named_parameters(*((name, name) for name in SELECTING))
  def test_a_budget_for_all_is_the_float_text(self, name):
    got = generate(SELECTING[name], prefill_chunk=8)
    np.testing.assert_array_equal(got.tokens, float_text())

  def test_a_row_of_a_ragged_batch_is_as_alone(self):
    # What shares no code with oscar's rows is in test_contract.
    batch = generate(testing.OSCAR)
    alone = generate(testing.OSCAR, PROMPTS[1:2])
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[1])

  def test_a_finished_row_changes_no_other(self):
    made = model()
    free = generate(testing.OSCAR).tokens
    stop = int(free[0, 2])
    lm = dataclasses.replace(
      adapters.language_model(made.module, testing.OSCAR), stop_ids=(stop,)
    )
    out = autoregressive.generate(
      lm, made.variables, PROMPTS, max_new_tokens=24
    )
    for row, got in zip(free, out.tokens, strict=True):
      hits = np.flatnonzero(row == stop)
      n = hits[0] + 1 if hits.size else 24
      np.testing.assert_array_equal(got[:n], row[:n])

  def test_prompts_of_unlike_lengths_in_one_batch(self):
    made = model()
    how = dict(
      max_new_tokens=9, sampling=sampling.GREEDY, kv_cache=testing.KIVI
    )
    prompts = ['hello there, this is text', 'so']
    texts = generation.batch(made, prompts, **how)
    alone = generation.stream(made, prompts[0], **how)
    pieces = generation.pieces(made.tokenizer, alone)
    self.assertEqual(texts[0], ''.join(pieces))
    with self.assertRaisesRegex(ValueError, "--prompt=''; the prompt must no"):
      generation.batch(made, ['a', ''], **how)

  def test_folded_values_are_online_ones(self):
    online = dataclasses.replace(testing.OSCAR, bits=4)
    folded = dataclasses.replace(online, value_rotation='folded')
    made = model()
    text = lambda config: list(
      generation.stream(
        made,
        'hello there, this is text',
        max_new_tokens=9,
        sampling=sampling.GREEDY,
        kv_cache=config,
      )
    )
    self.assertEqual(text(online), text(folded))

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'prefill_chunk=0; it must be at l'):
      generate(None, prefill_chunk=0)
    other = dataclasses.replace(model(), family='vit', name='vit-s14')
    with self.assertRaisesRegex(
      NotImplementedError, 'vit-s14, a vit model; ca'
    ):
      generation.prepared(other, testing.KIVI)


class SlidingTest(parameterized.TestCase):
  @parameterized.parameters('ring', 'oscar_16')
  def test_a_model_with_windows(self, name):
    # Layers 0 and 2 see 5 tokens, layer 1 all.
    config = dataclasses.replace(
      CONFIG,
      num_layers=3,
      window=5,
      sliding=(True, False, True),
      attention_softcap=4.0,
    )
    module = decoder.Decoder(config)
    tokens = jax.random.randint(jax.random.key(0), (2, 30), 0, 256)
    variables = module.init(jax.random.key(1), tokens[:, :2])
    expected, _ = jax.jit(module.apply)(variables, tokens)
    cache = ring.RingConfig() if name == 'ring' else testing.LOSSLESS[name]
    caches = decoder.init_caches(config, (), 2, 64, kv_cache=cache)
    if name == 'ring':
      self.assertIsInstance(caches[1], contiguous.ContiguousCache)
      self.assertEqual(caches[0].k.shape[2], 5)
    apply = jax.jit(module.apply)
    start = 0
    for size in (18, 1, 1, 10):
      positions = jnp.broadcast_to(jnp.arange(size)[None] + start, (2, size))
      logits, caches = apply(
        variables, tokens[:, start : start + size], positions, caches
      )
      np.testing.assert_allclose(
        logits, expected[:, start : start + size], atol=1e-4
      )
      start += size


class EvaluateTest(parameterized.TestCase):
  def scores(self, config, chunk, tokens):
    made = model()
    return perplexity.token_nll(
      adapters.cached_scorer(made.module, config, chunk),
      made.variables,
      tokens,
    )

  def tokens(self):
    return np.random.default_rng(0).integers(0, 256, (2, 50))

  @parameterized.named_parameters(
    ('paged', 'paged'), ('zipcache_16', 'zipcache_16')
  )
  def test_lossless_is_one_pass(self, name):
    made, tokens = model(), self.tokens()
    expected = perplexity.token_nll(
      adapters.scorer(made.module), made.variables, tokens
    )
    got = self.scores(testing.LOSSLESS[name], 16, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4)

  def test_chunks_of_a_block_are_decoding(self):
    tokens = self.tokens()
    chunked = self.scores(testing.OSCAR, 16, tokens)
    single = self.scores(testing.OSCAR, 1, tokens)
    np.testing.assert_allclose(chunked, single, atol=1e-4)
    lossless = self.scores(contiguous.ContiguousConfig(), 16, tokens)
    self.assertGreater(np.abs(chunked - lossless).max(), 1e-4)

  def test_compare_says_what_was_measured(self):
    made = model()
    tokens = self.tokens().astype(np.int32)
    windows = pipeline.EvaluationWindows(
      tokens=tokens,
      words=np.array([9, 9]),
      nbytes=np.array([49, 49]),
      description='random bytes',
    )
    got = evaluation.compare(
      made, made, windows, kv_cache=testing.KIVI, kv_chunk=16
    )
    reference, row = got.rows()
    conventions = row[evaluation.PERPLEXITY].conventions
    self.assertEqual(conventions['kv cache'], 'kivi:group_size=8,residual=16')
    self.assertEqual(conventions['kv chunk'], 16)
    self.assertNotIn('kv cache', reference[evaluation.PERPLEXITY].conventions)
    self.assertGreater(row[evaluation.KL].value, 0)
    with self.assertRaisesRegex(ValueError, 'kv_chunk=0; it must be at least'):
      adapters.cached_scorer(made.module, testing.KIVI, 0)

  def test_passkey_with_a_cache(self):
    made = model()
    with self.assertRaisesRegex(ValueError, 'the question alone has'):
      passkey.metrics(made, [8], testing.KIVI)


if __name__ == '__main__':
  absltest.main()

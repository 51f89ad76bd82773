"""Tests of jaxq.decode.autoregressive."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest

from experiments import adapters
from jaxq.decode import autoregressive, sampling
from tests.decode import testing

PROMPTS = ([5, 200, 7], list(range(40, 57)), [9])
SAMPLED = sampling.Sampling(temperature=1.5, top_k=20, top_p=0.9)


def setUpModule():
  global MODEL, LM
  MODEL = testing.model()
  LM = adapters.language_model(MODEL.module)


def run(prompts, max_new_tokens=12, model=None, **kwargs):
  return autoregressive.generate(
    LM if model is None else model,
    MODEL.variables,
    prompts,
    max_new_tokens=max_new_tokens,
    **kwargs,
  )


def run_stream(prompts, max_new_tokens=12, model=None, **kwargs):
  steps = autoregressive.stream(
    LM if model is None else model,
    MODEL.variables,
    prompts,
    max_new_tokens=max_new_tokens,
    **kwargs,
  )
  return np.stack(list(steps), axis=1)


def with_stops(*ids):
  return dataclasses.replace(LM, stop_ids=ids)


class AutoregressiveTest(absltest.TestCase):
  def test_is_the_argmax_of_the_whole_sequence(self):
    # Without caches: every new token from a forward pass over all before it.
    out = run(PROMPTS)
    tokens = np.zeros((3, 29), np.int32)
    for row, prompt, new in zip(tokens, PROMPTS, out.tokens, strict=True):
      row[: len(prompt) + 12] = [*prompt, *new]
    logits, _ = jax.jit(MODEL.module.apply)(MODEL.variables, tokens)
    predicted = np.argmax(np.asarray(logits), axis=-1)
    for row, prompt, new in zip(predicted, PROMPTS, out.tokens, strict=True):
      n = len(prompt)
      np.testing.assert_array_equal(row[n - 1 : n + 11], new)
    self.assertGreater(len(set(out.tokens[1].tolist())), 4)  # No fixed point.

  def test_ragged_batch_is_each_row_alone(self):
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    batch = run(PROMPTS, sampling=SAMPLED, key=keys)
    for i, prompt in enumerate(PROMPTS):
      alone = run([prompt], sampling=SAMPLED, key=keys[i : i + 1])
      np.testing.assert_array_equal(alone.tokens[0], batch.tokens[i])

  def test_stream_is_generate(self):
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    out = run(PROMPTS, sampling=SAMPLED, key=keys)
    got = run_stream(PROMPTS, sampling=SAMPLED, key=keys)
    np.testing.assert_array_equal(got, out.tokens)
    # The caller's keys are not donated with the state.
    again = run_stream(PROMPTS, sampling=SAMPLED, key=keys)
    np.testing.assert_array_equal(again, out.tokens)

  def test_seed(self):
    runs = [
      run([[1, 2, 3]], sampling=SAMPLED, key=jax.random.key(seed)).tokens
      for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    self.assertFalse(np.array_equal(runs[0], runs[2]))

  def test_every_stop_id_freezes_its_row(self):
    free = run(PROMPTS).tokens
    # Row 0 stops at its 3rd token, row 1 at its 6th; row 2 meets neither.
    stops = int(free[0, 2]), int(free[1, 5])
    out = run(PROMPTS, model=with_stops(*stops))
    expected_lengths = []
    for row, got in zip(free, out.tokens, strict=True):
      hits = np.flatnonzero(np.isin(row, stops))
      n = hits[0] + 1 if hits.size else len(row)
      expected_lengths.append(n)
      np.testing.assert_array_equal(got[:n], row[:n])
      np.testing.assert_array_equal(got[n:], autoregressive.PAD)
    np.testing.assert_array_equal(out.lengths, expected_lengths)
    self.assertLess(min(expected_lengths), max(expected_lengths))
    got = run_stream(PROMPTS, model=with_stops(*stops))
    np.testing.assert_array_equal(got, out.tokens[:, : got.shape[1]])

  def test_all_rows_done_ends_the_stream(self):
    first = int(run([[5, 200, 7]], 1).tokens[0, 0])
    got = run_stream([[5, 200, 7]], model=with_stops(first))
    np.testing.assert_array_equal(got, [[first]])
    out = run([[5, 200, 7]], 4, model=with_stops(first))
    np.testing.assert_array_equal(out.tokens, [[first, -1, -1, -1]])
    np.testing.assert_array_equal(out.lengths, [1])

  def test_capacity_changes_nothing(self):
    tight = run(PROMPTS, capacity=17 + 12)  # Below the bucket of 32.
    wide = run(PROMPTS, capacity=200)
    np.testing.assert_array_equal(tight.tokens, wide.tokens)

  def test_buckets_share_compilations(self):
    got = [autoregressive.bucket(n) for n in (1, 16, 17, 32, 33, 100)]
    self.assertEqual(got, [16, 16, 32, 32, 64, 128])
    run([[1, 2, 3]])
    before = autoregressive._prefill._cache_size()
    run([list(range(16))])
    self.assertEqual(autoregressive._prefill._cache_size(), before)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, r'prompts of \[3, 0\].*BOS'):
      run([[1, 2, 3], []])
    with self.assertRaisesRegex(ValueError, r'prompts of \[\] tokens'):
      run([])
    with self.assertRaisesRegex(ValueError, 'max_new_tokens=0; .*at least 1'):
      run([[1]], 0)
    with self.assertRaisesRegex(
      ValueError, "3 tokens and max_new_tokens=254 make 257; the model's.*256"
    ):
      run_stream([[1, 2, 3]], 254)
    with self.assertRaisesRegex(ValueError, 'make 9; the capacity .* is 8. Sh'):
      run([[1, 2, 3]], 6, capacity=8)
    with self.assertRaisesRegex(ValueError, r'keys of shape \(2,\) for 1 prom'):
      run([[1]], key=jax.random.split(jax.random.key(0)))


if __name__ == '__main__':
  absltest.main()

"""Tests of jaxq.eval.harness."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from experiments import adapters
from jaxq.decode import sampling
from jaxq.eval import harness
from tests.decode import testing

CONFIG = harness.HarnessConfig(batch_size=4, max_length=64)
SAMPLED = sampling.Sampling(temperature=1.5)


# What test_on_four_devices runs in a process of its own.
_SHARDED = """
import json
import jax
import jax.numpy as jnp
from jaxq.eval import harness
from jaxq.parallel import mesh as mesh_lib
from models import decoder
from tests.eval import test_harness as t

t.setUpModule()
mesh = mesh_lib.make_mesh('data:2,model:2')
rules = decoder.sharding_rules(t.MODEL.config, 2)
t.MODEL.variables = mesh_lib.place(t.MODEL.variables, rules, mesh)
scores = t.scores(t.requests(5), mesh=mesh)
model = harness._by_rows(t.LM, mesh)
ids = jnp.ones((4, 2), jnp.int32)
step = jax.jit(lambda v: model.forward(v, ids, ids, model.init_caches(4, 8)))
_, caches = step(t.MODEL.variables)
print(json.dumps({
  'scores': [s.log_likelihood for s in scores],
  'texts': t.texts([[5, 6, 7], [8]], mesh=mesh),
  'rows': list(caches[0].k.sharding.shard_shape(caches[0].k.shape))[:2],
}))
"""


def setUpModule():
  global MODEL, SCORER, LM
  MODEL = testing.model()
  SCORER = adapters.scorer(MODEL.module)
  LM = adapters.language_model(MODEL.module)


def requests(num=11, seed=0):
  """(context, continuation) pairs of many lengths."""
  rng = np.random.default_rng(seed)
  return [
    (
      rng.integers(0, 256, rng.integers(1, 40)).tolist(),
      rng.integers(0, 256, rng.integers(1, 24)).tolist(),
    )
    for _ in range(num)
  ]


@jax.jit
def log_probs(tokens):
  """tokens (T,) -> (T, V); one shape for all, what comes later is unseen."""
  logits, _ = MODEL.module.apply(MODEL.variables, tokens[None])
  return jax.nn.log_softmax(logits[0])


def predictions(tokens):
  """log p after each of the tokens, (T, V)."""
  padded = np.full(100, 3, np.int32)
  padded[: len(tokens)] = tokens
  return np.asarray(log_probs(padded))[: len(tokens)]


def expected(context, continuation):
  """Straight from the definition: one row."""
  log_p = predictions([*context, *continuation][:-1])[-len(continuation) :]
  total = sum(row[t] for row, t in zip(log_p, continuation, strict=True))
  return float(total), log_p.argmax(-1).tolist() == list(continuation)


def scores(pairs, config=CONFIG, **kwargs):
  return harness.loglikelihoods(
    SCORER, MODEL.variables, pairs, config, **kwargs
  )


def texts(prompts, config=CONFIG, until=(), max_new_tokens=12, **kwargs):
  return harness.generate_until(
    LM,
    MODEL.variables,
    prompts,
    MODEL.tokenizer.decode,
    config,
    until=until,
    max_new_tokens=max_new_tokens,
    **kwargs,
  )


class LogLikelihoodsTest(parameterized.TestCase):
  @parameterized.parameters(1, 16)
  def test_is_the_definition_whatever_the_batch(self, batch_size):
    pairs = requests()
    config = harness.HarnessConfig(batch_size=batch_size, max_length=64)
    for pair, got in zip(pairs, scores(pairs, config), strict=True):
      want, greedy = expected(*pair)
      # Float32 sums of up to 24 terms, in another order.
      np.testing.assert_allclose(got.log_likelihood, want, rtol=1e-4)
      self.assertEqual(got.greedy, greedy)

  def test_a_greedy_continuation_is_seen(self):
    context = [5, 6, 7]
    for _ in range(4):
      context.append(int(predictions(context)[-1].argmax()))
    wrong = [*context[3:6], (context[6] + 1) % 256]
    got = scores([(context[:3], context[3:]), (context[:3], wrong)])
    self.assertTrue(got[0].greedy)
    self.assertFalse(got[1].greedy)
    self.assertGreater(got[0].log_likelihood, got[1].log_likelihood)

  def test_the_left_is_cut(self):
    (context, continuation) = list(range(100)), [7, 8, 9]
    kept = [*context, *continuation][-65:-3]
    (got,) = scores([(context, continuation)])
    want, _ = expected(kept, continuation)
    np.testing.assert_allclose(got.log_likelihood, want, rtol=1e-4)

  def test_few_programs(self):
    before = harness._score._cache_size()
    scores(requests(30, seed=1))
    # Tokens in 32 or 64, scored ones in 16 or 32.
    self.assertLessEqual(harness._score._cache_size() - before, 4)

  def test_on_a_mesh(self):
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = jax.sharding.Mesh(devices, ('data', 'model'))
    pairs = requests(5)
    for got, want in zip(scores(pairs, mesh=mesh), scores(pairs), strict=True):
      np.testing.assert_allclose(
        got.log_likelihood, want.log_likelihood, rtol=1e-5
      )

  @pytest.mark.slow
  def test_on_four_devices(self):
    flags = '--xla_force_host_platform_device_count=4'
    done = subprocess.run(
      [sys.executable, '-c', _SHARDED],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    got = json.loads(done.stdout)
    want = scores(requests(5))
    np.testing.assert_allclose(
      got['scores'], [s.log_likelihood for s in want], rtol=1e-4
    )
    self.assertEqual(got['texts'], texts([[5, 6, 7], [8]]))
    self.assertEqual(got['rows'], [2, 2])  # Two layers; two rows of four.

  def test_progress_and_nothing_to_do(self):
    seen = []
    scores(requests(5), progress=lambda done, num: seen.append((done, num)))
    self.assertEqual(seen, [(4, 5), (5, 5)])
    self.assertEqual(scores([]), [])

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'request 1 has 0 context and'):
      scores([([1], [2]), ([], [2])])
    with self.assertRaisesRegex(ValueError, '1 context and 65 cont.*1..64'):
      scores([([1], [2] * 65)])
    with self.assertRaisesRegex(ValueError, 'batch_size=0; it must be at'):
      harness.HarnessConfig(batch_size=0)
    with self.assertRaisesRegex(ValueError, 'max_length=1; it must be at'):
      harness.HarnessConfig(max_length=1)
    mesh = jax.sharding.AbstractMesh((3, 1), ('data', 'model'))
    with self.assertRaisesRegex(ValueError, 'batch_size=4 on a mesh .*:3'):
      scores([([1], [2])], mesh=mesh)


class GenerateUntilTest(parameterized.TestCase):
  @parameterized.parameters((sampling.GREEDY,), (SAMPLED,))
  def test_a_row_is_the_same_in_any_batch(self, chosen):
    prompts = [pair[0] for pair in requests(6)]
    one = harness.HarnessConfig(batch_size=1, max_length=64)
    together = texts(prompts, sampling=chosen)
    self.assertEqual(together, texts(prompts, one, sampling=chosen))
    self.assertGreater(len(set(together)), 1)

  def test_the_seed_matters_only_when_sampling(self):
    prompts = [[5, 6, 7]]
    self.assertEqual(texts(prompts, seed=1), texts(prompts, seed=2))
    self.assertNotEqual(
      texts(prompts, seed=1, sampling=SAMPLED),
      texts(prompts, seed=2, sampling=SAMPLED),
    )

  def test_stop_strings_are_cut_off(self):
    prompts = [pair[0] for pair in requests(3)]
    whole = texts(prompts, max_new_tokens=20)
    stop = whole[0][3:5]
    self.assertNotEmpty(stop)
    for text, cut in zip(
      whole,
      texts(prompts, max_new_tokens=20, until=['', stop]),
      strict=True,
    ):
      self.assertEqual(cut, text.split(stop)[0])

  def test_a_long_prompt_loses_its_left(self):
    prompt = list(range(200))
    self.assertEqual(texts([prompt]), texts([prompt[-52:]]))

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'max_new_tokens=64, max.*1..63'):
      texts([[1]], max_new_tokens=64)


if __name__ == '__main__':
  absltest.main()

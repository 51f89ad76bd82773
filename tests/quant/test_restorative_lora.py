"""Tests of jaxq.quant.restorative_lora."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import linear
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import ptq161, restorative_lora

V, C = 16, 32
W1 = spec_lib.QuantSpec(dtype='binary', granularity='channel')


def config(**fields):
  few = {'rank': 4, 'updates': 3, 'dropout': 0.0}
  return restorative_lora.LoraConfig(**{**few, **fields})


def apply(variables, tokens):
  """A model of one linear: a token's embedding to the logits of the next."""
  x = variables['params']['embed'][tokens]
  own = {
    'params': variables['params']['up_proj'],
    'quant': variables['quant'].get('up_proj', {}),
  }
  return linear.QuantDense(V).apply(own, x)


def model():
  """A packed model, its float kernel, and text whose tokens count upwards."""
  keys = jax.random.split(jax.random.key(0))
  embed, w = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, ((V, C), (C, V)), strict=True)
  )
  how = ptq161.PTQ161Config(weights=W1, epochs=0)
  mask = ptq161.structured_mask(jnp.ones(C), 0.2)
  packed = ptq161.export(w, *ptq161.init_binary(w, mask, how), how)
  variables = {
    'params': {'embed': embed, 'up_proj': {'kernel': packed}},
    'quant': {},
  }
  starts = np.arange(8)[:, None]
  tokens = (starts + np.arange(6)[None]) % V
  return variables, w, tokens.astype(np.int32)


class LoraTest(parameterized.TestCase):
  def test_training_starts_at_the_quantized_model(self):
    variables, _, tokens = model()
    how = config()
    adapters = restorative_lora.start(variables['params'], how)
    attached = restorative_lora.attach(variables, adapters, how)
    np.testing.assert_array_equal(
      apply(attached, tokens), apply(variables, tokens)
    )

  def test_training_lowers_the_loss_and_merging_keeps_what_it_learned(self):
    variables, _, tokens = model()
    how = config(updates=30, learning_rate=0.05)
    losses = []
    adapters = restorative_lora.train(
      apply, variables, tokens, how, lambda i, loss: losses.append(loss)
    )
    self.assertLen(losses, 30)
    self.assertLess(losses[-1], 0.5 * losses[0])
    merged = restorative_lora.merge(variables['params'], adapters, how)
    self.assertEqual(merged['up_proj']['kernel'].dtype, jnp.float32)
    attached = restorative_lora.attach(variables, adapters, how)
    np.testing.assert_allclose(
      apply({'params': merged, 'quant': {}}, tokens),
      apply(attached, tokens),
      rtol=1e-4,
      atol=1e-4,
    )

  def test_batches_of_an_update_count_as_one(self):
    variables, _, tokens = model()
    sizes = {'batch_size': 1, 'accumulate': 2}, {'batch_size': 2}
    one, two = (
      restorative_lora.train(
        apply, variables, tokens, config(**{'accumulate': 1, **fields})
      )['up_proj']
      for fields in sizes
    )
    self.assertGreater(float(jnp.max(jnp.abs(one.b))), 1e-5)
    np.testing.assert_allclose(one.b, two.b, atol=1e-6)

  def test_the_authors_values_are_the_defaults(self):
    how = restorative_lora.LoraConfig()
    self.assertEqual((how.rank, how.alpha, how.dropout), (64, 16.0, 0.1))
    self.assertEqual(how.updates * how.batch_size * how.accumulate, 20000)
    self.assertEqual(how.warmup * how.updates, 0.05 * 20000)
    self.assertEqual((how.learning_rate, how.max_norm), (1e-4, 1.0))
    self.assertNotIn('o_proj', how.targets)
    self.assertLen(how.targets, 6)

  def test_the_second_rounding_moves_merged_weights_less(self):
    # What the preprocessing is for: W_pre lies near what signs can hold.
    variables, w, _ = model()
    how = config()
    adapters = restorative_lora.start(variables['params'], how)
    merged = restorative_lora.merge(variables['params'], adapters, how)
    settings = ptq161.PTQ161Config(weights=W1, epochs=0)
    mask = ptq161.structured_mask(jnp.ones(C), 0.2)

    def error(kernel):
      made = ptq161.binary_dequant(*ptq161.init_binary(kernel, mask, settings))
      return float(jnp.mean((made - kernel) ** 2) / jnp.mean(kernel**2))

    self.assertLess(error(merged['up_proj']['kernel']), 0.2 * error(w))

  def test_dropout_scales_what_it_keeps(self):
    key = jax.random.key_data(jax.random.key(0))
    x = jnp.ones((1000, 1))
    term = restorative_lora.Dropped(
      jnp.ones((1, 1)), jnp.ones((1, 1)), key, 0.1
    )
    y = np.asarray(term(x))
    self.assertEqual(sorted(set(y.ravel().round(4))), [0.0, 1.1111])
    self.assertAlmostEqual(float(y.mean()), 1.0, delta=0.05)

  def test_stacked_kernels_have_stacked_terms(self):
    spec = spec_lib.QuantSpec(dtype='int4')
    kernel = qarray.quantize(jnp.ones((3, C, V)), spec)
    params = {'blocks_0': {'mlp': {'up_proj': {'kernel': kernel}}}}
    how = config()
    adapters = restorative_lora.start(params, how)
    term = adapters['blocks_0/mlp/up_proj']
    self.assertEqual(term.a.shape, (3, C, 4))
    merged = restorative_lora.merge(params, adapters, how)
    made = merged['blocks_0']['mlp']['up_proj']['kernel']
    np.testing.assert_array_equal(made, qarray.dequantize(kernel))
    dropped = restorative_lora.attach(
      {'params': params, 'quant': {}},
      adapters,
      config(dropout=0.1),
      jax.random.key(0),
    )['quant']['blocks_0']['mlp']['up_proj']['low_rank']
    self.assertEqual(dropped.key.shape, (3, 2))

  def test_o_proj_is_not_a_target_unless_named(self):
    params = {
      name: {'kernel': jnp.ones((C, V))} for name in ('o_proj', 'q_proj')
    }
    start = restorative_lora.start
    self.assertEqual(list(start(params, config())), ['q_proj'])
    self.assertEqual(
      list(start(params, config(targets=('o_proj',)))), ['o_proj']
    )

  @parameterized.parameters(
    ({'rank': 0}, 'rank=0; allowed 1 to'),
    ({'dropout': 1.0}, 'dropout=1.0; allowed 0.0 to 0.99'),
    ({'warmup': 2.0}, 'warmup=2.0; allowed 0.0 to 1.0'),
    ({'max_norm': 0.0}, 'max_norm=0.0; allowed 1e-06 to'),
  )
  def test_a_config_says_what_is_allowed(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      config(**fields)

  def test_a_rank_larger_than_a_layer(self):
    variables, _, _ = model()
    with self.assertRaisesRegex(ValueError, 'rank=64 is larger than up_proj'):
      restorative_lora.start(variables['params'], config(rank=64))

  def test_a_model_without_targets(self):
    with self.assertRaisesRegex(ValueError, 'no linear of the model is one of'):
      restorative_lora.start({'embed': jnp.ones((2, 2))}, config())

  def test_too_little_text(self):
    variables, _, tokens = model()
    with self.assertRaisesRegex(ValueError, 'an update needs 2 sequences'):
      restorative_lora.train(apply, variables, tokens[:1], config())

  def test_a_loss_that_is_not_finite(self):
    variables, _, tokens = model()
    variables['params']['embed'] = jnp.full((V, C), jnp.nan)
    with self.assertRaisesRegex(ValueError, 'NaN or Inf in update 0'):
      restorative_lora.train(apply, variables, tokens, config())

  def test_a_second_low_rank_term(self):
    variables, _, _ = model()
    how = config()
    adapters = restorative_lora.start(variables['params'], how)
    once = restorative_lora.attach(variables, adapters, how)
    with self.assertRaisesRegex(ValueError, 'low-rank term already'):
      restorative_lora.attach(once, adapters, how)


if __name__ == '__main__':
  absltest.main()

"""Tests of models.encoder_reduction, and of the models that use it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments import encoder_reduction as on_command_line
from jaxq.tokens import controls, fastv, pooling, primitives, tome
from models import encoder_reduction, loading, vit, whisper, whisper_blocks

VIT = vit.VitConfig(
  hidden_size=16,
  intermediate_size=32,
  num_layers=2,
  num_heads=2,
  patch_size=4,
  image_size=16,
)
WHISPER = whisper_blocks.WhisperConfig(
  vocab_size=20,
  hidden_size=16,
  mels=4,
  encoder_layers=2,
  encoder_heads=2,
  encoder_intermediate_size=32,
  decoder_layers=2,
  decoder_heads=2,
  decoder_intermediate_size=32,
  max_source=12,
  max_position=8,
)


@functools.cache
def vit_variables():
  variables = jax.jit(vit.Vit(VIT).init)(
    jax.random.key(0), jnp.ones((1, 16, 16, 3))
  )
  # Weights of 0.02 make tokens that differ by nothing but their patch.
  return jax.tree.map(lambda a: 5 * a if a.ndim > 2 else a, variables)


@functools.partial(jax.jit, static_argnums=(0, 2))
def apply(module, variables, method, *inputs):
  return module.apply(variables, *inputs, method=method)


def images(size=16):
  return jax.random.normal(jax.random.key(1), (2, size, size, 3))


class VitTest(parameterized.TestCase):
  @parameterized.parameters(
    # Of 17 tokens: r fewer per layer; half of the patches behind layer 1.
    (tome.TomeConfig(r=3), 17 - 6),
    (controls.RandomConfig(r=3), 17 - 6),
    (fastv.FastvConfig(layer=1, budget=0.5), 9),
  )
  def test_fewer_tokens(self, config, left):
    module = vit.Vit(VIT, token_reducer=config)
    hidden = apply(module, vit_variables(), 'hidden', images())
    self.assertEqual(hidden.shape, (2, left, 16))
    self.assertTrue(np.isfinite(hidden).all())

  def test_nothing_reduced_is_the_model(self):
    expected = apply(vit.Vit(VIT), vit_variables(), 'hidden', images())
    module = vit.Vit(VIT, token_reducer=tome.TomeConfig(r=0))
    got = apply(module, vit_variables(), 'hidden', images())
    np.testing.assert_allclose(got, expected, atol=1e-5)

  def test_equal_tokens_merged_give_what_they_gave_apart(self):
    rng = np.random.default_rng(1)
    some = rng.normal(size=(1, 4, 16))
    x = jnp.asarray(some[:, [0, 0, 0, 0, 1, 1, 2, 3]], jnp.float32)
    stack = vit_variables()['params']['blocks_0']
    layers = [
      {'params': jax.tree.map(lambda a, i=i: a[i], stack)}
      for i in range(VIT.num_layers)
    ]

    @jax.jit
    def all_forms(x):
      return [
        encoder_reduction.run(vit.Block(VIT), layers, x, config)
        for config in (
          tome.TomeConfig(r=0),
          tome.TomeConfig(r=1),
          tome.TomeConfig(r=1, proportional=False),
        )
      ]

    full, merged, unweighted = all_forms(x)
    self.assertEqual(merged.x.shape[1], 6)
    np.testing.assert_allclose(merged.size.sum(), 8, rtol=1e-6)
    back = primitives.gather(merged.x, merged.assignment)
    np.testing.assert_allclose(back, full.x, rtol=1e-4, atol=1e-4)
    # Without the log of the sizes the copies lose their weight.
    back = primitives.gather(unweighted.x, unweighted.assignment)
    self.assertGreater(np.abs(back - full.x).max(), 1e-2)

  def test_scores_equal_the_weights_of_attention(self):
    q, k = (
      jax.random.normal(key, (2, 5, 3, 4))
      for key in jax.random.split(jax.random.key(0))
    )
    logits = np.einsum('bthd,bshd->bhts', q, k) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(
      encoder_reduction.class_scores(q, k), weights[:, :, 0].mean(1), rtol=1e-5
    )
    np.testing.assert_allclose(
      encoder_reduction.received_scores(q, k),
      weights.mean((1, 2)),
      rtol=1e-5,
    )

  def test_reducers_that_do_not_work_inside(self):
    module = vit.Vit(VIT, token_reducer=pooling.PoolingConfig())
    with self.assertRaisesRegex(
      NotImplementedError, "PoolingConfig inside an encoder.*'tome'.*behind"
    ):
      module.apply(vit_variables(), images())


class WhisperTest(parameterized.TestCase):
  def test_frames_are_merged_and_the_decoder_knows_their_sizes(self):
    features = jax.random.normal(jax.random.key(0), (2, 24, 4))
    tokens = jnp.ones((2, 5), jnp.int32)
    full = whisper.Whisper(WHISPER)
    variables = jax.jit(full.init)(jax.random.key(1), features, tokens)
    module = full.clone(token_reducer=tome.TomeConfig(r=2))

    @jax.jit
    def heard(variables):
      return (
        module.apply(variables, features, method='encode_sized'),
        module.apply(variables, features, method='listen'),
        module.apply(variables, features, tokens)[0],
        full.apply(variables, features, tokens)[0],
      )

    (encoded, bias), cross, merged, whole = heard(variables)
    self.assertEqual(encoded.shape, (2, 8, 16))  # 12 frames, 2 per layer.
    np.testing.assert_allclose(np.exp(bias).sum(1), 12, rtol=1e-5)
    self.assertEqual(cross[0].k.shape[:3], (2, 2, 8))
    np.testing.assert_allclose(cross[0].bias[1], bias)
    self.assertEqual(merged.shape, whole.shape)
    self.assertGreater(np.abs(merged - whole).max(), 1e-6)


class CommandLineTest(absltest.TestCase):
  def model(self, family='vit'):
    return loading.Model(
      config=VIT,
      module=vit.Vit(VIT),
      variables={},
      tokenizer=None,
      name='small',
      family=family,
    )

  def test_a_text_is_a_model_with_a_reducer(self):
    model = self.model()
    self.assertIs(on_command_line.apply(model), model)
    reduced = on_command_line.apply(model, 'tome:r=4')
    self.assertEqual(reduced.module.token_reducer, tome.TomeConfig(r=4))
    self.assertEqual(reduced.name, 'small tome:r=4')

  def test_messages(self):
    with self.assertRaisesRegex(
      NotImplementedError, 'tome:r=4 with small, a decoder model; allowed'
    ):
      on_command_line.apply(self.model('decoder'), 'tome:r=4')
    with self.assertRaisesRegex(ValueError, 'tome, random with small; one at'):
      on_command_line.apply(self.model(), 'tome', 'random')
    with self.assertRaisesRegex(NotImplementedError, 'FramesConfig inside an'):
      on_command_line.apply(self.model(), 'frames')


if __name__ == '__main__':
  absltest.main()

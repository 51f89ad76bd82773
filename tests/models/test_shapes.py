"""Tests of models.shapes."""

import tempfile

import jax
from absl.testing import absltest, parameterized

from models import decoder, loading, shapes
from tests.models import test_architectures, test_decoder


def structure(tree):
  return jax.tree.map(lambda a: (tuple(a.shape), str(a.dtype)), tree)


class ShapesTest(parameterized.TestCase):
  @parameterized.parameters(
    # Parameters in billions, as their makers count them.
    ('llama3-8b', 8.03),
    ('llama3-70b', 70.55),
    ('llama3-405b', 405.85),
    ('mixtral-8x7b', 46.70),
    ('qwen3-32b', 32.76),
    ('smollm2-135m', 0.1345),
  )
  def test_parameters(self, name, billions):
    model = shapes.open_shapes(name)
    count = sum(
      length * leaf.size
      for length, part in model.float_runs()
      for leaf in jax.tree.leaves(part)
    )
    count += sum(leaf.size for leaf in jax.tree.leaves(model.outside()))
    self.assertAlmostEqual(count / 1e9 / billions, 1, places=3)

  def test_every_configuration_is_counted(self):
    self.assertLen(shapes.CONFIGS, 6)

  @parameterized.parameters('llama', 'gemma3_text', 'qwen3_moe')
  def test_shapes_are_those_of_the_model(self, name):
    config = test_architectures.config_of(name)
    outside, parts = jax.eval_shape(
      lambda: test_architectures.random_parts(config)
    )
    model = shapes.ShapeModel(config=config, name=name)
    self.assertEqual(structure(model.outside()), structure(outside))
    for i, part in enumerate(parts):
      self.assertEqual(structure(model.block_params(i)), structure(part))
      self.assertEqual(model.block_at(i), decoder.block_spec(config, i))

  @parameterized.parameters('float32', 'bfloat16')
  def test_variables_are_those_of_a_loaded_model(self, dtype):
    config = test_decoder.CONFIG
    model = shapes.ShapeModel(config=config, name='small')
    outside, blocks = test_decoder.parts(config)
    parts = [{'params': b['params'], 'quant': {}} for b in blocks]
    stacked, runs = decoder.stack(outside, parts)
    expected = loading.cast(stacked['params'], dtype)
    found = model.variables(model.outside(), model.float_runs(), dtype)
    self.assertEqual(structure(found['params']), structure(expected))
    module = model.module(model.outside(), model.float_runs(), dtype)
    self.assertEqual(module.runs, runs)
    tokens = jax.ShapeDtypeStruct((2, 8), 'int32')
    logits, _ = jax.eval_shape(module.apply, found, tokens)
    self.assertEqual(logits.shape, (2, 8, config.vocab_size))

  def test_embeds(self):
    model = shapes.ShapeModel(config=test_decoder.CONFIG, name='small')
    tokens = jax.ShapeDtypeStruct((2, 8), 'int32')
    found = jax.eval_shape(model.embed, model.outside(), tokens)
    self.assertEqual(structure(found), ((2, 8, 32), 'float32'))
    self.assertEqual((model.num_blocks, model.bridges), (3, ()))

  def test_messages(self):
    model = shapes.open_shapes('smollm2-135m')
    with self.assertRaisesRegex(ValueError, 'no block 30; allowed are 0 to 29'):
      model.block_params(30)
    with self.assertRaisesRegex(NotImplementedError, 'no bridge at block 1'):
      model.bridge(1, {}, None)
    with tempfile.TemporaryDirectory() as folder:
      with self.assertRaisesRegex(
        (FileNotFoundError, ValueError), 'shape by name: llama3-405b, .*qwen3'
      ):
        shapes.open_shapes(f'{folder}/nothing')


if __name__ == '__main__':
  absltest.main()

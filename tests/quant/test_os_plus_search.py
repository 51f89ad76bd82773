"""What OS+ searches by, where its scales go, and that whole models stay.

OPT and BERT as the library builds them: LayerNorms, biases, padding, and norms
on the residual stream.
"""

import functools
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import activations, os_plus
from models import decoder, loading
from tests.calibrate import test_decoders, test_encoders
from tests.io import encoder_files
from tests.quant import (
  planted,
  test_mergequant,
  test_os_plus,
  test_outliertune,
  testing,
)

SHIFTED = 3  # Of the channels of every norm of a model.


class LossTest(parameterized.TestCase):
  def test_it_is_the_error_of_what_o_reads(self):
    """At s = 1: attention on rounded inputs and kernels, as the block runs.

    With grouped heads, which it has to repeat.
    """
    block, params = planted.block('rms', planted.SCALED)
    site, x = block.sites[0], planted.inputs()
    how = test_os_plus.config(shift='never', n_grid=1)
    seen = test_os_plus.sample_of(block, params, site, x)
    _, losses = os_plus.migrate(block, site, params, seen, how)
    t = jnp.max(jnp.abs(seen)).reshape(1)
    scale, zero = activations.static_params(-t, t, how.inputs)
    rounded, quant = params, {}
    for path in site.consumers:
      kernel = qarray.fake_quant(blocks.kernel_of(params, path), how.weights)
      rounded = taps.set_path(rounded, f'{path}/kernel', kernel)
      act = linear.ActQuant(scale, zero, how.inputs)
      quant = taps.set_path(quant, f'{path}/input', act)
    exact, got = (
      block.tapped({'params': p, 'quant': q}, x)['attention']['o_proj']['in']
      for p, q in ((params, {}), (rounded, quant))
    )
    error = jnp.mean(jnp.sum((got - exact) ** 2, axis=-1))
    self.assertGreater(float(error), 0)
    np.testing.assert_allclose(losses[0], error, rtol=1e-4)

  @parameterized.parameters(('opt', 'down_proj/in'), ('bert', 'up_proj/out'))
  def test_behind_a_relu_or_of_the_linear_itself(self, family, name):
    model, batch = model_and_batch(family)
    block, float_ = model.block_at(0), variables(model.block_params(0))
    seen = block.tapped(float_, model.embed(model.outside(), batch))['mlp']
    site = next(s for s in block.sites if s.producer == 'post_norm')
    got = block.inner_output(site, float_, seen['up_proj']['in'])
    layer, tap = name.split('/')
    np.testing.assert_allclose(got, seen[layer][tap], rtol=1e-5, atol=1e-5)

  @parameterized.parameters(
    ('layer', 0, {}, 1.0),
    ('rms', 0, {}, 0.1),
    ('rms', 0, {'shift': 'always', 'allow_new_bias': True}, 0.1),
    ('rms', -1, {}, 0.1),
    ('layer', 0, {'lower_bound': 0.4}, 0.4),
  )
  def test_the_least_threshold(self, kind, site, fields, bound):
    block, params = planted.block(kind)
    K = blocks.kernel_of(params, block.sites[site].consumers[0]).shape[0]
    found = None, jnp.ones(K), None
    with mock.patch.object(
      os_plus, 'search_threshold', return_value=found
    ) as search:
      x = jnp.ones((1, 2, K))
      how = test_os_plus.config(**fields)
      os_plus.migrate(block, block.sites[site], params, x, how)
    self.assertEqual(search.call_args.args[-1], bound)

  def test_defaults_are_the_papers(self):
    made = os_plus.OsPlusConfig(weights=test_os_plus.W8, inputs=test_os_plus.A8)
    self.assertEqual(
      (made.shift, made.n_grid, made.site_loss, made.sample_sequences),
      ('auto', 100, 'block', 16),
    )
    self.assertEqual((made.clip, made.token_quantile), ('avgminmax', 0.985))
    self.assertEqual(made.bmm, ('q_proj', 'k_proj', 'v_proj'))

  def test_groups_of_inputs_that_do_not_divide(self):
    group = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=48)
    block, params = planted.block('layer')
    with self.assertRaisesRegex(ValueError, 'K=64, group_size=48'):
      how = test_os_plus.migration(inputs=group)
      testing.run(block, params, how, planted.inputs())


METHODS = {
  'mergequant': functools.partial(
    test_mergequant.method, multiple=8, skip_tokens=0, weight='none'
  ),
  'os_plus': functools.partial(test_os_plus.migration, n_grid=5),
  'outliertune': test_outliertune.fold,
}


@functools.cache
def model_and_batch(family):
  """A random model, one channel of whose norms lies around 30; its inputs."""
  if family == 'opt':
    model, batch = test_decoders.open_model('opt'), test_decoders.TOKENS
  else:
    folder = tempfile.TemporaryDirectory()
    source = encoder_files.write_bert(pathlib.Path(folder.name) / 'bert')
    model, batch = models.open_model(str(source)), test_encoders.encoder_data()
    parts = [model.block_params(i) for i in range(model.num_blocks)]
    outside = model.outside()
    folder.cleanup()
    model.source = test_decoders.testing.ArraySource(
      model.source.config, outside, parts
    )
  for params in model.source.blocks:
    for norm in ('input_norm', 'post_norm'):
      bias = np.array(params[norm]['bias'])
      bias[SHIFTED] = 30.0
      params[norm] = {**params[norm], 'bias': bias}
  return model, batch


def variables(params):
  return {'params': params, 'quant': {}}


def migrated(model, method, batch):
  """The blocks' float params after `method`, in the float stream."""
  carry, made = model.embed(model.outside(), batch), []
  for i in range(model.num_blocks):
    block, params = model.block_at(i), model.block_params(i)
    made.append(testing.run(block, params, method, carry)[0])
    carry = block.apply(variables(params), carry)
  return made


def outputs(model, parts, batch):
  """Logits, or the embeddings of texts."""
  kinds = [model.block_at(i) for i in range(model.num_blocks)]
  stacked, runs = decoder.stack(
    model.outside(), [variables(part) for part in parts], kinds
  )
  family = loading.FAMILIES[model.family]
  module = family.build(model.config, runs, jnp.float32)
  out = jax.jit(module.apply)(stacked, jax.tree.map(jnp.asarray, batch))
  return np.asarray(out[0] if model.family == 'decoder' else out)


class ModelsTest(parameterized.TestCase):
  @parameterized.product(
    family=('bert', 'opt'), method=('os_plus', 'outliertune')
  )
  def test_a_shifted_model_gives_the_same(self, family, method):
    """Through the biases of consumers, and of shortcuts past them."""
    model, batch = model_and_batch(family)
    parts = [model.block_params(i) for i in range(model.num_blocks)]
    made = migrated(model, METHODS[method](), batch)
    want, got = (outputs(model, p, batch) for p in (parts, made))
    self.assertLess(np.max(np.abs(got - want)), 1e-5 * np.max(np.abs(want)))
    for before, after in zip(parts, made, strict=True):
      readers = ['attention/q_proj', 'mlp/up_proj']
      if family == 'bert':
        readers += ['attention_shortcut', 'mlp_shortcut']
      for path in readers:
        a, b = (taps.get_path(p, f'{path}/bias') for p in (before, after))
        self.assertGreater(np.max(np.abs(a - b)), 0.1, path)

  @parameterized.parameters(*sorted(METHODS))
  def test_padding_does_not_count(self, method):
    model, batch = model_and_batch('bert')
    other = dict(batch, tokens=np.where(batch['mask'], batch['tokens'], 9))
    made = [migrated(model, METHODS[method](), b) for b in (batch, other)]
    jax.tree.map(np.testing.assert_array_equal, *made)


class HiddenLayerTest(parameterized.TestCase):
  def test_its_scale_goes_into_the_columns_of_up(self):
    block, params = planted.large_hidden_channel()
    x = planted.inputs()
    stage = test_os_plus.migration(n_grid=10)
    moved, _ = testing.run(block, params, stage, x)
    up, down = (
      [blocks.kernel_of(p, f'mlp/{n}_proj') for p in (params, moved)]
      for n in ('up', 'down')
    )
    gate = moved['post_norm']['scale'] / params['post_norm']['scale']
    s = up[0] / (up[1] * gate[:, None])  # The norm's own scale taken back.
    np.testing.assert_allclose(s, jnp.broadcast_to(s[:1], s.shape), rtol=1e-3)
    self.assertGreater(float(s[0, planted.LARGE]), 5)
    self.assertGreaterEqual(float(jnp.min(s)), 1 - 1e-3)
    np.testing.assert_allclose(
      down[1] / down[0], jnp.broadcast_to(s[:1].T, down[0].shape), rtol=1e-3
    )
    error = test_os_plus.relative(
      testing.output(block, moved, {}, x), testing.output(block, params, {}, x)
    )
    self.assertLess(error, 1e-5)

  def test_it_gains(self):
    block, params = planted.large_hidden_channel()
    block = block.without(('re:attention', 're:gate|up'), 0)
    x = planted.inputs()
    ours = os_plus.os_plus(test_os_plus.config(n_grid=50, bmm=()))
    nearest = test_os_plus.rtn(test_os_plus.W6, test_os_plus.A6)
    errors = [planted.error(block, params, m, x) for m in (ours, nearest)]
    self.assertLess(errors[0], 0.5 * errors[1])


if __name__ == '__main__':
  absltest.main()

"""Tests of jaxq.nn.blocks."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks
from tests.quant import testing


class BlocksTest(parameterized.TestCase):
  @parameterized.parameters(
    ('down_proj', True),
    ('mlp.down_proj', True),
    ('blocks.3.mlp.down_proj', True),
    ('own_proj', False),
    ('blocks.2.mlp.down_proj', False),
    ('re:down', True),
    (r're:blocks\.[0-2]\.', False),
    ('re:^down', False),
  )
  def test_patterns(self, pattern, expected):
    name = blocks.name_of(3, 'mlp/down_proj')
    self.assertEqual(blocks.matches(pattern, name), expected)

  @parameterized.parameters(
    ('model.layers.3.self_attn.q_proj', True),
    ('self_attn.q_proj', True),
    (r're:.*self_attn\..*', True),
    (r're:.*layers\.3\..*', True),
    ('model.layers.2.self_attn.q_proj', False),
    ('re:.*lm_head', False),
  )
  def test_names_of_hugging_face(self, pattern, expected):
    name = blocks.name_of(3, 'attention/q_proj')
    self.assertEqual(blocks.matches(pattern, name), expected)

  def test_without_drops_only_the_named_linears_of_that_block(self):
    block, _ = testing.small_block()
    patterns = ('re:blocks.1..*proj',)
    self.assertLen(block.without(patterns, 0).linears, 7)
    self.assertEmpty(block.without(patterns, 1).linears)
    kept = block.without(('down_proj',), 0)
    self.assertIsNone(kept.linear('mlp/down_proj'))
    self.assertIsNotNone(kept.linear('mlp/up_proj'))

  def test_specs_are_hashable_and_compare_by_value(self):
    a, _ = testing.small_block()
    b, _ = testing.small_block()
    self.assertEqual(hash(a), hash(b))
    self.assertEqual(a, b)

  def test_site_heads_repeat_producer_heads_for_their_query_heads(self):
    site = blocks.Site(producer='v', consumers=('o',), heads=(2, 2, 3))
    s = jnp.arange(6.0)
    np.testing.assert_array_equal(
      site.expand(s), [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    )
    np.testing.assert_array_equal(site.reduce(site.expand(s)), s)

  def test_output_of_each_site_has_the_shape_of_its_method(self):
    block, params = testing.small_block()
    variables = {'params': params, 'quant': {}}
    for site in block.sites:
      K = blocks.kernel_of(params, site.consumers[0]).shape[0]
      y = block.output(site, variables, jnp.ones((2, 5, K)))
      self.assertEqual(y.shape, (2, 5, testing.C))


if __name__ == '__main__':
  absltest.main()

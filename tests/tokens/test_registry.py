"""Tests of jaxq.tokens.registry and jaxq.config_text."""

import json

from absl.testing import absltest, parameterized

from jaxq.tokens import registry, tome


class RegistryTest(parameterized.TestCase):
  @parameterized.parameters(*registry.REDUCERS)
  def test_a_name_is_its_defaults(self, name):
    config = registry.parse(name)
    self.assertEqual(config, registry.REDUCERS[name])
    self.assertEqual(registry.parse(registry.text_of(config)), config)
    hash(config)
    json.dumps(registry.describe(config))

  def test_fields(self):
    config = registry.parse('tome:r=8,inflect=-0.5,proportional=false')
    self.assertEqual(
      config, tome.TomeConfig(r=8, inflect=-0.5, proportional=False)
    )
    self.assertEqual(
      registry.text_of(config), 'tome:r=8,inflect=-0.5,proportional=False'
    )
    stages = registry.parse('sparsevlm:layers=1/2,keep=30/10,heads=4')
    self.assertEqual((stages.layers, stages.keep), ((1, 2), (30, 10)))
    self.assertEqual(registry.parse(registry.text_of(stages)), stages)
    pool = registry.parse('average_pool:stride=3')
    self.assertEqual(registry.text_of(pool), 'average_pool:stride=3')

  @parameterized.parameters(
    ('tomee', r"--token_reducer=tomee: 'tomee' is no token reducer; allowed"),
    ('tome:ratio=2', "cannot read 'ratio=2'; tome has the fields .'budget'"),
    ('tome:r=many', 'r=many; a whole number is needed'),
    ('tome:r=-1', 'r=-1, .*r=0 merges nothing'),
    ('random:budget=0', 'budget=0.0; a share of the tokens.*Budget'),
    ('random:budget=1.5', 'budget=1.5; a share of the tokens'),
    ('sparsevlm:keep=3/x', 'keep=3/x; .*needed'),
  )
  def test_messages(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      registry.parse(text)


if __name__ == '__main__':
  absltest.main()

"""Tests of experiments.recipe."""

from absl.testing import absltest, parameterized

from experiments import recipe
from jaxq.quant import schemes, transform


def methods(built):
  return [m['method'] for m in built.description['methods']]


class RecipeTest(parameterized.TestCase):
  @parameterized.parameters(
    ((), 'W4A16', ['rtn']),
    ((), 'W8A8', ['rtn', 'activations']),
    (('smoothquant',), 'W8A8', ['smoothquant', 'rtn', 'activations']),
    (('rotate', 'gptq'), 'W4A4', ['rotate', 'gptq', 'activations']),
    (('activations', 'gptq'), 'W8A8', ['activations', 'gptq']),
    ((), 'W16A8', ['activations']),
    # They quantize inputs themselves.
    (('os_plus',), 'W8A8_STATIC', ['os_plus']),
    (('os_plus', 'gptq'), 'W8A8', ['os_plus', 'gptq']),
    (('outliertune',), 'W8A8', ['outliertune']),
    (('ptq161',), 'W1A16', ['ptq161']),
    (('rotate', 'ptq161'), 'W1A16', ['rotate', 'ptq161']),
    (('llm_fp4',), 'W4A4', ['llm_fp4']),
    (('llm_fp4', 'gptq'), 'W4A8', ['llm_fp4', 'gptq']),
    (('mergequant',), 'W4A4', ['mergequant']),
    (('rotate', 'mergequant'), 'W4A4', ['rotate', 'mergequant']),
    (('quant_experts',), 'W4A6', ['quant_experts']),
    (('quant_experts',), 'W3A16', ['quant_experts']),
    (
      ('smoothquant', 'quant_experts'),
      'W4A8',
      ['smoothquant', 'quant_experts'],
    ),
  )
  def test_the_chain_is_completed_by_the_scheme(self, given, scheme, expected):
    built = recipe.build(given, schemes.parse(scheme, group_size=-1), ())
    self.assertEqual(methods(built), expected)
    self.assertNotEmpty(transform.stages(built.transform))

  def test_settings_reach_the_config_with_its_types(self):
    built = recipe.build(
      ['gptq'],
      schemes.parse('W4A16'),
      ['gptq.damping=0.1', 'act_order=false', 'gptq.search=mse'],
    )
    config = built.description['methods'][0]
    self.assertEqual(config['damping'], 0.1)
    self.assertIs(config['act_order'], False)
    self.assertEqual(config['search']['kind'], 'mse')
    self.assertEqual(config['weights']['dtype'], 'int4')

  @parameterized.parameters(
    (('gtpq',), 'W4A16', (), r"--method=gtpq.*'gptq'"),
    (('gptq',), 'W4A16', ('damp=1',), r"has no such field.*'damping'"),
    (('gptq',), 'W4A16', ('gptq.damping=x',), 'a float is needed'),
    (('gptq',), 'W4A16', ('gptq.act_order=1',), 'a bool is needed'),
    (('gptq',), 'W4A16', ('awq.grid=3',), r'method of this run.*gptq'),
    (('gptq',), 'W4A16', ('damping',), r'method\.field=value'),
    (('gptq',), 'W16A8', (), r'--method=gptq quantizes weights.*W16A8'),
    (('activations',), 'W4A16', (), r'activations quantizes inputs'),
    ((), 'W16A16', (), 'changes nothing'),
  )
  def test_messages(self, given, scheme, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      recipe.build(given, schemes.parse(scheme), settings)


if __name__ == '__main__':
  absltest.main()

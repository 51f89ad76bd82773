"""Tests of gpu_kernels: cases, floors and the page, without a GPU."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import gpu_kernels
from experiments import results
from pallas_kernels.quantized_matmul import arg_specs as quantized_specs
from pallas_kernels.weight_only_matmul import arg_specs as weight_only_specs

DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs'
INFO = results.RunInfo(
  jax='0.12', python='3.13', device='H100 x 1', commit='abc', command='run'
)


def row(name, **times):
  metrics = [
    results.Metric(name=k, value=v, unit='us') for k, v in times.items()
  ]
  return results.Row(name=name, metrics=tuple(metrics))


def weight_only(**changed):
  fields = {'name': 'w', 'M': 2, 'K': 256, 'N': 128, 'bits': 4, **changed}
  return gpu_kernels.weight_only_case(weight_only_specs.ArgSpec(**fields))


class CasesTest(parameterized.TestCase):
  def test_floor_worked_by_hand(self):
    case = weight_only(group_size=64)
    # Codes, four scales of two bytes a column, x and y.
    moved = 256 * 128 // 2 + 4 * 128 * 2 + 2 * 2 * (256 + 128)
    self.assertEqual(case.nbytes, moved)
    self.assertAlmostEqual(case.floor_us(1e9), moved / 1e3)
    many = weight_only(M=10**6)
    self.assertAlmostEqual(many.floor_us(1e30), 2e6 * 256 * 128 * 1e6 / 989e12)

  @parameterized.parameters((4, 64, False), (8, -1, True))
  def test_forms_are_one_product(self, bits, group_size, symmetric):
    case = weight_only(bits=bits, group_size=group_size, symmetric=symmetric)
    self.assert_right(case, ('chosen', 'xla'))

  @parameterized.parameters(
    ('int8', 8, -1, ('chosen', 'float', 'xla chain')),
    ('int8', 4, -1, ('chosen', 'float', 'xla chain', 'weight only')),
    ('int8', 4, 128, ('chosen', 'float', 'weight only')),
  )
  def test_quantized_forms_are_one_product(self, x_format, bits, group, names):
    spec = quantized_specs.ArgSpec(
      name='q',
      M=2,
      K=128,
      N=128,
      x_format=x_format,
      bits=bits,
      group_size=group,
    )
    case = gpu_kernels.quantized_case(spec)
    self.assertIn(gpu_kernels.KERNEL, case.forms)
    self.assert_right(case, names, 0.02)

  @parameterized.parameters('norm/llama3_8b_m16', 'hadamard/llama3_8b_o_h128')
  def test_forms_of_rows_give_one_value(self, name):
    case = next(gpu_kernels.cases(name))
    self.assertGreater(case.floor_us(3e12), 0)
    self.assertIn(gpu_kernels.KERNEL, case.forms)
    names = [form for form in case.forms if form != gpu_kernels.KERNEL]
    # The peer rounds to bfloat16 before it rounds to codes.
    self.assert_right(case, names, 0.01)

  def test_groups_of_many_rows_have_no_kernel(self):
    names = {
      case.name: gpu_kernels.KERNEL in case.forms
      for case in gpu_kernels.cases('quantized/llama3_8b_o_w4a8')
    }
    self.assertTrue(names['quantized/llama3_8b_o_w4a8g128_m16'])
    self.assertFalse(names['quantized/llama3_8b_o_w4a8g128_m256'])
    self.assertTrue(names['quantized/llama3_8b_o_w4a8_m2048'])

  def assert_right(self, case, names, error=gpu_kernels.MOST_ERROR):
    forms = {name: case.forms[name] for name in names}
    forms['reference'] = case.reference

    @jax.jit
    def run(key_x, key_w):
      x = jax.random.normal(key_x, (case.M, case.K), jnp.bfloat16)
      w = case.draw(key_w)
      return {name: case.values(form(x, w)) for name, form in forms.items()}

    found = run(jax.random.key(1), jax.random.key(2))
    want = np.asarray(found.pop('reference'), np.float32)
    for y in found.values():
      y = np.asarray(y, np.float32)
      self.assertLess(np.linalg.norm(y - want), error * np.linalg.norm(want))

  def test_names(self):
    names = [c.name for c in gpu_kernels.cases('llama3_70b_up_w')]
    self.assertIn('weight_only/llama3_70b_up_w4g128_m16', names)
    self.assertIn('quantized/llama3_70b_up_w8a8_m2048', names)
    self.assertIn('quantized/llama3_70b_up_w4a4_m16', names)
    self.assertNotIn('weight_only/llama3_70b_up_w1g128_m16', names)


class PageTest(absltest.TestCase):
  def test_says_that_nothing_was_measured(self):
    self.assertIn('**Not measured yet.**', gpu_kernels.page(None))

  def test_table(self):
    copy = results.Row(
      name='copy', metrics=(results.Metric(name='TB/s', value=2.9),)
    )
    rows = (
      copy,
      row('weight_only/a', chosen=44.2),
      row('quantized/b', bf16=3),
      row('hadamard/c', chosen=9.1),
    )
    text = gpu_kernels.page(results.Result(run=INFO, rows=rows))
    self.assertIn('H100 x 1, JAX 0.12, commit abc', text)
    self.assertIn('2.90 TB/s', text)
    self.assertRegex(text, r'(?s)weight_only_matmul.*44.2.*quantized_matmul')
    self.assertRegex(text, r'(?s)## hadamard_quantize.*9.1')
    self.assertNotIn('Not measured', text)

  def test_slow_choices(self):
    rows = (
      row('a', chosen=11.1, xla=10.0),
      row('b', chosen=10.9, xla=10.0, bf16=1.0),  # A peer is not ours.
      row('c', chosen=10.0, xla=float('nan')),
    )
    late = gpu_kernels.slow_choices(rows)
    self.assertEqual(late, ['a: chosen 11.1, best 10.0 us'])

  def test_stored_page_is_of_the_stored_figures(self):
    path = DOCS / 'gpu_kernels.json'
    stored = results.load(path) if path.exists() else None
    self.assertEqual(
      (DOCS / 'benchmarks.md').read_text('utf-8'), gpu_kernels.page(stored)
    )
    if stored is None:
      self.skipTest('no card has measured the kernels yet')
    self.assertEmpty(gpu_kernels.slow_choices(stored.rows))


if __name__ == '__main__':
  absltest.main()

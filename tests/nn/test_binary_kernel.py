"""Tests of jaxq.nn.binary_kernel: PTQ1.61's storage by the TPU kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import kernel_matmul, linear, matmul
from jaxq.numerics import binary
from jaxq.numerics import spec as spec_lib
from tests.numerics import test_binary

KERNEL = 'pallas_mosaic_tpu'


def data(K=336, k=72, N=40, bits=4):
  """x (2, 3, K) bfloat16 and a BinaryArray; no part fills a unit of rows."""
  w = binary.pack(**test_binary.parts(K=K, k=k, N=N, bits=bits))
  x = jax.random.normal(jax.random.key(0), (2, 3, K), jnp.bfloat16)
  return x, w


class BinaryKernelTest(parameterized.TestCase):
  @parameterized.parameters((4, 72), (2, 64), (8, 8), (4, 0))
  def test_equals_the_packed_path(self, bits, k):
    x, w = data(k=k, bits=bits)
    y = kernel_matmul.matmul(x, w, None, chip='v5e', interpret=True)
    want = matmul.matmul(x, w, implementation='float')
    self.assertEqual((y.shape, y.dtype), (want.shape, want.dtype))
    f32 = lambda a: np.asarray(a, np.float32)
    # Both sum in float32 and round to bfloat16 once.
    largest = np.abs(f32(want)).max()
    np.testing.assert_allclose(f32(y), f32(want), atol=2**-8 * largest)

  def test_choice_names_the_kernel_where_it_serves(self):
    x, w = data()
    self.assertEqual(kernel_matmul.choose(x, w, None), '')  # On a CPU.
    for chip in ('v5e', 'v5p', 'v6e', 'tpu7x'):
      self.assertEqual(kernel_matmul.choose(x, w, None, chip), KERNEL)
    wide = x.astype(jnp.float32)
    self.assertEqual(kernel_matmul.choose(wide, w, None, 'v5e'), '')
    self.assertEqual(kernel_matmul.choose(x, data(bits=3)[1], None, 'v5e'), '')

  def test_no_weight_is_unpacked_outside_the_kernels(self):
    x, w = data(K=1024, k=208, N=256)
    traced = jax.make_jaxpr(
      lambda x, w: kernel_matmul.matmul(x, w, None, chip='v5e')
    )(x[:1, :1], w)
    text = str(traced)
    self.assertEqual(text.count('name=weight_only_w1'), 1)
    self.assertEqual(text.count('name=weight_only_w4'), 1)
    # Whatever stands outside is as large as x or y, not as a part of the rows.
    self.assertLess(max(outer_sizes(traced.jaxpr)), 208 * 256 // 2)

  @parameterized.named_parameters(
    (
      'act',
      {},
      linear.ActQuant(
        None, None, spec_lib.QuantSpec(dtype='int8', granularity='token')
      ),
      'x is quantized; beside signs',
    ),
    ('bits', {'bits': 3}, None, r'salient rows have 3 bits; kernels take \[1,'),
    ('chip', {}, None, "chip is 'cpu'; it runs on"),
  )
  def test_messages(self, changed, act, message):
    x, w = data(**changed)
    with self.assertRaisesRegex(NotImplementedError, message):
      matmul.matmul(x, w, act, implementation='kernel')

  def test_stacked_matrices_are_refused(self):
    x, w = data()
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    with self.assertRaisesRegex(NotImplementedError, 'a BinaryArray of one'):
      kernel_matmul.matmul(x, stacked, None)


def outer_sizes(jaxpr):
  """Sizes of all arrays made in a jaxpr, those inside of kernels left out."""
  sizes = []
  for eqn in jaxpr.eqns:
    sizes += [v.aval.size for v in eqn.outvars]
    if eqn.primitive.name == 'pallas_call':
      continue
    for p in jax.tree.leaves(
      list(eqn.params.values()),
      is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr'),
    ):
      p = p.jaxpr if hasattr(p, 'jaxpr') else p
      if hasattr(p, 'eqns'):
        sizes += outer_sizes(p)
  return sizes


if __name__ == '__main__':
  absltest.main()

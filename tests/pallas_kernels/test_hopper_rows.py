"""Tests of norm_quantize and hadamard_quantize on Hopper, without a GPU.

They are lowered for CUDA and run in Pallas's GPU interpreter; times, and what
only a card can show, are benchmarks/gpu_kernels.py's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels.hadamard_quantize import api as hadamard_api
from pallas_kernels.norm_quantize import api as norm_api
from tests.pallas_kernels import test_hopper as hopper_testing

pytestmark = pytest.mark.smoke  # The newest JAX has what the oldest lacks.
KERNEL = hopper_testing.KERNEL
COPIES = 128


def same_codes(got, want):
  """Equal but for ties, where sums were added in another order."""
  differ = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32))
  assert differ.max() <= 1, differ.max()
  assert (differ > 0).mean() <= 1e-3, (differ > 0).mean()


def norm_options(K, *, bias, static, copies, **options):
  """Arguments of norm_quantize behind x and the weight."""
  if bias:
    options['bias'] = jnp.linspace(-0.2, 0.2, K)
  if static:
    options['scale'] = jnp.linspace(0.02, 0.05, static)
  if copies:
    gather = jnp.full((COPIES,), K).at[:3].set(jnp.array([7, 7, 0]))
    options['gather'] = gather
    options['offset'] = jnp.linspace(-0.4, 0.4, K + COPIES)
    options['narrow'] = False
  return options


def options_of(kind, x_format, bias, static, copies):
  return {
    'kind': kind,
    'x_format': x_format,
    'bias': bias,
    'static': static,
    'copies': copies,
  }


NORMS = (
  options_of('rms', 'int8', False, 0, False),
  options_of('layer', 'int4', True, 0, False),
  options_of('rms', 'float8_e4m3fn', False, 1, False),
  options_of('layer', 'int8', True, 256, True),
)


class NormQuantizeTest(parameterized.TestCase):
  @parameterized.parameters(*NORMS)
  def test_interpreted_equals_base(self, **options):
    hopper_testing.needs_mosaic_gpu(self)
    K = 256
    x = hopper_testing.rows_of_x(6, K).reshape(2, 3, K).at[0, 1].set(0.0)
    f = functools.partial(
      norm_api.norm_quantize,
      x,
      jnp.linspace(0.5, 1.5, K),
      **norm_options(K, **options),
    )
    codes, scale = f(interpret=True, **KERNEL)
    want, want_scale = f(implementation='xla')
    self.assertEqual((codes.shape, codes.dtype), (want.shape, want.dtype))
    same_codes(codes, want)
    if scale is None or want_scale is None:
      self.assertTrue(options['static'])
      self.assertIs(scale, want_scale)
    else:
      np.testing.assert_allclose(scale, want_scale, rtol=1e-6)

  @parameterized.product(options=NORMS, K=(256, 8192))
  def test_lowers_for_cuda(self, options, K):
    hopper_testing.needs_mosaic_gpu(self)
    if options['static'] > 1:
      options = {**options, 'static': K}
    f = functools.partial(
      norm_api.norm_quantize, **norm_options(K, **options), **KERNEL
    )
    x = jax.ShapeDtypeStruct((64, K), jnp.bfloat16)
    text = hopper_testing.lower(f, x, jnp.ones(K)).as_text()
    self.assertEqual(text.count('custom_call @mosaic_gpu'), 1)

  @parameterized.named_parameters(
    ('chip', {'chip': 'a100'}, "chip is 'a100'; it runs on"),
    ('K', {'K': 192}, 'K=192; it takes multiples of 128 up to 16384. Pad'),
    ('wide', {'K': 32768}, 'K=32768; it takes multiples of 128 up to 16384'),
    ('dtype', {'dtype': 'float16'}, 'x is float16; it takes bfloat16 or'),
    ('copies', {'copies': 8}, 'S=8 copies; it takes multiples of 128'),
  )
  def test_refusals(self, changed, message):
    hopper_testing.needs_mosaic_gpu(self)
    K = changed.get('K', 256)
    x = jnp.zeros((2, K), changed.get('dtype', 'bfloat16'))
    options = {**KERNEL, 'chip': changed.get('chip', 'h100')}
    if 'copies' in changed:
      gather = jnp.zeros(changed['copies'], int)
      options |= {'gather': gather, 'scale': jnp.ones(1)}
    with self.assertRaisesRegex(NotImplementedError, message):
      norm_api.norm_quantize(x, jnp.ones(K), **options)

  def test_choice(self):
    hopper_testing.needs_mosaic_gpu(self)
    x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
    self.assertEqual(norm_api.choose(x, 'h100'), 'pallas_mosaic_gpu')
    self.assertEqual(norm_api.choose(x, 'v6e'), 'pallas_mosaic_tpu')
    self.assertEqual(norm_api.choose(x, 'a100'), 'xla')
    self.assertEqual(norm_api.choose(x, 'h100', copies=8), 'xla')


class HadamardQuantizeTest(parameterized.TestCase):
  @parameterized.parameters(
    (1024, 64, 'int8'), (2048, 256, 'int4'), (9216, 128, 'float8_e4m3fn')
  )
  def test_interpreted_equals_base(self, K, h, x_format):
    """9216 are 72 runs: two tiles of 64, the second mostly padding."""
    hopper_testing.needs_mosaic_gpu(self)
    x = hopper_testing.rows_of_x(2, K)
    f = functools.partial(
      hadamard_api.hadamard_quantize, x, block=h, x_format=x_format
    )
    codes, scale = f(interpret=True, **KERNEL)
    want, want_scale = f(implementation='xla')
    self.assertEqual((codes.shape, codes.dtype), (want.shape, want.dtype))
    if x_format.startswith('float8'):  # A step of fp8 where rounding parts.
      codes, want = (a.astype(jnp.float32) for a in (codes, want))
      np.testing.assert_allclose(codes, want, rtol=0.13)
    else:
      same_codes(codes, want)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-4)

  @parameterized.parameters((4096, 128), (14336, 2048), (16384, 16384))
  def test_lowers_for_cuda(self, K, h):
    hopper_testing.needs_mosaic_gpu(self)
    f = functools.partial(hadamard_api.hadamard_quantize, block=h, **KERNEL)
    x = jax.ShapeDtypeStruct((2048, K), jnp.bfloat16)
    text = hopper_testing.lower(f, x).as_text()
    self.assertEqual(text.count('custom_call @mosaic_gpu'), 1)

  @parameterized.named_parameters(
    ('chip', {'chip': 'a100'}, "chip is 'a100'; it runs on"),
    ('K', {'K': 1536}, 'K=1536; it takes multiples of 1024 up to 16384. Pad'),
    ('dtype', {'dtype': 'float32'}, 'x is float32; it takes bfloat16. Cast'),
  )
  def test_refusals(self, changed, message):
    hopper_testing.needs_mosaic_gpu(self)
    x = jnp.zeros((2, changed.get('K', 1024)), changed.get('dtype', 'bfloat16'))
    options = {**KERNEL, 'chip': changed.get('chip', 'h100')}
    with self.assertRaisesRegex(NotImplementedError, message):
      hadamard_api.hadamard_quantize(x, block=64, **options)

  def test_choice(self):
    hopper_testing.needs_mosaic_gpu(self)
    x = jax.ShapeDtypeStruct((4, 1024), jnp.bfloat16)
    self.assertEqual(hadamard_api.choose(x, 64, 'h200'), 'pallas_mosaic_gpu')
    self.assertEqual(hadamard_api.choose(x, 64, 'a100'), 'xla')


if __name__ == '__main__':
  absltest.main()

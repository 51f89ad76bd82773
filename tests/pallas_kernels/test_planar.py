"""Tests of pallas_kernels.planar: the layout, and every code in every field."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.numerics import packing
from pallas_kernels import planar

# bits, K, group_size, signed; tiles smaller, equal and larger than fields.
LAYOUTS = (
  (4, 256, -1, True),
  (4, 256, 64, False),
  (4, 128, 32, True),
  (4, 192, -1, True),
  (2, 256, -1, True),
  (2, 256, 32, False),
  (1, 512, -1, False),
  (1, 256, 32, False),
  (8, 128, 64, True),
  (8, 128, -1, False),
)


def codes_of(layout, N=128):
  """Unsigned codes (K, N): all of them in every row within 2^b columns."""
  rows = jnp.arange(layout.K)[:, None] * 7 + jnp.arange(N)[None]
  return (rows % 2**layout.bits).astype(jnp.uint8)


def stored(layout, codes):
  if layout.bits == 8:
    return codes.astype(jnp.int8) if layout.signed else codes
  return packing.pack(codes, layout.bits, layout.tile)


def values_of(layout, codes):
  """What the unsigned codes stand for, as int32."""
  u = codes.astype(jnp.int32)
  if layout.bits == 1:
    return 2 * u - 1
  half = 2 ** (layout.bits - 1)
  return (u ^ half) - half if layout.signed else u


class PlanarTest(parameterized.TestCase):
  def test_units_worked_by_hand(self):
    unit = lambda bits, K, G=-1: (
      planar.Planar(bits=bits, K=K, group_size=G).unit
    )
    self.assertEqual(unit(4, 4096), 128)
    self.assertEqual(unit(4, 4096, 64), 128)
    self.assertEqual(unit(4, 576), 64)  # 9 tiles of 64.
    self.assertEqual(unit(2, 4096, 32), 128)
    self.assertEqual(unit(1, 4096), 256)  # 32 byte rows are 256 signs.
    self.assertEqual(unit(8, 96), 32)
    self.assertEqual(unit(4, 96), 0)  # Tiles of 32 never fill a register.
    self.assertEqual(planar.Planar(bits=1, K=512, group_size=64).fields, 8)

  @parameterized.parameters(*LAYOUTS)
  def test_unpack_is_that_of_numerics(self, bits, K, group_size, signed):
    layout = planar.Planar(bits=bits, K=K, group_size=group_size, signed=signed)
    codes = codes_of(layout)
    got = planar.unpack(stored(layout, codes), layout)
    np.testing.assert_array_equal(got, values_of(layout, codes))
    self.assertEqual(layout.tile, packing.tile_rows(K, group_size))

  @parameterized.parameters(*LAYOUTS)
  def test_every_way_to_unpack(self, bits, K, group_size, signed):
    layout = planar.Planar(bits=bits, K=K, group_size=group_size, signed=signed)
    codes = codes_of(layout)
    packed = stored(layout, codes)
    values = np.asarray(values_of(layout, codes), np.float32)
    U, rows = layout.unit, layout.unit // layout.fields
    order = planar.reorder(jnp.arange(K)[None], layout, 'words')[0]
    natural = planar.reorder(jnp.arange(K)[None], layout, 'native')[0]
    for u in range(K // U):
      unit = packed[u * rows : (u + 1) * rows]
      of = slice(u * U, (u + 1) * U)
      if bits < 8:
        words = jax.jit(planar.unpack_words, static_argnums=1)(unit, layout)
        got = words.astype(jnp.float32) - layout.offset('words')
        got = 2 * got if bits == 1 else got
        np.testing.assert_array_equal(got, values[order[of]])
      if bits > 1:
        native = jax.jit(planar.unpack_native, static_argnums=1)(unit, layout)
        got = native.astype(jnp.float32) - layout.offset('native')
        np.testing.assert_array_equal(got, values[natural[of]])
      got = jax.jit(planar.unpack_rows, static_argnums=1)(unit, layout)
      offset = planar.offset_int8(layout)
      np.testing.assert_array_equal(got - offset, values[of])

  @parameterized.parameters((4, 256, -1), (4, 256, 128), (4, 128, 64), (8, 64))
  def test_unpack_int8(self, bits, K, group_size=-1):
    layout = planar.Planar(bits=bits, K=K, group_size=group_size)
    codes = codes_of(layout)
    self.assertTrue(planar.fields_fill_registers(layout))
    got = jax.jit(planar.unpack_int8, static_argnums=1)(
      stored(layout, codes), layout
    )
    np.testing.assert_array_equal(
      got, planar.unpack(got, layout) if bits == 8 else values_of(layout, codes)
    )

  @parameterized.parameters((4, 32), (2, 64), (1, 128), (8, 32), (4, 128))
  def test_masks_are_the_groups_of_a_unit(self, bits, group_size):
    layout = planar.Planar(bits=bits, K=512, group_size=group_size)
    for form in planar.FORMS:
      rows = planar.reorder(jnp.arange(512)[None], layout, form)[0]
      masks = planar.group_masks(layout, form)
      g = layout.groups_of_unit
      self.assertEqual(masks.shape, (g, layout.unit))
      for i in range(g):
        np.testing.assert_array_equal(
          masks[i], rows[: layout.unit] // group_size == i
        )


if __name__ == '__main__':
  absltest.main()

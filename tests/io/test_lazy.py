"""Tests of jaxq.io.lazy: the same values, read where they are indexed."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import lazy

X = np.arange(24, dtype=np.float32).reshape(4, 6)


def recorded(array):
  """The array as a lazy one, and the list of what was read of it."""
  reads = []

  def read(index):
    reads.append(tuple((s.start, s.stop) for s in index))
    return array[index]

  made = lazy.LazyArray(shape=array.shape, dtype=array.dtype, read=read)
  return made, reads


class LazyArrayTest(parameterized.TestCase):
  def test_reads_nothing_until_it_is_indexed(self):
    made, reads = recorded(X)
    whole = lazy.stack([lazy.transpose(lazy.astype(made, np.float16))] * 2)
    self.assertEqual((whole.shape, whole.dtype), ((2, 6, 4), np.float16))
    self.assertEqual((whole.ndim, whole.size, whole.nbytes), (3, 48, 96))
    self.assertEmpty(reads)

  @parameterized.parameters(
    (np.s_[1:3],),
    (np.s_[:, 2:5],),
    (np.s_[1:3, 2:5],),
    (np.s_[:, -2:],),
    (np.s_[3:1],),
    ((),),
  )
  def test_an_index_gives_what_numpy_gives(self, index):
    made, _ = recorded(X)
    np.testing.assert_array_equal(made[index], X[index])

  def test_all_of_it_as_numpy(self):
    made, _ = recorded(X)
    np.testing.assert_array_equal(np.asarray(made), X)
    self.assertEqual(np.asarray(made, np.float64).dtype, np.float64)

  def test_stack_reads_only_the_chosen_rows_of_the_chosen_arrays(self):
    made, reads = zip(*(recorded(X + i) for i in range(3)), strict=True)
    part = lazy.stack(made)[1:3, 0:2, 4:6]
    np.testing.assert_array_equal(part, np.stack([X + 1, X + 2])[:, :2, 4:])
    self.assertEqual([*reads], [[], *[[((0, 2), (4, 6))]] * 2])

  def test_transpose_and_astype_read_the_same_part(self):
    made, reads = recorded(X)
    part = lazy.astype(lazy.transpose(made), np.float16)[4:6, 0:2]
    np.testing.assert_array_equal(part, X.T[4:6, 0:2].astype(np.float16))
    self.assertTrue(part.flags.c_contiguous)
    self.assertEqual(reads, [((0, 2), (4, 6))])

  @parameterized.parameters((np.s_[0],), (np.s_[::2],), (np.s_[:, :, :],))
  def test_other_indices_are_refused(self, index):
    made, _ = recorded(X)
    with self.assertRaisesRegex(TypeError, r'\(4, 6\).*slices without a step'):
      made[index]


if __name__ == '__main__':
  absltest.main()

"""Hadamard matrices and the orthonormal transform x @ H / sqrt(n).

A Hadamard matrix spreads an outlier evenly over all channels, so that a grid
fits the rotated values better (QuaRot, Ashkboos et al., 2024, arXiv
2404.00456). Sizes: n = k * 2^m with k in ORDERS, and all powers of two; H =
H_k (x) S_{2^m}, S Sylvester's. H H^T = n I; H is symmetric only at powers of
two, so undo with inverse=True.

H_k is constructed, not tabulated:
  Paley I (q = 3 mod 4)    12, 20, 28 (GF(27)), 60, 108, 140
  Paley II (q = 1 mod 4)   36 (q = 17), 52 (GF(25))
  Kronecker                40 = 2 * 20
  Goethals-Seidel array    172 from Williamson sequences of order 43; 156 from
    those of order 13 by a Baumert-Hall array of order 12 (156 = 12 * 13)

The transform reshapes n into k and factors of at most 128, one small matmul
each: cost n * (k + 128 * ceil(m / 7)), in blocks a matrix unit likes, against
n^2. Each factor is applied in float32.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

ORDERS = (12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172)

_MAX_FACTOR = 128  # Widest Sylvester matmul: the edge of a TPU's matrix unit.
_PALEY_I = {k: k - 1 for k in (12, 20, 28, 60, 108, 140)}
_PALEY_II = {36: 17, 52: 25}
# First rows of symmetric circulants A, B, C, D with A^2 + B^2 + C^2 + D^2 =
# 4 n I (Williamson sequences), found by exhaustive search.
_WILLIAMSON_13 = (
  '+-+++-++-+++-',
  '+-++------++-',
  '+-++------++-',
  '++---+--+---+',
)
_WILLIAMSON_43 = (
  '+---++--++++-+-+++-++--++-+++-+-++++--++---',
  '++---++++-+--+--++--------++--+--+-++++---+',
  '+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++',
  '++-++++++----+-+--++-++-++--+-+----++++++-+',
)
# q: (p, c) with GF(q) = GF(p)[x] / (x^d - c_0 - c_1 x - ...).
_EXTENSIONS = {25: (5, (2, 0)), 27: (3, (2, 1, 0))}


def supported(n: int) -> bool:
  """Whether `matrix` and `transform` have size n."""
  return _split(n) is not None


def matrix(n: int) -> np.ndarray:
  """H (n, n) float32 of +-1 with H H^T = n I.

  Raises:
    ValueError: no such size.
  """
  k, power = _checked_split(n)
  return np.kron(_base(k), _sylvester(power)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=('axis', 'inverse'))
def transform(
  x: jax.Array, axis: int = -1, *, inverse: bool = False
) -> jax.Array:
  """x @ H / sqrt(n) along `axis`, of x's shape and dtype.

  Args:
    x: floating; n = x.shape[axis].
    axis: axis to transform.
    inverse: apply H^T / sqrt(n) instead.

  Raises:
    ValueError: no Hadamard matrix of size n here.
  """
  n = x.shape[axis]
  k, power = _checked_split(n)
  widths = [_MAX_FACTOR] * ((power.bit_length() - 1) // 7)
  widths.append(power // _MAX_FACTOR ** len(widths))
  factors = [_base(k)] + [_sylvester(width) for width in widths]
  factors = [f for f in factors if len(f) > 1]

  y = jnp.moveaxis(x, axis, -1)
  lead = y.shape[:-1]
  y = y.astype(jnp.float32).reshape(-1, *(len(f) for f in factors))
  for i, f in enumerate(factors):
    f = jnp.asarray(f.T if inverse else f, jnp.float32)
    # Highest: +-1 is exact in bfloat16, the values would not be.
    y = jnp.tensordot(y, f, axes=(i + 1, 0), precision='highest')
    y = jnp.moveaxis(y, -1, i + 1)
  y = y.reshape(*lead, n) * float(1 / np.sqrt(n))
  return jnp.moveaxis(y, -1, axis).astype(x.dtype)


def signs(n: int, key: jax.Array) -> jax.Array:
  """n random signs, float32: the D of the randomised Hadamard D H / sqrt(n)."""
  return jax.random.rademacher(key, (n,), jnp.float32)


def random_orthogonal(n: int, key: jax.Array) -> jax.Array:
  """D H / sqrt(n) (n, n) float32: orthogonal, D random signs on the diagonal.

  x @ random_orthogonal(n, key) equals transform(x * signs(n, key)).
  """
  H = jnp.asarray(matrix(n) / np.sqrt(np.float32(n)))
  return signs(n, key)[:, None] * H


def _split(n):
  """n = k * 2^m -> (k, 2^m), k the smallest in (1,) + ORDERS; else None."""
  for k in (1,) + ORDERS:
    power, rest = divmod(n, k)
    if n > 0 and rest == 0 and power & (power - 1) == 0:
      return k, power
  return None


def _checked_split(n):
  split = _split(n)
  if split is None:
    raise ValueError(
      f'hadamard: n={n}; allowed are powers of two, and powers of two times '
      f'{list(ORDERS)}. Pad to such a size, or rotate blocks of one that '
      'divides n.'
    )
  return split


@functools.cache
def _sylvester(n):
  H = np.ones((1, 1), np.int8)
  while len(H) < n:
    H = np.kron(np.array([[1, 1], [1, -1]], np.int8), H)
  return H


@functools.cache
def _base(k):
  """H_k (k, k) int8 for k in ORDERS, or 1."""
  if k == 1:
    return np.ones((1, 1), np.int8)
  if k in _PALEY_I:
    return _paley_i(_PALEY_I[k])
  if k in _PALEY_II:
    return _paley_ii(_PALEY_II[k])
  if k == 40:
    return np.kron(_sylvester(2), _base(20))
  if k == 156:
    return _goethals_seidel(_cooper_wallis(_rows(_WILLIAMSON_13)))
  return _goethals_seidel(_rows(_WILLIAMSON_43))


def _paley_i(q):
  """I + S, S skew with S S^T = q I; order q + 1."""
  S = np.ones((q + 1, q + 1), np.int8)
  S[1:, 0] = -1
  S[1:, 1:] = _jacobsthal(q)
  S[0, 0] = 0
  return S + np.eye(q + 1, dtype=np.int8)


def _paley_ii(q):
  """C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1], C symmetric conference matrix."""
  C = np.ones((q + 1, q + 1), np.int8)
  C[1:, 1:] = _jacobsthal(q)
  C[0, 0] = 0
  eye = np.eye(q + 1, dtype=np.int8)
  plus = np.array([[1, 1], [1, -1]], np.int8)
  return np.kron(C, plus) + np.kron(eye, np.array([[1, -1], [-1, -1]], np.int8))


def _jacobsthal(q):
  """Q[a, b] = quadratic character of a - b in GF(q), (q, q) int8."""
  prime, reduction = _EXTENSIONS.get(q, (q, (0,)))
  degree = len(reduction)
  elements = list(itertools.product(range(prime), repeat=degree))

  def square(a):
    product = [0] * (2 * degree - 1)
    for i, j in itertools.product(range(degree), repeat=2):
      product[i + j] += a[i] * a[j]
    for i in range(2 * degree - 2, degree - 1, -1):
      for j in range(degree):
        product[i - degree + j] += product[i] * reduction[j]
    return tuple(c % prime for c in product[:degree])

  zero = (0,) * degree
  squares = {square(a) for a in elements} - {zero}
  character = {a: 1 if a in squares else -1 for a in elements}
  character[zero] = 0

  def minus(a, b):
    return tuple((u - v) % prime for u, v in zip(a, b, strict=True))

  return np.array(
    [[character[minus(a, b)] for b in elements] for a in elements], np.int8
  )


def _rows(strings):
  return np.array(
    [[1 if c == '+' else -1 for c in s] for s in strings], np.int8
  )


def _cooper_wallis(rows):
  """Four Williamson sequences of order n -> four sequences of order 3n.

  They run over Z_3 x Z_n (3 and n coprime); the T-matrices I, P, P^2, 0 of
  order 3 choose which of +-A, B, C, D stands in each third.
  """
  a, b, c, d = rows
  thirds = [(a, b, c), (-b, a, d), (-c, -d, a), (-d, c, -b)]
  n = len(a)
  return np.array([[t[i % 3][i % n] for i in range(3 * n)] for t in thirds])


def _goethals_seidel(rows):
  """Hadamard matrix of order 4n from four circulants, not nec. symmetric."""
  n = rows.shape[1]
  shift = (np.arange(n)[None, :] - np.arange(n)[:, None]) % n
  A, B, C, D = (row[shift] for row in rows)
  B_r, C_r, D_r = (m[:, ::-1] for m in (B, C, D))
  Bt_r, Ct_r, Dt_r = (m.T[:, ::-1] for m in (B, C, D))
  return np.block(
    [
      [A, B_r, C_r, D_r],
      [-B_r, A, Dt_r, -Ct_r],
      [-C_r, -Dt_r, A, Bt_r],
      [-D_r, Ct_r, -Bt_r, A],
    ]
  ).astype(np.int8)

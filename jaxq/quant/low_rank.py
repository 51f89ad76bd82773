"""Low-rank terms A B that make up for the rounding of kernels.

  start   the least tr((E - A B)^T H (E - A B)) of the error E = W - Q: with H =
          D D^T, the first singular vectors of D^T E ("whitened")
  then    AdamW on the output of a branch of the block, beside the float one

'keep' leaves W ~ Q + A B, in bfloat16: two thin matmuls at run time. 'merge'
adds the term to what was rounded and rounds again, to the same steps: nothing
remains at run time. There the gradient goes straight through the rounding, and
B starts at zero: with E itself added, most codes move and the error is several
times larger, from which training does not come back.

What is rounded again is W where Q is within half a step of it, and the nearest
value that rounds to Q elsewhere (GPTQ's codes are not those nearest to W).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxq.nn import linear
from jaxq.numerics import cholesky, qarray

Kernels = Mapping[str, jax.Array]
Terms = dict[str, linear.LowRank]
DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # Of the mean diagonal, tried in order.
_TINY = 1e-10
_HIGHEST = lax.Precision.HIGHEST
_RANGES = {
  'rank': (0, 1 << 20),
  'epochs': (0, 1 << 20),
  'learning_rate': (0.0, 1.0),
  'sample_sequences': (1, 1 << 20),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig:
  """Attributes.

  rank: of A B; 0 is none.
  compensate: 'merge' or 'keep'.
  epochs, learning_rate: of the training.
  sample_sequences: which it is done on, one at a time.
  """

  rank: int = 32
  compensate: str = 'merge'
  epochs: int = 3
  learning_rate: float = 1e-3
  sample_sequences: int = 16

  def __post_init__(self):
    if self.compensate not in ('keep', 'merge'):
      raise ValueError(
        f'LowRankConfig: compensate={self.compensate!r}; allowed '
        "['keep', 'merge']. Use one of them."
      )
    for name, (least, largest) in _RANGES.items():
      if not least <= getattr(self, name) <= largest:
        raise ValueError(
          f'LowRankConfig: {name}={getattr(self, name)}; allowed {least} to '
          f'{largest}. The default is '
          f'{LowRankConfig.__dataclass_fields__[name].default}.'
        )


class Branch(NamedTuple):
  """A part of a block whose output is compared.

  paths: of the linears in it.
  run: ({path: kernel}, x (B, T, K)) -> its output.
  sample: (S, T, K), what it is trained on.
  """

  paths: tuple[str, ...]
  run: Callable[[Kernels, jax.Array], jax.Array]
  sample: jax.Array


def compensate(
  kernels: Kernels,
  rounded: Mapping[str, qarray.QArray],
  hessians: Mapping[str, jax.Array],
  branches: Sequence[Branch],
  config: LowRankConfig,
) -> Terms:
  """{path: term}: zero, as it starts or as trained, whichever errs least.

  Linears of no branch are compared by tr(E^T H E), over all their inputs.

  Args:
    kernels: {path: (K, N)} float.
    rounded: what became of them.
    hessians: {path: (K, K)} of their inputs.
    branches: disjoint.
    config: static.

  Raises:
    ValueError: the rank is above K or N of a kernel.
  """
  start: Terms = {}
  for path, w in kernels.items():
    error = w - qarray.dequantize(rounded[path])
    term = fit(error, hessians[path], config.rank)
    if config.compensate == 'merge':
      term = linear.LowRank(term.a, jnp.zeros_like(term.b))
    start[path] = term

  def effective(terms):
    return {
      path: _effective(kernels[path], rounded[path], term, config)
      for path, term in terms.items()
    }

  done: Terms = {}
  for branch in branches:

    def loss(terms, x, branch=branch):
      exact = {path: kernels[path] for path in branch.paths}
      y = branch.run(effective(terms), x)
      return jnp.mean(jnp.square(y - branch.run(exact, x)))

    mine = {path: start[path] for path in branch.paths}
    done |= train(loss, mine, branch.sample, config)
  for path in sorted(set(kernels) - set(done)):

    def own_loss(terms, x, path=path):
      del x
      error = effective(terms)[path] - kernels[path]
      weighted = jnp.matmul(hessians[path], error, precision=_HIGHEST)
      return jnp.sum(error * weighted)

    nothing = jnp.zeros((config.sample_sequences, 1))
    done |= train(own_loss, {path: start[path]}, nothing, config)
  return done


def fit(error: jax.Array, hessian: jax.Array, rank: int) -> linear.LowRank:
  """A B of the given rank with the least tr((error - A B)^T H (error - A B)).

  Args:
    error: (K, N).
    hessian: (K, K).
    rank: static.

  Raises:
    ValueError: rank is above K or N.
  """
  return whitened_svd(error, whitening(hessian), rank)


def whitening(hessian: jax.Array) -> jax.Array:
  """D (K, K) float32, lower triangular: D D^T = hessian + damping.

  The damping is the first of DAMPINGS with which the factorization succeeds;
  NaN where none does. A hessian of zeros gives the identity.
  """
  hessian = hessian.astype(jnp.float32)
  identity = jnp.eye(hessian.shape[0], dtype=jnp.float32)
  mean = jnp.mean(jnp.diagonal(hessian))
  mean = jnp.where(mean == 0, 1.0 / DAMPINGS[0], mean)

  def attempt(state):
    tries, _ = state
    damping = jnp.array(DAMPINGS, jnp.float32)[tries] * mean
    return tries + 1, cholesky.cholesky(hessian + damping * identity)

  def unsolved(state):
    tries, lower = state
    return (tries < len(DAMPINGS)) & ~jnp.all(jnp.isfinite(lower))

  start = jnp.zeros((), jnp.int32), jnp.full_like(hessian, jnp.nan)
  _, lower = lax.while_loop(unsolved, attempt, start)
  return jnp.where(jnp.all(jnp.isfinite(lower)), lower, jnp.nan)


def whitened_svd(
  error: jax.Array, factor: jax.Array, rank: int
) -> linear.LowRank:
  """A B of the given rank with the least |D^T (error - A B)|.

  It is D^-T U U^T D^T error = error V V^T with the first singular vectors U, V
  of D^T error: of the two the smaller eigenproblem is solved.

  Args:
    error: (K, N).
    factor: D (K, K), lower triangular, or the diagonal (K,) of one; positive.
    rank: static.

  Raises:
    ValueError: rank is above K or N.
  """
  if rank > min(error.shape):
    raise ValueError(
      f'low_rank: rank={rank} is larger than a layer of shape '
      f'{error.shape}; at most {min(error.shape)} is allowed. Lower rank.'
    )
  diagonal = factor.ndim == 1
  weighted = (
    factor[:, None] * error
    if diagonal
    else jnp.matmul(factor.T, error, precision=_HIGHEST)
  )  # (K, N)
  if error.shape[0] <= error.shape[1]:
    top = _top(jnp.matmul(weighted, weighted.T, precision=_HIGHEST), rank)
    b = jnp.matmul(top.T, weighted, precision=_HIGHEST)
    a = (
      top / factor[:, None]
      if diagonal
      else jax.scipy.linalg.solve_triangular(factor.T, top, lower=False)
    )
  else:
    top = _top(jnp.matmul(weighted.T, weighted, precision=_HIGHEST), rank)
    a, b = jnp.matmul(error, top, precision=_HIGHEST), top.T
  norm_a = jnp.linalg.norm(a, axis=0) + _TINY
  ratio = jnp.sqrt((jnp.linalg.norm(b, axis=1) + _TINY) / norm_a)
  return linear.LowRank(a * ratio[None], b / ratio[:, None])


def merge(
  w: jax.Array, q: qarray.QArray, term: linear.LowRank
) -> qarray.QArray:
  """w (K, N) with the term, rounded to the steps of q."""
  return qarray.quantize(
    _latent(w, q) + jnp.matmul(term.a, term.b, precision=_HIGHEST),
    q.spec,
    scale=qarray.effective_scale(q),
    zero_point=q.zero_point,
  )


def _top(gram: jax.Array, rank: int) -> jax.Array:
  """The eigenvectors (n, rank) of the largest eigenvalues of gram (n, n)."""
  _, vectors = jnp.linalg.eigh(gram)
  return vectors[:, ::-1][:, :rank]


def _effective(w, q, term, config) -> jax.Array:
  """What a kernel is with a term (K, N)."""
  product = jnp.matmul(term.a, term.b, precision=_HIGHEST)
  if config.compensate == 'keep':
    return qarray.dequantize(q) + product
  return qarray.fake_quant(
    _latent(w, q) + product,
    q.spec,
    scale=qarray.effective_scale(q),
    zero_point=q.zero_point,
    ste=True,
  )


def _latent(w: jax.Array, q: qarray.QArray) -> jax.Array:
  """What q is the rounding of, as near to w as that can be."""
  half = 0.49 * qarray.effective_scale(q)
  base = qarray.dequantize(q)
  return base + jnp.clip(w - base, -half, half)


def train(
  loss: Callable[[Any, Any], jax.Array],
  start: Any,
  samples: Any,
  config: LowRankConfig,
) -> Any:
  """AdamW, one sample at a time; of zero, `start` and trained what errs least.

  Args:
    loss: (terms, sample) -> (); a sample is of a batch of one.
    start: terms, a pytree of floats.
    samples: a pytree of arrays (S, ...).
    config: epochs and learning_rate.
  """
  optimizer = optax.adamw(config.learning_rate)

  def sample(i):
    return jax.tree.map(lambda x: x[i][None], samples)

  def step(carry, i):
    terms, state = carry
    gradient = jax.grad(loss)(terms, sample(i))
    with jax.numpy_dtype_promotion('standard'):  # Its powers need that.
      updates, state = optimizer.update(gradient, state, terms)
    return (optax.apply_updates(terms, updates), state), None

  indices = jnp.arange(jax.tree.leaves(samples)[0].shape[0])
  order = jnp.tile(indices, config.epochs)
  (trained, _), _ = lax.scan(step, (start, optimizer.init(start)), order)
  candidates = [jax.tree.map(jnp.zeros_like, start), start, trained]

  def total(terms):
    return jnp.sum(lax.map(lambda i: loss(terms, sample(i)), indices))

  losses = jnp.stack([total(terms) for terms in candidates])
  best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
  chosen: Any = jax.tree.map(lambda *a: jnp.stack(a)[best], *candidates)
  return chosen

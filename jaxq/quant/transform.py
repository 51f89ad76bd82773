"""Transform: the one shape of every post-training quantization method.

A method is a function of its hyper-parameters that returns a `Transform`: pure
functions closed over a config, in the manner of optax.

  observe(block) -> {tap path: {name: request}}   statistics it needs
  apply(block, params, quant, stats) -> (params, quant)
  outside(params) -> params                       embedding, final norm, head

A method that compares whole blocks says `streams`: its stats also hold
stats[STREAMS] = {'quantized': carry, 'float': carry}, what goes into the block
in the model so far and in the float model, all samples.

`apply` works on ONE block: `params` is the block's parameters, `quant` its
`quant` collection so far (online rotations, input quantizers), `stats[tap]
[name]` the finished observer states; `block` is static. It is jitted once for
all blocks.

`chain(a, b)` is a Transform that runs a, then observes and runs b: b's
statistics are those of the block that a left, exactly, whatever a did.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxq.nn import blocks

Params = Mapping[str, Any]
STREAMS = 'streams'
Requests = Mapping[str, Mapping[str, Any]]
Stats = Mapping[str, Mapping[str, Any]]


def _nothing(block: blocks.BlockSpec) -> Requests:
  del block
  return {}


def _accept(where: str, stats: Stats) -> None:
  del where, stats


def _unchanged(params: Params) -> Params:
  return params


def _failure(name: str) -> str:
  return (
    f'{name}: NaN or Inf after quantization; its weights or statistics are '
    'degenerate. Look for NaN, Inf or all-zero channels in the model.'
  )


class Transform(NamedTuple):
  """A quantization method (module docstring).

  name: for reports and error messages.
  failure: the error message for a linear (its name) whose result has NaN or
    Inf: apply runs inside jit and cannot raise.
  check: called with the block's name and the finished statistics before apply,
    outside jit: may warn of what they hold, or raise ValueError.
  streams: whether its stats hold the block's inputs (module docstring).
  rest: the transforms that follow it (chain); () for a single method.
  """

  name: str
  apply: Callable[
    [blocks.BlockSpec, Params, Params, Stats], tuple[Params, Params]
  ]
  observe: Callable[[blocks.BlockSpec], Requests] = _nothing
  outside: Callable[[Params], Params] = _unchanged
  failure: Callable[[str], str] = _failure
  check: Callable[[str, Stats], None] = _accept
  streams: bool = False
  rest: tuple['Transform', ...] = ()


def chain(*transforms: Transform) -> Transform:
  """A Transform that runs the given ones in order.

  Raises:
    ValueError: nothing to chain.
  """
  flat = [stage for t in transforms for stage in stages(t)]
  if not flat:
    raise ValueError('chain: no transforms given; pass at least one.')
  return flat[0]._replace(rest=tuple(flat[1:]))


def stages(transform: Transform) -> tuple[Transform, ...]:
  """The single methods of a chain, in order."""
  return (transform._replace(rest=()), *transform.rest)

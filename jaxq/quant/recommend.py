"""Which scheme to begin with on a chip, from what its matrix unit multiplies.

  jaxq.recommend('v5e', 'throughput') -> 'W8A8'

| goal       | what takes time or space          | scheme                     |
|------------|-----------------------------------|----------------------------|
| latency    | reading weights, for a few tokens | W4A16                      |
| memory     | weights                           | W4A16                      |
| throughput | the matrix unit, for many tokens  | FP8_DYNAMIC where fp8_e4m3 |
|            |                                   | is native, W8A8 where int8 |
|            |                                   | is, W8A16 elsewhere        |
| quality    | no loss that can be measured      | W8A16                      |

Native is what the matrix unit takes (jaxq.numerics.chips.native_formats); the
e4m3 of v6e is another one, so int8 serves there. Of two native formats fp8
comes first: outliers of activations cost it less, as its steps grow with the
values, so that it needs no smoothing. int4 x int4 is left out: W4A4 needs a
rotation, and its quality must be measured. On chips that multiply in bfloat16
alone, quantized inputs would gain nothing.

The answer rests on formats, on no timing, and is where to begin: measure it.
"""

from jaxq.numerics import chips

GOALS = ('latency', 'memory', 'quality', 'throughput')
# Format of the matrix unit: the scheme that multiplies in it; the first wins.
_THROUGHPUT = (('fp8_e4m3', 'FP8_DYNAMIC'), ('int8', 'W8A8'))


def recommend(chip: str, goal: str = 'latency') -> str:
  """The scheme to begin with.

  Args:
    chip: 'v5e', 'tpu7x', 'h100', ...; that of a device is chips.chip_of(it).
    goal: one of GOALS (module docstring).

  Returns:
    A name that schemes.parse takes.

  Raises:
    ValueError: unknown chip or goal.
  """
  native = chips.native_formats(chip)
  if goal not in GOALS:
    raise ValueError(
      f'recommend: goal={goal!r}; allowed {sorted(GOALS)}. Use one of them.'
    )
  if goal == 'throughput':
    return next((name for fmt, name in _THROUGHPUT if fmt in native), 'W8A16')
  return 'W8A16' if goal == 'quality' else 'W4A16'

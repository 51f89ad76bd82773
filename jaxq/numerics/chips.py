"""Which number formats each chip multiplies natively.

A format is native where the matrix unit takes it, not where it can only be
stored and converted, nor where XLA has no way to it (int4 on A100 and T4). TPU
rows agree with the per-format rates of `pltpu.get_tpu_info`; ask that first
where it answers, since it knows the chip at hand. What the chips can do at most
is in chip_specs.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

# fp8_e4m3 is e4m3fn. v6e's matrix unit has another e4m3, of bias 11 without
# negative zero, so fp8_e4m3 arrays are converted there.
_NATIVE_FORMATS = {
  'a100': ('bf16', 'int8'),
  'cpu': ('f32',),
  'gpu': ('bf16', 'int8'),  # Any other GPU.
  'h100': ('bf16', 'fp8_e4m3', 'fp8_e5m2', 'int8'),
  'h200': ('bf16', 'fp8_e4m3', 'fp8_e5m2', 'int8'),
  't4': ('f16', 'int8'),
  'tpu': ('bf16',),  # Any other TPU.
  'tpu7x': ('bf16', 'fp8_e4m3', 'fp8_e5m2'),
  'v4': ('bf16',),
  'v5e': ('bf16', 'int4', 'int8'),
  'v5p': ('bf16', 'int4', 'int8'),
  'v6e': ('bf16', 'fp8_e4m3b11fnuz', 'fp8_e5m2', 'int4', 'int8'),
}

# jax.Device.device_kind of each TPU.
_TPU_KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'TPU7': 'tpu7x',
  'TPU7x': 'tpu7x',
}

# The chip that programs are compiled for ahead of time; '' for the one at hand.
_TARGET = contextvars.ContextVar('jaxq_target_chip', default='')


@contextlib.contextmanager
def compiling_for(chip: str) -> Iterator[None]:
  """While it lasts, functions are traced as they would be on this chip.

  What was traced before keeps its choices: use functions that are jitted anew,
  or a process of its own.

  Raises:
    ValueError: unknown chip.
  """
  native_formats(chip)
  token = _TARGET.set(chip)
  try:
    yield
  finally:
    _TARGET.reset(token)


def current() -> str:
  """Name of the chip that is compiled for: the default device's, mostly."""
  return _TARGET.get() or chip_of(jax.devices()[0])


def native_formats(chip: str) -> tuple[str, ...]:
  """Formats of the matrix unit of `chip`, sorted.

  Args:
    chip: 'v5e', 'tpu7x', 'h100', ...; as in topology names, without ':4x4'.

  Raises:
    ValueError: unknown chip.
  """
  if chip not in _NATIVE_FORMATS:
    raise ValueError(
      f'chips.native_formats: chip={chip!r}; allowed '
      f'{sorted(_NATIVE_FORMATS)}. Use one of them, or add a row to the table.'
    )
  return _NATIVE_FORMATS[chip]


def chip_of(device: jax.Device) -> str:
  """Name of a device's chip; 'gpu' or 'tpu' for one without a row of its own.

  GPUs are told by the words of their device_kind ('NVIDIA H100 80GB HBM3').
  """
  if device.platform == 'tpu':
    return _TPU_KINDS.get(device.device_kind, 'tpu')
  if device.platform == 'cpu':
    return 'cpu'
  words = device.device_kind.lower().replace('-', ' ').split()
  return next((w for w in words if w in _NATIVE_FORMATS), 'gpu')

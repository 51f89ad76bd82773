"""Reproducible calibrations on one device and on a 2 x 4 mesh, by their bytes.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
    python -m tests.parallel.reproducible_calibration METHOD...

Prints one JSON line per method of tests.parallel.sharded_calibration.
"""

import json
import sys

import jax
import numpy as np

from jaxq.calibrate import driver
from jaxq.parallel import mesh as mesh_lib
from tests.calibrate import testing
from tests.parallel import sharded_calibration


def reproduce(method):
  """Reproducible runs on one device and on meshes, by bytes; a row of results.

  The inputs of a block come of the quantized ones below: one bit that differs
  would reach all that follows. The control is a run that is cut over the mesh.
  """
  opened = sharded_calibration.model('8/4')
  mesh = mesh_lib.make_mesh('data:2,model:4')
  stores = {}
  for name, where, reproducible in (
    ('one', None, True),
    ('mesh', mesh, True),
    ('cut', mesh, False),
  ):
    calibrator = driver.Calibrator(
      opened,
      sharded_calibration.METHODS[method][0],
      driver.CalibrationConfig(
        batch_size=1 if where is None else 8, reproducible=reproducible
      ),
      where,
    )
    seen = sharded_calibration.watch(calibrator.steps)
    if name == 'mesh':
      layout = seen.shardings
    stores[name] = testing.MemoryStore()
    calibrator.run(testing.tokens(sequences=16), stores[name])

  def differ(name):
    pairs = zip(
      *(jax.tree.leaves(stores[n].blocks) for n in ('one', name)), strict=True
    )
    return sum(
      np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs
    )

  return {
    'method': method,
    'arrays': len(jax.tree.leaves(stores['one'].blocks)),
    'mesh': differ('mesh'),
    'cut': differ('cut'),
    'batch': sorted(layout['forward x']),
  }


def main(argv):
  """Prints a JSON line for each method."""
  for method in argv[1:]:
    print(json.dumps(reproduce(method)), flush=True)


if __name__ == '__main__':
  main(sys.argv)

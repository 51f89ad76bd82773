"""The suite's rules: strict dtypes and ranks, CPU, and one compilation cache.

Silent upcasts and broadcasts fail at once. A test that compares with code that
does not live by this is marked `loose_promotion`. Markers that follow from the
folder of a test are set here, so that no test file has to repeat them.
"""

import os
import pathlib
import signal

# What a shell starts in the background ignores Ctrl-C, as do its processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# Before JAX is imported, and inherited by the processes that tests start.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(
    pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    / 'jaxq'
    / 'jax'
  ),
)

import hypothesis
import jax
import pytest

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Seeded, so that a failure on one machine is a failure on all.
hypothesis.settings.register_profile(
  'jaxq', deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile('jaxq')

_ROOT = pathlib.Path(__file__).parent
# Every method is traced on every family by tests/experiments/test_methods.py,
# so that those of `quant` need not run on the newest JAX one by one.
_MARKERS = {  # The first folder under tests/: the markers of its tests.
  'calibrate': ('smoke',),
  'experiments': ('smoke',),
  'nn': ('smoke',),
  'numerics': ('smoke',),
  'parity': ('parity',),
  'tpu_aot': ('tpu_aot',),
}


def pytest_collection_modifyitems(items):
  """Marks tests by folder; a slow one is no smoke test."""
  for item in items:
    folder = item.path.relative_to(_ROOT).parts[0]
    for marker in _MARKERS.get(folder, ()):
      if marker != 'smoke' or not item.get_closest_marker('slow'):
        item.add_marker(marker)


@pytest.fixture(autouse=True, scope='module')
def _compiled_programs():
  """Drops a module's compiled programs; kept, they add up to gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def _promotion(request):
  """Lifts the strict rules for tests marked `loose_promotion`."""
  if request.node.get_closest_marker('loose_promotion') is None:
    yield
    return
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield

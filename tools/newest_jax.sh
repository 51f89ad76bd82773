#!/usr/bin/env bash
# Runs the smoke tests on the newest JAX, which needs a newer Python than the
# oldest one that jaxq supports. Where there is none, says so and succeeds.
#
# Usage: tools/newest_jax.sh VENV [pip install options...]
set -euo pipefail
venv=$1
shift

# Prints the first interpreter found that works: on PATH, then pyenv's.
find_python() {
  local candidates=(python3.13 python3.12) root version
  root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || true)}
  for version in 3.13 3.12; do
    candidates+=("${root:-$HOME/.pyenv}"/versions/"$version".*/bin/python)
  done
  for python in "${candidates[@]}"; do
    # A pyenv shim is on PATH even when its version is not selected.
    if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      echo "$python"
      return
    fi
  done
  return 1
}

if ! python=$(find_python); then
  echo 'newest JAX: skipped, since no Python 3.12 or 3.13 was found on PATH' \
    "or in pyenv's versions folder. Install one to run the smoke tests on it."
  exit 0
fi

if [[ ! -e $venv/.newest || pyproject.toml -nt $venv/.newest ]]; then
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade --upgrade-strategy eager \
    "$@" -e '.[video]' hypothesis pytest pytest-xdist
  touch "$venv/.newest"
fi
"$venv/bin/python" - <<'PY'
import platform
import jax
print(f'newest JAX: {jax.__version__} on Python {platform.python_version()}')
PY

# No torch there: the folders that need it are left out before collection.
OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n "${WORKERS:-2}" \
  --dist loadscope -m smoke --ignore=tests/parity --ignore=tests/tpu_aot

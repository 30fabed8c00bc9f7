#!/usr/bin/env bash
# Set up .venv and run the tests. Arguments go to pytest: bash test.sh tests/test_model.py -k cache
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash setup.sh --dev
export HF_HUB_OFFLINE=1                          # no test needs a model hub
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # the tensors are small: threads would slow them down
cores=$(getconf _NPROCESSORS_ONLN)
# one process per core; the tests of a file run in one process, because they share fixtures
exec .venv/bin/python -m pytest -n $((cores < 8 ? cores : 8)) --dist loadfile "$@"

#!/usr/bin/env bash
# The set-up, then the test suite. What follows goes to pytest: bash test.sh tests/test_model.py -k cache
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash setup.sh --dev
export HF_HUB_OFFLINE=1                          # no test asks a model hub for anything
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # the tensors are small: threads cost more than they bring
cores=$(getconf _NPROCESSORS_ONLN)
# one process a core; the tests of a file stay together, for they share what is made for them
exec .venv/bin/python -m pytest -n $((cores < 8 ? cores : 8)) --dist loadfile "$@"

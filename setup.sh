#!/usr/bin/env bash
# Make .venv and install the pinned requirements into it. run.sh and test.sh call this script; to call it yourself:
#
#   bash setup.sh          packages for training and chatting (requirements.txt)
#   bash setup.sh --extra serve --extra eval    also packages that only some commands need; torch stays as it is:
#     serve          serve.py                                      (requirements-serve.txt, and so on)
#     bnb            NF4 and FP4: QLoRA, quantize.py, bitsandbytes' files
#     data           data_process.py --near_duplicates and --languages
#     deepspeed      --train.backend deepspeed
#     eval           python -m evaluation.harness, which is lm-evaluation-harness
#     transformers   models outside the LLaMA family
#     gguf           convert.py: GGUF files, for llama.cpp and Ollama
#     wandb          --train.loggers wandb, which is Weights & Biases
#     swanlab        --train.loggers swanlab
#     bench          every script in bench/
#     dev            the test suite; --dev is short for it
#
# A second call returns at once if nothing changed. A wrong argument changes nothing.
# PYTHON=/path/to/python3.12 selects the interpreter; TORCH_ALLOW_PYPI=1 allows PyPI's torch if no CPU build is available.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly torch_version=2.13.0
readonly cpu_index=https://download.pytorch.org/whl/cpu
readonly py=.venv/bin/python

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_recent() { # does this interpreter run, and is it at least Python 3.10?
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() { # prints the path of the first interpreter that is recent enough
  local candidate version found='' candidates=(python3 python python3.13 python3.12 python3.11 python3.10)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if is_recent "$candidate"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
    version=$("$candidate" --version 2>&1 | grep -o 'Python [0-9.]*') && found+=", $candidate which is $version"
  done
  found=${found#, }
  fail "expected Python 3.10 or newer, found ${found:-none}; install it, or give its path: PYTHON=/path/to/python3.12 bash run.sh"
}

have_uv() { uv --version >/dev/null 2>&1; }

make_venv() {
  local python
  python=$(find_python)
  rm -rf .venv
  if have_uv; then
    uv venv --quiet --seed --python "$python" .venv || fail "uv could not make .venv with $python (details above)"
  elif "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    "$python" -m venv .venv || fail "$python could not make .venv (details above)"
  else
    fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv), then repeat the command"
  fi
}

# Installs with uv if it is on PATH, because it is many times faster; else, or if uv fails, with pip: uv does not read pip.conf
# (mirrors, certificates).
install() {
  if have_uv; then
    uv pip install --python "$py" "$@" && return
    echo "uv could not install these packages; trying pip" >&2
  fi
  "$py" -m pip --version >/dev/null 2>&1 || "$py" -m ensurepip >/dev/null || return
  "$py" -m pip install "$@"
}

torch_installed() { # is the pinned version installed? With a GPU, its CPU build does not count
  local info
  for info in .venv/lib/python*/site-packages/torch-"$torch_version"*.dist-info; do
    if [ -d "$info" ] && { [ "$torch_build" = cpu ] || [[ "$info" != *+cpu.dist-info ]]; }; then return 0; fi
  done
  return 1
}

# Installs the CPU build from the find-links folder if it is there, else from PyTorch's index. It is installed without its
# dependencies, which requirements.txt pins, so that only one index is used and no CUDA library is installed.
install_torch() {
  local cpu="torch==$torch_version+cpu"
  if [ "$torch_build" = cpu ]; then
    if install --no-deps --no-index "$cpu" >/dev/null 2>&1; then return; fi
    if install --no-deps --index-url "$cpu_index" "$cpu"; then return; fi
    [ "${TORCH_ALLOW_PYPI:-0}" = 1 ] ||
      fail "no CPU build of torch $torch_version for Python $python_version in find-links or at $cpu_index" \
        "(details above); check the network, or allow PyPI's build with several GB of CUDA libraries: TORCH_ALLOW_PYPI=1 bash run.sh"
  fi
  # ==2.13.0 alone would accept a 2.13.0+cpu that was installed before the GPU driver
  install -c requirements.txt "torch==$torch_version,!=$torch_version+cpu" ||
    fail "torch $torch_version could not be installed for Python $python_version (details above);" \
      "fix the cause, then repeat the command"
}

# The set-up is up to date if the stamp file holds exactly the present versions of Python and torch and the present pins.
up_to_date() {
  [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$torch_version $torch_build $python_version"$'\n'"$(cat "$1")" ]
}

install_requirements() {
  install -r "$1" || fail "$1 could not be installed (details above); fix the cause, then repeat the command"
  # SwanLab asks for an older protobuf, with which sentencepiece cannot be loaded; it works with the pinned one
  if [ "$1" = requirements-swanlab.txt ]; then install -r requirements.txt || fail "requirements.txt could not be installed"; fi
  "$py" -c 'import platform, torch; print(f"installed: Python {platform.python_version()}, torch {torch.__version__}")' ||
    fail "torch was installed but cannot be imported (details above); remove .venv, then repeat the command"
  printf '%s\n' "$torch_version $torch_build $python_version" "$(cat "$1")" >".venv/installed-$1"
}

requirements=(requirements.txt)
while [ $# -gt 0 ]; do # first, so that a wrong argument changes nothing
  case "$1" in
    --dev) requirements+=(requirements-dev.txt) ;;
    --extra)
      case "${2:-}" in
        bench | bnb | data | deepspeed | dev | eval | gguf | serve | swanlab | transformers | wandb) requirements+=("requirements-$2.txt") ;;
        *) fail "--extra expects bench, bnb, data, deepspeed, dev, eval, gguf, serve, swanlab, transformers or wandb, found ${2:-nothing}" ;;
      esac
      shift
      ;;
    *) fail "setup.sh expects --extra NAME, --dev or no argument, found $1" ;;
  esac
  shift
done

# uv has its own variable for folders of local wheels, separated by commas; pip's are separated by spaces
if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}"; fi

torch_build=ordinary # the build on PyPI: CUDA on Linux, Metal on macOS
if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then torch_build=cpu; fi

is_recent "$py" || make_venv
python_version=$("$py" -c 'import platform; print(platform.python_version())')

for file in "${requirements[@]}"; do
  if up_to_date "$file"; then continue; fi
  if [ "$file" = requirements.txt ]; then torch_installed || install_torch; fi
  install_requirements "$file"
done

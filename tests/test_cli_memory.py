"""What does not fit into memory is refused or named in one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cli import memory
from cli.args import run

PROJECT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "make, asked",
    [
        (lambda: torch.zeros(10**14), "400.0 TB"),
        (lambda: np.zeros(10**15), "7.11 PiB"),
        (lambda: [0] * 10**15, None),
        (lambda: torch.empty(2**40, 2**40), None),
    ],
    ids=["torch", "numpy", "python", "beyond 64 bits"],
)
def test_full_memory_is_one_sentence_with_what_to_change(make, asked):
    with pytest.raises(SystemExit) as stop:
        run(lambda _: make(), None, less_memory="a smaller --batch_size takes less")
    amount = f" (another {asked} were asked for)" if asked else ""
    assert stop.value.code == f"error: out of memory{amount}: a smaller --batch_size takes less"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("unable to mmap 12 bytes from file <m>: Cannot allocate memory (12)"),
    ],
)
def test_other_programs_words_for_it(error):
    def main(_):
        raise error

    with pytest.raises(SystemExit, match="error: out of memory"):
        run(main, None)


def test_a_mistake_of_ours_keeps_its_traceback():
    def main(_):
        raise RuntimeError("shapes [2] and [3] differ")

    with pytest.raises(RuntimeError, match="differ"):
        run(main, None)


def test_the_memory_of_this_machine():
    info = Path("/proc/meminfo")
    if not info.is_file():
        pytest.skip("no /proc")
    total = 1024 * int(re.search(r"MemTotal:\s+(\d+) kB", info.read_text())[1])
    assert 0 < memory.memory_bytes() <= total
    script = (
        "import resource, cli.memory as m; resource.setrlimit(resource.RLIMIT_AS, (2**30, -1)); print(m.memory_bytes())"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert int(found.stdout) == min(2**30, total)


def test_what_needs_more_than_there_is_is_refused():
    memory.check_memory("the model", 2 * 10**9, "make it smaller", memory=2 * 10**9)
    with pytest.raises(ValueError, match=r"^the model needs 3\.1 GB of memory, and there are 2\.0 GB: smaller$"):
        memory.check_memory("the model", 3_100_000_000, "smaller", memory=2 * 10**9)


@pytest.mark.parametrize(
    "n, text", [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (25e11, "2.5 TB"), (3e18, "3,000 PB")]
)
def test_sizes(n, text):
    assert memory.size(n) == text

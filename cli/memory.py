"""The memory of this machine: refuse what cannot fit before it is built, and recognize an error of full memory."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of glibc's mallopt
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of a container, in versions 2 and 1 of Linux's cgroups
WORDS = re.compile(
    "out of memory|not enough memory|(can't|cannot|unable to) allocate|bad_?alloc|storage size calculation overflowed",
    re.I,
)


def memory_bytes() -> int:
    """Return the memory that this process may use at most, in bytes: the machine's, or a lower limit that is set."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), resource.getrlimit(resource.RLIMIT_AS)[0]]
    for name in LIMITS:
        path = Path("/sys/fs/cgroup", name)
        text = path.read_text().strip() if path.is_file() else ""
        sizes += [int(text)] if text.isdigit() else []
    return min(size for size in sizes if size != resource.RLIM_INFINITY)


def check_memory(what: str, n_bytes: int, advice: str, memory: int | None = None) -> None:
    """Raise ValueError when `what` needs more than there is.

    n_bytes: bytes that it needs; memory: bytes that there are (None: of this machine, for a device without its own);
    advice: end of the message, what to change.
    """
    memory = memory_bytes() if memory is None else memory
    if n_bytes > memory:
        raise ValueError(f"{what} needs {size(n_bytes)} of memory, and there are {size(memory)}: {advice}")


def give_back_freed(n_bytes: int = 1 << 20) -> None:
    """Have blocks of memory from `n_bytes` on given back to the system as soon as they are freed; where the C library
    is not glibc, nothing changes.

    By itself glibc raises the size from which it does that up to 32 MiB. Tensors of many sizes that are freed below it
    leave gaps, and a process may take several times the memory that is in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, n_bytes)


def size(n_bytes: int) -> str:
    """Return a number of bytes for a reader, such as "3.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if n_bytes < 1000 or unit == "PB":
            return f"{n_bytes:,.0f} {unit}" if unit in ("bytes", "PB") else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError


def memory_is_full(error: BaseException) -> bool:
    """Return whether an error of Python, NumPy, PyTorch or the system says that memory is used up."""
    of_torch = isinstance(error, RuntimeError | OSError) and WORDS.search(str(error))
    return isinstance(error, MemoryError) or bool(of_torch)


def full_memory(error: BaseException, advice: str) -> str:
    """Return one sentence for such an error: the size that was asked for, where the error has it, and the advice."""
    asked = re.search(r"allocate (?:about )?(\d[\d.]*) (bytes|[KMGTP]i?B)", str(error))
    amount = "" if asked is None else size(int(asked[1])) if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    return f"out of memory{amount and f' (another {amount} were asked for)'}: {advice}"

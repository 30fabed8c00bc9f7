"""The machine: threads, number formats, compiler, memory, disk, as the documentation assumes them."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch

from checks.check import WARNING, Check, judged
from cli.memory import memory_bytes, size
from hardware import can_compile, has_bfloat16, peak_flops

SLOW = 1e9  # operations a second; one core of ten years ago does twenty times as much


def machine(device: torch.device, dtype: str = "auto", compile: str = "auto") -> list[Check]:
    """Return the checks of this machine for training in `dtype` with `compile`, as the flags say them."""
    return [*threads(), bfloat16(device, dtype), compiler(device, compile), rate(device), memory()]


def cores() -> int:
    """Return the processor cores that this process may use: those of its affinity, or of a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text().partition(" ")
        if limit.isdigit():
            count = min(count, max(1, math.ceil(int(limit) / int(period))))
    return count


def threads() -> list[Check]:
    """Compare the threads of matrix products with the cores; two threads may share one core."""
    n, most = torch.get_num_threads(), cores()
    advice = f"set OMP_NUM_THREADS={most} (it is {os.environ.get('OMP_NUM_THREADS', 'not set')}) before the command"
    expected = f"{max(1, most // 2)} to {most} threads for {most} cores"
    return [judged("threads", expected, f"{n} of {most} cores", advice, not most // 2 <= n <= most, WARNING)]


def bfloat16(device: torch.device, dtype: str) -> Check:
    """See whether bf16 is asked for, and whether the device has instructions for it."""
    has = has_bfloat16(device)
    found = f"{device.type} {'has' if has else 'has no'} instructions for bf16; --train.dtype {dtype}"
    expected = "bf16 only where the device has it"
    return judged("bf16", expected, found, "use --train.dtype auto or fp32", dtype == "bf16" and not has, WARNING)


def compiler(device: torch.device, compile: str) -> Check:
    """See whether torch.compile and the compiled decoding step can run."""
    can = can_compile(device)
    advice = "install a C++ compiler and Python's headers (apt install g++ python3-dev), or use --train.compile off"
    found = "found" if can else f"none that torch.compile can use; --train.compile {compile}"
    return judged("compiler", "a C++ compiler and Python.h", found, advice, not can and compile != "off", WARNING)


def rate(device: torch.device) -> Check:
    """Measure the matrix products: a machine that is busy, or emulated, is found here."""
    rate, source = peak_flops(device, torch.float32)
    found = f"{rate / 1e9:,.0f} GFLOP/s in fp32 ({source})"
    advice = "look for other programs (top), or for a container with a small share of a core"
    return judged("rate", f"above {SLOW / 1e9:.0f} GFLOP/s", found, advice, rate < SLOW, WARNING)


def memory(needed: int = 2 * 10**9) -> Check:
    """See whether `needed` bytes of memory are free."""
    free = free_bytes()
    advice = "end other programs, or use a machine with more memory"
    return judged("memory", f"{size(needed)} free", f"{size(free)} free", advice, free < needed, WARNING)


def free_bytes() -> int:
    """Return the bytes of memory that a process can still get, of the machine or its container."""
    info, most = Path("/proc/meminfo"), memory_bytes()
    if not info.is_file():
        return most
    fields = dict(line.split(":") for line in info.read_text().splitlines())
    return min(most, int(fields["MemAvailable"].split()[0]) * 1024)


def disk(folder: Path, needed: int, what: str) -> Check:
    """See whether `needed` bytes are free where `folder` lies or will lie."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    advice = "free some, choose another --out, or keep fewer checkpoints (--train.keep)"
    return judged("disk", f"{size(needed)} for {what}", f"{size(free)} free at {place}", advice, free < needed)

"""Devices: what a data sheet says of a GPU, and what this machine has; without torch."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cli.memory import memory_bytes

GIB = 2**30
SPARE = "without 1 GiB for the libraries and 5 % that are lost between blocks"


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of one device; rates of which nothing is known are None."""

    name: str
    memory: float
    """size of the memory, bytes"""
    peak: float | None = None
    """dense bfloat16 operations a second"""
    bandwidth: float | None = None
    """bandwidth of the memory, bytes a second"""
    link: float | None = None
    """bandwidth to the other devices of a node, bytes a second in one direction"""
    watts: float | None = None
    """power of the board"""
    is_gpu: bool = True
    """whether it is a GPU; False: the CPU"""


def gpu(name: str, gib: float, tera: float, bandwidth: float, link: float, watts: float) -> Device:
    """Return a GPU; gib: memory in GiB; tera: 1e12 operations a second; bandwidth and link: GB/s."""
    return Device(name, gib * GIB, tera * 1e12, bandwidth * 1e9, link * 1e9, watts)


# Manufacturers' data sheets: dense bf16 (V100: fp16), memory, its bandwidth, NVLink (or PCIe) in one direction, power.
GPUS = {
    each.name: each
    for each in (
        gpu("b200", 180, 2250, 8000, 900, 1000),
        gpu("h200", 141, 989, 4800, 450, 700),
        gpu("h100", 80, 989, 3350, 450, 700),
        gpu("h100-pcie", 80, 756, 2000, 63, 350),
        gpu("h800", 80, 989, 3350, 200, 700),
        gpu("h20", 96, 148, 4000, 450, 400),
        gpu("mi300x", 192, 1307, 5300, 448, 750),
        gpu("a100", 80, 312, 2039, 300, 400),
        gpu("a100-40", 40, 312, 1555, 300, 400),
        gpu("a800", 80, 312, 2039, 200, 400),
        gpu("l40s", 48, 362, 864, 31.5, 350),
        gpu("a6000", 48, 155, 768, 31.5, 300),
        gpu("l4", 24, 121, 300, 31.5, 72),
        gpu("a10", 24, 125, 600, 31.5, 150),
        gpu("5090", 32, 209, 1792, 63, 575),
        gpu("4090", 24, 165, 1008, 31.5, 450),
        gpu("3090", 24, 71, 936, 31.5, 350),
        gpu("v100", 32, 125, 900, 150, 300),
    )
}


def this_machine() -> Device:
    """Return the first GPU that nvidia-smi names, with the data sheet's rates if it is known; else the CPU's memory."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        name, _, mib = done.stdout.partition("\n")[0].rpartition(", ")
        if done.returncode == 0 and mib.isdigit():
            return named_by_system(name, int(mib) * 2**20)
    return Device("this machine (CPU)", memory_bytes(), is_gpu=False)


def named_by_system(name: str, memory: int) -> Device:
    """Return the device that the system calls `name` ("NVIDIA H100 80GB HBM3"); memory: bytes."""
    words = name.lower().replace("-", " ").split()
    # the longest name counts: H100 PCIe before H100
    for known in sorted(GPUS.values(), key=lambda each: -len(each.name)):
        if set(known.name.split("-")) <= set(words):
            return Device(name, memory, known.peak, known.bandwidth, known.link, known.watts)
    return Device(name, memory)


def usable(device: Device) -> float:
    """Return the bytes that a plan counts on; SPARE says what is left out."""
    return max(0.0, 0.95 * device.memory - GIB)


def cpu_has_bfloat16() -> bool:
    """Return whether Linux says that this CPU has instructions for products in bfloat16."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.is_file() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


def find(name: str) -> Device:
    """Return the GPU of a name in GPUS. Raises ValueError that lists them."""
    if (device := GPUS.get(name.lower().replace("_", "-"))) is None:
        raise ValueError(
            f"--gpu {name} is not in the table; known are {', '.join(GPUS)}. For another one give its numbers: "
            "--gpu_memory (GiB), --gpu_tflops (dense bf16), --gpu_bandwidth (GB/s)"
        )
    return device

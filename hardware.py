"""Describe this machine: its device, the rate of its matrix products, number formats, whether it has a compiler."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

PEAKS = {  # dense bfloat16 operations a second, from the manufacturers' data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
}


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is cuda where there is one, else mps, else cpu.

    Raises ValueError, with the devices of this machine, for another one.
    """
    gpus = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    here = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name not in ("auto", *here):
        raise ValueError(f"the device should be auto or one that this machine has ({', '.join(here)}), found {name!r}")
    return torch.device(here[0] if name == "auto" else name)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the operations a second of this device in matrix products, and the source of the figure: the data sheet of
    a known GPU, else a measurement (0.3 seconds)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name and dtype != torch.float32:
                return peak, f"{known} data sheet, dense bf16"
    return matmul_rate(device, dtype), "measured here on a 1536x1536 product"


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 1536, seconds: float = 0.3) -> float:
    """Return the best rate of an n x n x n matrix product within `seconds`, in operations a second."""
    own = torch.Generator(device)  # the global one belongs to the run: a resumed run draws the same numbers from it
    a, b = (torch.randn(n, n, device=device, generator=own).to(dtype) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        start = time.perf_counter()
        c = a @ b
        if device.type != "cpu":
            c[0, 0].item()  # wait for the device, which works asynchronously
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def cache_folder() -> Path:
    """Return the folder of what is made once on a machine and can be made again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "little-llama"


@contextlib.contextmanager
def float32_matmul(how: str) -> Iterator[None]:
    """Let float32 matrix products inside the block be computed as torch.set_float32_matmul_precision says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(how)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact_float32_matmul(device: torch.device) -> str:
    """Return how float32 matrix products are fastest on a device, as torch.set_float32_matmul_precision calls it, among
    the ways that are as exact as float32.

    On a CPU, "highest" is MKL, and "medium" is oneDNN. On processors of AMD the second was 1.2 to 4 times as fast.
    Where the processor has tiles of bfloat16, "medium" may round to bfloat16: that is found by the error of a product.
    Measured once on a machine (half a second) and kept in `cache_folder`, so that all its runs compute alike.
    """
    if device.type != "cpu":
        return "highest"
    path = cache_folder() / "float32_matmul.json"
    isa = [os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")]
    case = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {isa}"
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(json.loads(path.read_text(encoding="utf8")))
    if known.get(case) in ("highest", "medium"):
        return known[case]
    found = faster_exact("highest", "medium")
    with contextlib.suppress(OSError):  # it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(known | {case: found}, indent=1), encoding="utf8")
        aside.replace(path)
    return found


def processor() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def faster_exact(usual: str, other: str, rounds: int = 8) -> str:
    """Return `other` where float32 products of a training step are at least a tenth faster than in the usual way, and
    their error is that of float32; else `usual`."""
    own = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*size, generator=own) for size in ((1024, 512), (1376, 512), (1024, 1376)))
    exact = x.double() @ w.double().t()
    seconds: dict[str, list[float]] = {usual: [], other: []}
    error = {}
    for _ in range(rounds):  # in turns, so that other load strikes both
        for how, times in seconds.items():
            with float32_matmul(how):
                start = time.perf_counter()
                y = x @ w.t()  # forward, the gradient of the input, the gradient of the weight
                g @ w, g.t() @ x
                times.append(time.perf_counter() - start)
                error[how] = (y - exact).abs().max().item()
    # bfloat16 has 2^16 times the rounding of float32, TF32 2^13 times; orders of summation differ by a few times
    as_exact = error[other] <= 16 * error[usual]
    return other if as_exact and min(seconds[other]) < 0.9 * min(seconds[usual]) else usual


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for matrix products in bfloat16 (emulation does not count)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile can run here: it needs Python's headers, on a CPU also a C++ compiler, on a GPU also
    Triton and a C compiler (for the code that launches Triton's kernels)."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return False
    if device.type == "cuda":
        return find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
    return device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


def fastest_dtype(device: torch.device, decodes: bool) -> torch.dtype:
    """Return bfloat16 where the hardware has it, else float32. Decoding on a CPU gets float32: single tokens
    take four times as long in bfloat16."""
    return torch.bfloat16 if has_bfloat16(device) and not (decodes and device.type == "cpu") else torch.float32


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_waiting_for_compiler: list[tuple[str, Callable]] = []


def for_compiler(what: str) -> Callable[[Callable], Callable]:
    """Return a decorator that applies `torch.compiler.WHAT` (disable, assume_constant_result) when a model is first
    compiled. Applied at once, it would load the compiler, more than a second, at every start of every script."""

    def remember(function: Callable) -> Callable:
        _waiting_for_compiler.append((what, function))
        return function

    return remember


def start_compiler() -> None:
    """Apply the decorators that `for_compiler` has collected, and let compiled code be kept for other runs; called
    before a model is compiled."""
    # PyTorch keeps it in a folder for temporary files, which may be empty after a restart
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    while _waiting_for_compiler:
        what, function = _waiting_for_compiler.pop()
        *path, name = function.__qualname__.split(".")
        owner = sys.modules[function.__module__]
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, getattr(torch.compiler, what)(function))

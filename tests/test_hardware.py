"""hardware.py: rates, peaks and what can be compiled, with the machine's answers stood in for."""

import contextlib
import itertools
import json
import shutil
import sysconfig

import pytest
import torch

import hardware
from hardware import can_compile, exact_float32_matmul, faster_exact, has_bfloat16, matmul_rate, peak_flops

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measured_rate_is_what_the_clock_says(monkeypatch, dtype):
    """With a clock that a reading moves by a second, each product takes one: 2 n^3 operations a second."""
    seconds = iter(range(100))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(seconds))
    assert matmul_rate(CPU, dtype, n=8, seconds=5) == 2 * 8**3


def test_the_fastest_product_counts_and_one_is_always_measured(monkeypatch):
    #         begin, again?, start, end, again?, start, end, again?
    readings = iter([0.0, 0.0, 1.0, 5.0, 5.0, 6.0, 6.5, 99.0])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(readings))
    assert matmul_rate(CPU, torch.float32, n=8, seconds=10) == 2 * 8**3 / 0.5
    readings = iter([0.0, 9.0, 9.0, 11.0, 99.0])  # no time at all is given
    assert matmul_rate(CPU, torch.float32, n=8, seconds=0) == 2 * 8**3 / 2


def test_measuring_leaves_the_random_numbers_of_a_run_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    matmul_rate(CPU, torch.float32, n=8, seconds=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12)],
)
def test_a_known_gpu_has_its_makers_figure(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found, origin = peak_flops(GPU, torch.bfloat16)
    assert found == peak and "data sheet" in origin


@pytest.mark.parametrize(
    "device, name, dtype",
    [
        (GPU, "NVIDIA H100 80GB HBM3", torch.float32),  # the sheet's figure is for bfloat16
        (GPU, "a GPU of tomorrow", torch.bfloat16),
        (CPU, None, torch.bfloat16),
    ],
)
def test_what_no_data_sheet_says_is_measured(monkeypatch, device, name, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "matmul_rate", lambda *asked: 7.0 if asked == (device, dtype) else None)
    found, origin = peak_flops(device, dtype)
    assert found == 7.0 and "measured" in origin


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_on_a_cpu_needs_instructions_for_it(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bfloat16(CPU) == (avx512 or amx)
    assert not has_bfloat16(torch.device("mps"))


@pytest.mark.parametrize("real", [True, False])
def test_emulated_bfloat16_does_not_count_on_a_gpu(monkeypatch, real):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or real)
    assert has_bfloat16(GPU) == real


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with Python's headers and these programs; both variables for compilers are unset."""

    def build(*programs: str, headers: bool = True, triton: bool = True) -> None:
        folder = tmp_path / "include"
        folder.mkdir()
        if headers:
            (folder / "Python.h").touch()
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in programs else None)
        monkeypatch.setattr(hardware, "find_spec", lambda name: object() if triton and name == "triton" else None)

    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return build


@pytest.mark.parametrize(
    "programs, parts, cpu, gpu",
    [
        (["g++", "gcc"], {}, True, True),
        (["g++", "gcc"], {"headers": False}, False, False),
        (["g++", "gcc"], {"triton": False}, True, False),
        (["gcc"], {}, False, True),
        (["clang"], {}, False, True),
        (["g++"], {}, True, False),
        ([], {}, False, False),
    ],
)
def test_compiling_needs_headers_and_a_compiler_and_on_a_gpu_triton(machine, programs, parts, cpu, gpu):
    machine(*programs, **parts)
    assert (can_compile(CPU), can_compile(GPU)) == (cpu, gpu)
    assert not can_compile(torch.device("mps"))


def test_compilers_named_in_the_environment_are_the_ones_looked_for(machine, monkeypatch):
    machine("my-c++", "my-cc")
    assert not can_compile(CPU) and not can_compile(GPU)
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setenv("CC", "my-cc")
    assert can_compile(CPU) and can_compile(GPU)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=rf"should be auto or one that this machine has \(.*cpu\), found '{name}'"):
        hardware.choose_device(name)


# ---- float32 products


def bfloat16(x):
    return x.bfloat16().float()


def tf32(x):
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize(
    "rounded, seconds, expected",
    [
        (None, 0.5, "medium"),
        (None, 0.95, "highest"),  # not worth another order of additions
        (None, 2.0, "highest"),
        (bfloat16, 0.1, "highest"),
        (tf32, 0.1, "highest"),
    ],
)
def test_a_faster_way_is_taken_only_with_the_error_of_float32(monkeypatch, rounded, seconds, expected):
    """The other way takes `seconds` where the usual one takes one, and rounds its inputs before the product."""
    product, now = torch.Tensor.__matmul__, itertools.count()
    clock = {"now": 0.0, "step": 1.0}

    @contextlib.contextmanager
    def way(how):
        other = how == "medium"
        clock["step"] = seconds if other else 1.0
        with monkeypatch.context() as patch:
            if other and rounded:
                patch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(rounded(a), rounded(b)))
            yield

    def read():
        clock["now"] += clock["step"] * (next(now) % 2)
        return clock["now"]

    monkeypatch.setattr(hardware, "float32_matmul", way)
    monkeypatch.setattr(hardware.time, "perf_counter", read)
    assert faster_exact("highest", "medium", rounds=2) == expected


def test_both_real_ways_give_one_of_the_two_and_leave_the_setting_alone():
    before = torch.get_float32_matmul_precision()
    assert faster_exact("highest", "medium", rounds=1) in ("highest", "medium")
    assert torch.get_float32_matmul_precision() == before


def test_the_choice_is_measured_once_on_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = iter(["medium", "highest", "medium"])
    monkeypatch.setattr(hardware, "faster_exact", lambda *_: next(answers))
    assert [exact_float32_matmul(CPU) for _ in range(3)] == ["medium"] * 3
    monkeypatch.setattr(hardware, "processor", lambda: "another one")
    assert exact_float32_matmul(CPU) == "highest"
    path = tmp_path / "little-llama" / "float32_matmul.json"
    assert sorted(json.loads(path.read_text()).values()) == ["highest", "medium"]
    path.write_text("{")  # damaged
    assert exact_float32_matmul(CPU) == "medium"
    assert exact_float32_matmul(GPU) == "highest"

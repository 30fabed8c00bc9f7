"""The compiled decoding step against the model's own forward pass."""

import hashlib
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import backends
from decoding import cpu_step
from decoding.feeder import Feeder
from model import Transformer
from model_args import ModelArgs

SHAPES = {
    "plain": {},
    "grouped, all options": {"dim": 60, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "qk_norm": True}
    | {"attention_bias": True, "tie_embeddings": False},
    "one key head, window, odd widths": {"dim": 75, "n_heads": 3, "n_kv_heads": 1, "head_dim": 26}
    | {"hidden_dim": 101, "sliding_window": 5, "vocab_size": 103},
    "stretched positions": {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 10}},
    "wide": {"dim": 288, "n_heads": 6, "n_layers": 1, "hidden_dim": 768},
}


def make(dtype: torch.dtype = torch.float64, **shape) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**{"n_layers": 3, "vocab_size": 101, "max_seq_len": 40} | shape)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases that count
    return model.eval()


def stepper(model, cache):
    step = cpu_step.stepper(model, cache)
    if step is None and cpu_step.supports(model, cache):
        pytest.skip("there is no C++ compiler that works")
    return step


@torch.inference_mode()
def prefilled(model: Transformer, lengths: list[int]):
    """A cache that has read a prompt of each of these lengths, padded on the right."""
    cache = model.make_cache(len(lengths))
    tokens = torch.randint(0, model.args.vocab_size, (len(lengths), max(lengths)))
    model.hidden(tokens, cache=cache)
    return cache


@torch.inference_mode()
def plain_step(model: Transformer, cache, ids: list[int], positions: list[int]) -> torch.Tensor:
    return model(torch.tensor(ids)[:, None], positions=torch.tensor(positions)[:, None], cache=cache)[:, 0]


def walk(model: Transformer, lengths: list[int], steps: int, most: int = 1) -> float:
    """Largest difference between both ways over some steps, each of up to `most` tokens a row, from prompts of these
    lengths, as a share of the logits."""
    torch.manual_seed(1)
    feed = Feeder(model, prefilled(model, lengths))
    feed.step = None
    torch.manual_seed(1)
    cache = prefilled(model, lengths)
    step, past, error, draw = stepper(model, cache), list(lengths), 0.0, random.Random(0)
    for _ in range(steps):
        runs = [draw.choices(range(model.args.vocab_size), k=draw.randint(1, most)) for _ in lengths]
        n = draw.randint(1, min(map(len, runs)))
        expected, found = feed(runs, past, n), step(runs, past, n)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        error = max(error, float((expected - found).abs().max() / expected.abs().max()))
        past = [position + len(run) for position, run in zip(past, runs)]
    assert cache.length == max(past)
    return error


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("lengths", [[3], [3, 1, 2], [1] * 8, [2, 9, 4, 4, 1, 7, 5, 5, 6, 3, 1]], ids=len)
def test_a_step_is_the_forward_pass_of_the_model(shape, lengths):
    assert walk(make(**shape), lengths, steps=12) < 1e-12  # float64: 1e-15 times a few hundred additions
    assert walk(make(**shape), lengths, steps=5, most=6) < 1e-12


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 8, 14, 16, 34]), st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_any_shape(batch, kv_heads, group, head_dim, window):
    shape = {"n_heads": kv_heads * group, "n_kv_heads": kv_heads, "head_dim": head_dim, "sliding_window": window}
    model = make(dim=19 + head_dim, hidden_dim=23 * kv_heads, vocab_size=5 * head_dim + 1, n_layers=2, **shape)
    assert walk(model, [1 + i % 4 for i in range(batch)], steps=4, most=1 + head_dim % 5) < 1e-12


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1.5), (torch.bfloat16, 1.0)])
def test_it_rounds_no_more_than_the_model_does(dtype, most):
    """In bfloat16 less: only weights, keys and values are rounded, and no activations."""
    model = make(dtype, dim=96, n_heads=6, n_layers=4)
    exact = make(dtype, dim=96, n_heads=6, n_layers=4).double()
    caches = [m.make_cache(4) for m in (model, model, exact)]
    step = stepper(model, caches[1])
    errors = torch.zeros(2)
    for position in range(20):
        ids, positions = [position, 5, 7, 90 - position], [position] * 4
        truth = plain_step(exact, caches[2], ids, positions)
        found = plain_step(model, caches[0], ids, positions), step([[i] for i in ids], positions)[:, 0]
        errors += torch.tensor([float((logits - truth).square().mean()) for logits in found])
    assert 0 < errors[1] < most * errors[0]


def test_the_number_of_threads_changes_nothing():
    model, found = make(torch.float32, n_kv_heads=1, hidden_dim=33), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            cache = model.make_cache(3)
            step = stepper(model, cache)
            found.append(torch.stack([step([[1, 2], [3], [4, 5, i]], [2 * i, i, 3 * i]) for i in range(5)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_runs_may_go_to_some_rows_of_the_cache_and_be_cut_anywhere():
    """Bit for bit as alone: in any rows, beside any others, a text in any pieces."""
    model = make(torch.float32, n_kv_heads=1, hidden_dim=33)
    cache, draw = model.make_cache(5), random.Random(0)
    step = stepper(model, cache)
    texts = {place: draw.choices(range(101), k=30) for place in (3, 0, 4)}
    fed, found = dict.fromkeys(texts, 0), {}
    while fed.keys() - found.keys():
        places = draw.sample(sorted(fed.keys() - found.keys()), k=draw.randint(1, len(fed) - len(found)))
        runs = [texts[place][fed[place] : fed[place] + draw.randint(1, 9)] for place in places]
        logits = step(runs, [fed[place] for place in places], 1, places)
        for place, run, row in zip(places, runs, logits):
            fed[place] += len(run)
            if fed[place] == 30:
                found[place] = row
    for place, text in texts.items():
        alone = stepper(model, one := model.make_cache(1))([text], [0])[0]
        assert torch.equal(found[place], alone)
        assert torch.equal(cache.keys[:, place, :, :30], one.keys[:, 0, :, :30])
    assert not cache.keys[:, [1, 2]].any()


def test_rows_may_leave_and_weights_may_change_on_the_way():
    model = make()
    caches = [model.make_cache(3) for _ in range(2)]
    step = stepper(model, caches[1])
    plain_step(model, caches[0], [1, 2, 3], [0, 0, 0])
    step([[1], [2], [3]], [0, 0, 0])
    for cache in caches:
        cache.reorder(torch.tensor([2, 0]))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    expected = plain_step(model, caches[0], [4, 5], [1, 1])
    torch.testing.assert_close(step([[4], [5]], [1, 1])[:, 0], expected, rtol=1e-12, atol=1e-12)


def test_the_cache_grows_under_it(monkeypatch):
    """Addresses and rotary tables are those of the larger tensors from then on."""
    monkeypatch.setattr("attention.cache.BLOCK", 2)
    assert walk(make(), [3, 1, 2], steps=12, most=3) < 1e-12
    assert walk(make(sliding_window=5), [1], steps=30) < 1e-12


def test_what_does_not_fit_the_cache_is_refused():
    model = make()
    step = stepper(model, model.make_cache(2, 10))
    ten = r"2 rows of 10 tokens"
    for runs, past, n, match, *places in [
        ([[1], [2]], [10, 0], 1, ten),
        ([[1], [2, 3]], [0, 9], 1, ten),
        ([[1], [2]], [0, -1], 1, ten),
        ([[1]], [0], 1, ten),
        ([[1], [2]], [0, 0], 1, ten, [0, 2]),
        ([[1], [2]], [0, 0], 1, ten, [1, 1]),
        ([[1], [2, 101]], [0, 0], 1, r"ids 0\.\.100"),
        ([[1], [2, 3]], [0, 0], 2, "n should be at most 1, the length of the shortest run, found 2"),
    ]:
        with pytest.raises(ValueError, match=match):
            step(runs, past, n, *places)


def test_only_what_it_computes_right_is_taken():
    def refused(change=None, model=None, **cache):
        model = model or make(torch.float32)
        if change:
            change(model)
        return not cpu_step.supports(model, model.make_cache(1, **cache))

    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

    assert not refused()
    assert refused(lambda m: setattr(m.model.layers[0].mlp, "up_proj", Adapted(m.model.layers[0].mlp.up_proj)))
    assert refused(lambda m: m.model.layers[0].register_forward_hook(lambda *_: None))
    assert refused(lambda m: setattr(m.lm_head, "forward", m.lm_head.forward))
    assert refused(lambda m: m.model.norm.double())
    assert refused(lambda m: setattr(m, "compute_dtype", torch.bfloat16))
    assert refused(lambda m: m.to("meta"))
    assert refused(lambda m: m.half())
    assert refused(kind="int8")
    with backends.use("sdpa"):  # who names a back-end wants to see that one at work
        assert refused()
    growing = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 20}
    assert refused(model=make(torch.float32, rope_scaling=growing))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As if nothing had been compiled before; the cache directory is `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_step.compiled_step.cache_clear()
    yield monkeypatch
    cpu_step.compiled_step.cache_clear()


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_or_when_told_so_it_is_left_out(fresh, capsys):
    fresh.setenv("LITTLE_LLAMA_ENGINE", "off")
    model = make(torch.float32)
    assert cpu_step.stepper(model, model.make_cache(1)) is None
    cpu_step.compiled_step.cache_clear()
    fresh.delenv("LITTLE_LLAMA_ENGINE")
    fresh.setenv("PATH", "")
    assert cpu_step.compiled_step() is None
    assert capsys.readouterr().err == ""


def test_a_compiler_that_fails_is_named_once(fresh, tmp_path, capsys):
    fresh.setenv("CXX", compiler(tmp_path / "broken", 'test "$1" = --version && exit 0; echo no such flag >&2; exit 1'))
    assert cpu_step.compiled_step() is None and cpu_step.compiled_step() is None
    assert capsys.readouterr().err == "decoding goes without its compiled step: no such flag\n"
    assert list((tmp_path / "little-llama").iterdir()) == []


def test_it_is_compiled_once(fresh, tmp_path):
    log = tmp_path / "log"
    fresh.setenv("CXX", compiler(tmp_path / "logging", f'echo x >> {log}; exec g++ "$@"'))
    if cpu_step.compiled_step() is None:
        pytest.skip("there is no g++")
    calls = len(log.read_text())
    cpu_step.compiled_step.cache_clear()
    assert cpu_step.compiled_step() is not None
    assert len(log.read_text()) == calls + 2  # it was asked for its version only


def the_library(tmp_path: Path) -> Path:
    (library,) = (tmp_path / "little-llama").glob("*.so")
    return library


def compiled_or_skip():
    cpu_step.compiled_step.cache_clear()
    if cpu_step.compiled_step() is None:
        pytest.skip("there is no C++ compiler that works")


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),  # SIGBUS when it is loaded
    "empty": lambda path: path.write_bytes(b""),
    "another byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
    "written by all": lambda path: path.chmod(0o666),
    "gone": Path.unlink,
}


def test_a_damaged_library_is_compiled_again(fresh, tmp_path):
    compiled_or_skip()
    path, log, kept = the_library(tmp_path), tmp_path / "log", tmp_path / "kept.so"
    contents = path.read_bytes()
    assert path.stem.rpartition("-")[2] == hashlib.sha256(contents).hexdigest()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    kept.write_bytes(contents)
    # a compiler that takes no time
    script = f'test "$1" = --version && exec g++ "$@"; echo x >> {log}; while test "$1" != -o; do shift; done'
    fresh.setenv("CXX", compiler(tmp_path / "quick", f"{script}; cp {kept} $2"))
    for n, damage in enumerate(DAMAGE.values(), 1):
        path.unlink()  # the process still maps the old file
        path.write_bytes(contents)
        path.chmod(0o700)
        damage(path)
        compiled_or_skip()
        assert log.read_text() == "x\n" * n
        assert the_library(tmp_path) == path and path.read_bytes() == contents


def test_a_directory_of_another_user_is_not_used(fresh, tmp_path, capsys):
    fresh.setenv("CXX", compiler(tmp_path / "never_run", "exit 0"))
    fresh.setattr(os, "getuid", lambda: 12345)
    assert cpu_step.compiled_step() is None
    assert "little-llama belongs to another user: set XDG_CACHE_HOME" in capsys.readouterr().err


def test_without_a_home_it_is_left_out(fresh, tmp_path, capsys):
    fresh.setenv("CXX", compiler(tmp_path / "never_run", "exit 0"))
    fresh.delenv("XDG_CACHE_HOME")
    fresh.delenv("HOME", raising=False)
    fresh.setattr("pwd.getpwuid", lambda _: {}[0])  # a user id without an entry, as in containers
    assert cpu_step.compiled_step() is None
    assert capsys.readouterr().err == "decoding goes without its compiled step: Could not determine home directory.\n"

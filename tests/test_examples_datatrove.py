"""The example for corpora of many machines, under datatrove and under a stand-in that calls each task in turn."""

import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers.data_process_runs import write_texts
from helpers.tiny_texts import made_up_texts, train_tiny_tokenizer

from bins.token_bin import TokenBin, find_bins

EXAMPLE = Path(__file__).parents[1] / "examples" / "datatrove_bins.py"


class InTurn:
    """LocalPipelineExecutor(pipeline, tasks=...).run() calls every step with (data, rank, world_size), as datatrove."""

    def __init__(self, pipeline, tasks, workers, logging_dir) -> None:
        self.pipeline, self.tasks = pipeline, tasks

    def run(self) -> None:
        for rank in range(self.tasks):
            data = None
            for step in self.pipeline:
                data = step(data, rank, self.tasks)
            assert not data


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Run the example with some flags on five files of texts."""
    monkeypatch.setitem(sys.modules, "datatrove", types.ModuleType("datatrove"))
    monkeypatch.setitem(sys.modules, "datatrove.executor", types.SimpleNamespace(LocalPipelineExecutor=InTurn))
    words = make_input(tmp_path)

    def run(*flags: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["datatrove_bins.py", *map(str, words), *flags])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return tmp_path / "out"

    return run


def make_input(folder: Path) -> list:
    """Write five files of texts and a tokenizer; return the flags that name them."""
    tokenizer = train_tiny_tokenizer(folder)
    (folder / "texts").mkdir()
    texts = made_up_texts(50)
    for i in range(5):
        write_texts(folder / "texts" / f"part{i}.jsonl", texts[i::5])
    return ["--input", folder / "texts", "--tokenizer", tokenizer, "--out", folder / "out"]


def test_all_documents_lie_in_the_bins_of_the_parts_and_the_manifest_lists_them(example):
    out = example("--tasks", "2")
    bins = [TokenBin(path) for kind in ("train*.bin", "heldout.bin") for path in find_bins(out, kind)]
    assert sum(bin.meta["documents"] for bin in bins) == 50
    assert (out / "tokenizer").is_dir() and len(find_bins(out, "train*.bin")) == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest) == ["00000", "00001"] and sum(part["total"]["documents"] for part in manifest.values()) == 50
    for name, part in manifest.items():
        assert part["bins"]["train_00000"]["sha256"] == TokenBin(out / name / "train_00000.bin").sha256()


def test_more_tasks_than_files_is_one_sentence(example):
    with pytest.raises(SystemExit, match=r"--tasks 6 needs as many files, found 5 in .*texts: lower it"):
        example("--tasks", "6")


def test_datatrove_makes_the_same_bins(example, tmp_path):
    pytest.importorskip("datatrove")
    (tmp_path / "of_datatrove").mkdir()
    words = make_input(tmp_path / "of_datatrove")
    command = [sys.executable, str(EXAMPLE), *map(str, words), "--tasks", "2", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    outs = example("--tasks", "2"), tmp_path / "of_datatrove" / "out"
    ours, theirs = (find_bins(out, "train*.bin") for out in outs)
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]

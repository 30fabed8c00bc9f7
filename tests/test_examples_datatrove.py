"""The example for corpora of many machines, under a stand-in for datatrove's executor: it calls each task in turn."""

import json
import runpy
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
    tokenizer = train_tiny_tokenizer(tmp_path)
    (tmp_path / "texts").mkdir()
    texts = made_up_texts(50)
    for i in range(5):
        write_texts(tmp_path / "texts" / f"part{i}.jsonl", texts[i::5])

    def run(*flags: str) -> Path:
        words = ["--input", tmp_path / "texts", "--tokenizer", tokenizer, "--out", tmp_path / "out", *flags]
        monkeypatch.setattr(sys, "argv", ["datatrove_bins.py", *map(str, words)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return tmp_path / "out"

    return run


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

"""Runs of data_process.py on texts of a test, and what they leave."""

import json
from pathlib import Path

from bins.token_bin import TokenBin
from corpora import SourceArgs
from data_process import Args, main

NOT_COMPARED = {"config.yaml", "run.json"}  # they say how the run was made: paths, processes, versions


class Runs:
    """Called, it runs data_process in this process, on texts or on `source`, and returns the folder and the summary."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def __call__(self, texts: list[str] | None, name: str = "out", **changes) -> tuple[Path, dict]:
        if texts is not None:
            write_texts(self.folder / "texts.jsonl", texts)
        source = changes.pop("source", SourceArgs(input=(self.folder / "texts.jsonl",)))
        settings = {**vars(source), "processes": 1, "held_out": 0.1, **changes}
        out = self.folder / name
        return out, main(Args(tokenizer=self.tokenizer, out=out, **settings))


def write_texts(path: Path, texts: list[str]) -> None:
    """JSON lines; a file that already says the same keeps its date, which data_process looks at."""
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if not path.is_file() or path.read_bytes() != data:
        path.write_bytes(data)


def decoded(path: Path, tokenizer) -> list[str]:
    """The documents of a bin as texts, split where its index says, eos at each end."""
    bin = TokenBin(path)
    spans = [bin.tokens[a:b].tolist() for a, b in zip(bin.offsets[:-1], bin.offsets[1:])]
    assert all(ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in spans)
    return [tokenizer.decode(ids[:-1]) for ids in spans]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in NOT_COMPARED}

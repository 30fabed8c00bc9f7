"""The files of a run: a stop at any step of publishing leaves what the next run can finish, never a mixture."""

from pathlib import Path

import pytest

from bins.outputs import publish, read_checkpoint, read_summary
from bins.token_bin import BinWriter, TokenBin
from files import write_json

EOS = 2


def write_run(folder: Path, bins: dict[str, list[int]], texts: dict[str, str]) -> dict:
    """Bins with one document each and other files, as a run leaves them; their summary."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in bins.items():
        with BinWriter(folder / name, 100, EOS, "a" * 64) as writer:
            writer.add([*ids, EOS])
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {"files": {path.name: path.stat().st_size for path in folder.iterdir()}, "made_from": sorted(bins)}


def readable(folder: Path) -> dict[str, list[int]]:
    found = {}
    for path in folder.glob("*.bin"):
        try:
            found[path.stem] = TokenBin(path).tokens.tolist()
        except ValueError:
            found[path.stem] = ["refused"]
    return found


def test_publishing_can_be_stopped_at_every_step(tmp_path, monkeypatch):
    """Over an older run with more files and equal sizes: every bin is the old one, the new one, or refused."""
    old = {"train_00000": [5, 5], "train_00001": [6, 6], "heldout": [7, 7]}
    new = {"train_00000": [8, 8], "heldout": [9, 9]}
    real = {"replace": Path.replace, "unlink": Path.unlink}
    for stop in range(100):
        out, work = tmp_path / str(stop), tmp_path / str(stop) / "data_process.part"
        write_json(out_made(out) / "summary.json", write_run(out, old, {"all_text.txt": "old"}))
        summary = write_run(work, new, {"sft_train.jsonl": "new"})
        left = [stop]

        def step(name, left=left):
            def run(*args, **kwargs):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real[name](*args, **kwargs)

            return run

        stopped = False
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, step(name))
            try:
                publish(work, out, summary)
            except KeyboardInterrupt:
                stopped = True
        for name, tokens in readable(out).items():
            assert tokens in ([*old.get(name, ["refused"]), EOS], [*new.get(name, ["refused"]), EOS], ["refused"])
        if stopped:
            assert read_summary(out, summary["made_from"], overwrite=True) is None
            publish(work, out, summary)
        assert readable(out) == {name: [*ids, EOS] for name, ids in new.items()}
        assert {path.name for path in out.iterdir()} == {*summary["files"], "summary.json"}
        assert read_summary(out, summary["made_from"], overwrite=False) == summary
        if not stopped:
            break
    assert stop == 1 + 1 + 3 + 2 + 7 + 1  # summary; all_text; train_00001's three; two .json; seven moves; summary


def out_made(out: Path) -> Path:
    out.mkdir()
    return out


def test_a_checkpoint_is_for_the_same_arguments(tmp_path):
    work = tmp_path / "work"
    assert read_checkpoint(work, {"min_chars": 1}, overwrite=False) is None
    work.mkdir()
    (work / "left.bin.part").write_bytes(b"worthless without a checkpoint")
    assert read_checkpoint(work, {"min_chars": 1}, overwrite=False) is None and not work.exists()
    work.mkdir()
    progress = {"made_from": {"min_chars": 1}, "items": 5}
    write_json(work / "progress.json", progress)
    assert read_checkpoint(work, {"min_chars": 1}, overwrite=False) == progress
    with pytest.raises(ValueError, match="unfinished run with other min_chars"):
        read_checkpoint(work, {"min_chars": 2}, overwrite=False)
    assert read_checkpoint(work, {"min_chars": 2}, overwrite=True) is None and not work.exists()

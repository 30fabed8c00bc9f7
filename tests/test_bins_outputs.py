"""The files of a run: a stop at any step of publishing leaves what the next run can finish, never a mixture."""

from pathlib import Path

import pytest

from bins.outputs import HashedFile, damaged_output, publish, read_checkpoint, read_summary, sums_of
from bins.token_bin import BinWriter, TokenBin
from files import read_sealed, write_json, write_sealed

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
    progress = {"made_from": {"min_chars": 1}, "items": 5, "outputs": {}}
    write_sealed(work / "progress.json", progress)
    assert read_checkpoint(work, {"min_chars": 1}, overwrite=False) == progress
    with pytest.raises(ValueError, match="unfinished run with other min_chars"):
        read_checkpoint(work, {"min_chars": 2}, overwrite=False)
    assert read_checkpoint(work, {"min_chars": 2}, overwrite=True) is None and not work.exists()


def test_what_an_interrupted_run_has_written_is_compared_before_it_is_used(tmp_path, capsys):
    work = tmp_path / "work"
    write_run(work, {"train_00000": [3, 4]}, {})
    file = HashedFile(work / "all_text.txt", 0)
    file.write(b"some text")
    file.sync()
    outputs = {"finished": sums_of(sorted(work.glob("train*"))), "sums": file.sums()}
    file.write(b" and more")  # after the checkpoint
    file.close()
    assert damaged_output([work], outputs) is None
    whole = {path: path.read_bytes() for path in work.iterdir()}
    for path, data in whole.items():
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert f"{path} is damaged" in damaged_output([tmp_path, work], outputs)
        path.unlink()
        assert damaged_output([work], outputs) == f"{path.name} is missing"
        path.write_bytes(data)
    progress = {"made_from": {}, "items": 5, "outputs": outputs}
    write_sealed(work / "progress.json", progress)
    assert read_checkpoint(work, {}, overwrite=False) == progress
    (work / "all_text.txt").write_bytes(b"some test and more")
    assert read_checkpoint(work, {}, overwrite=False) is None and not work.exists()
    assert "all_text.txt is damaged" in capsys.readouterr().err


def test_progress_has_its_own_sum(tmp_path):
    path = tmp_path / "progress.json"
    assert read_sealed(path) is None
    write_sealed(path, {"items": 40, "name": "\udc80"})
    assert read_sealed(path) == {"items": 40, "name": "\udc80"}
    path.write_bytes(path.read_bytes().replace(b"40", b"48"))
    with pytest.raises(ValueError, match=r"progress\.json is damaged"):
        read_sealed(path)

"""A run that goes on from where another was left, and what it refuses to go on from."""

import json
import shutil
import subprocess

import pytest
import torch
from helpers.tiny_training_run import Changed, quick, rows, toy_data, toy_trainer  # noqa: F401

from checkpoint.directory import load_model
from distributed.single import SingleProcess
from optim.args import OptimArgs
from training import trainer
from training.state import checkpoints, load_state


def test_killed_after_the_last_evaluation(tmp_path):
    data = toy_data(tmp_path)
    result = toy_trainer(tmp_path / "run", data, max_steps=4, eval_data=data).fit()
    before = rows(tmp_path / "run"), load_state(tmp_path / "run" / "last")["progress"]
    (tmp_path / "run" / "result.json").unlink()
    assert toy_trainer(tmp_path / "run", data, max_steps=4, eval_data=data).fit() == result
    assert (rows(tmp_path / "run"), load_state(tmp_path / "run" / "last")["progress"]) == before


class Stop(Exception):
    pass


def test_a_finished_run_returns_at_once(tmp_path, capsys):
    data = toy_data(tmp_path)
    result = toy_trainer(tmp_path / "run", data, max_steps=4, eval_data=data).fit()
    again = toy_trainer(tmp_path / "run", data, max_steps=4, eval_data=data)
    again.data = again.eval_data = again.log = None  # nothing of these is touched
    assert again.fit() == result
    assert "run is finished (4 steps): nothing to do" in capsys.readouterr().err
    longer = toy_trainer(tmp_path / "run", data, max_steps=6, eval_data=data).fit()
    assert longer["steps"] == 6
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == longer

    def stop(step, batch):
        raise Stop

    with pytest.raises(Stop):
        toy_trainer(tmp_path / "run", Changed(data, stop), max_steps=8).fit()
    assert not (tmp_path / "run" / "result.json").exists()  # it was the shorter run's


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_going_on_continues_the_very_same_losses(tmp_path, dtype, optimizer):
    data, optim = toy_data(tmp_path), OptimArgs(optimizer=optimizer, lr=0.01, muon_lr=0.01, warmup_steps=3)
    changes = {"max_steps": 14, "save_interval": 4, "eval_interval": 5, "dtype": dtype, "log_interval": 3}
    torch.manual_seed(1)
    whole = toy_trainer(tmp_path / "whole", data, optim, eval_data=data, **changes).fit()

    def stop(step, batch):
        if step == 10 and not resumed:
            raise Stop
        return batch

    resumed = False
    torch.manual_seed(1)
    with pytest.raises(Stop):
        toy_trainer(tmp_path / "cut", Changed(data, stop), optim, eval_data=data, **changes).fit()
    resumed = True
    torch.manual_seed(2)  # nothing of the fresh model remains
    parts = toy_trainer(tmp_path / "cut", Changed(data, stop), optim, eval_data=data, **changes).fit()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert {k: v for k, v in parts.items() if k != "model"} == {k: v for k, v in whole.items() if k != "model"}
    a, b = (load_model(tmp_path / name / "last").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_identity_is_refused(tmp_path):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=2, identity={"seed": 0, "seq_len": 16}).fit()
    with pytest.raises(ValueError, match=r"holds a run with seq_len 16, and this one has 32: .* choose another --out"):
        toy_trainer(tmp_path / "run", data, max_steps=2, identity={"seed": 0, "seq_len": 32})
    with pytest.raises(ValueError, match="with weights None, and this one has"):
        toy_trainer(tmp_path / "run", data, max_steps=2, identity={"seed": 0, "weights": [1.0]})


def test_going_on_in_another_dtype(tmp_path):
    data = toy_data(tmp_path)
    for steps, dtype in ((2, "fp32"), (4, "fp16"), (6, "fp32")):
        assert toy_trainer(tmp_path / "run", data, max_steps=steps, dtype=dtype).fit()["steps"] == steps


def test_processes_that_find_different_checkpoints_are_refused(tmp_path):
    data = toy_data(tmp_path)
    ours = toy_trainer(tmp_path / "run", data, max_steps=2)
    ours.backend.gather = lambda step: [step, 4]  # as on a second machine with a disk of its own
    with pytest.raises(ValueError, match=r"checkpoints of different steps \(0, 4\) in .*/run: put it on"):
        trainer.Trainer(
            *(ours.model, ours.optimizer, data, ours.backend, ours.args, ours.optim, ours.run),
            **{"save": ours.checkpoints.write, "load": ours.checkpoints.read, "identity": {"seed": 0}},
        )


def test_starting_anew_on_request(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no such attention")

    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=6, save_interval=2, identity={"seed": 5}).fit()
    torch.manual_seed(0)
    monkeypatch.setattr(trainer, "prepare", refuse)
    with pytest.raises(ValueError, match="no such attention"):
        toy_trainer(tmp_path / "run", data, max_steps=3, resume="never").fit()
    assert (tmp_path / "run" / "result.json").is_file() and len(checkpoints(tmp_path / "run")) == 3
    monkeypatch.undo()
    toy_trainer(tmp_path / "run", data, max_steps=3, resume="never").fit()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000003"]


@pytest.mark.parametrize(("began", "names"), [(0, "was None"), (2, "was step_00000002")])
def test_a_run_that_another_process_has_changed_meanwhile_is_refused(began, names, tmp_path):
    data = toy_data(tmp_path)
    if began:
        toy_trainer(tmp_path / "run", data, max_steps=began).fit()
    late = toy_trainer(tmp_path / "run", data, max_steps=6)  # has looked at the run, and is not in it yet
    toy_trainer(tmp_path / "run", data, max_steps=4).fit()
    with pytest.raises(
        ValueError, match=f"another process has changed .*run meanwhile.* {names}, and is step_00000004"
    ):
        late.fit()
    assert toy_trainer(tmp_path / "run", data, max_steps=6).fit()["steps"] == 6


def test_rows_that_do_not_divide_are_refused_before_an_older_run_is_replaced(tmp_path):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=2).fit()
    four = SingleProcess(torch.device("cpu"))
    four.world = 4
    with pytest.raises(ValueError, match="batch_size 6 does not divide over 4 processes: use a multiple of 4"):
        toy_trainer(tmp_path / "run", data, resume="never", use_backend=four)
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


def test_a_last_that_leads_nowhere_is_refused_not_started_anew(tmp_path):
    data, run = toy_data(tmp_path), tmp_path / "run"
    toy_trainer(run, data, max_steps=6, save_interval=2).fit()
    shutil.rmtree(run / "step_00000006")
    with pytest.raises(
        ValueError, match=r"last leads to step_00000006, which does not exist \(.*: step_00000002, step_0000"
    ):
        toy_trainer(run, data, max_steps=6)
    assert toy_trainer(run, data, max_steps=6, resume="never").fit()["steps"] == 6
    shutil.rmtree(run / "step_00000006")
    with pytest.raises(ValueError, match=r"existing checkpoints: none"):
        toy_trainer(run, data, max_steps=6)


def flip(path, where=0.5):
    """Flip one bit of a file, at this share of its length."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def test_sums_are_those_of_sha256sum_and_of_every_file(tmp_path):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=2).fit()
    last = (tmp_path / "run" / "last").resolve()
    sums = json.loads((last / "training_state" / "sha256.json").read_text())
    files = {path.relative_to(last).as_posix(): path for path in last.rglob("*") if path.is_file()}
    assert files.keys() - sums.keys() <= {"training_state/sha256.json", "training_state/progress.json"}
    for name, value in sums.items():
        assert value == subprocess.run(["sha256sum", files[name]], capture_output=True, text=True).stdout.split()[0]


def test_a_flip_in_any_file_of_the_last_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "whole", data, max_steps=6, save_interval=2, eval_data=data).fit()
    before = rows(tmp_path / "whole")
    last = (tmp_path / "whole" / "last").resolve()
    names = [path.relative_to(last) for path in last.rglob("*") if path.is_file()]
    assert {"model.safetensors", "state.pt", "sha256.json", "progress.json", "config.json"} <= {n.name for n in names}
    for name in names:
        run = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", run, symlinks=True)
        flip(run / "step_00000006" / name)
        capsys.readouterr()
        toy_trainer(run, data, max_steps=6, save_interval=2, eval_data=data).fit()
        said = capsys.readouterr().err
        # a flip in the list of sums is found at the file whose sum it has changed
        suspects = {each.name for each in names} if name.name == "sha256.json" else {name.name}
        first = said.partition("step_00000006 is damaged: ")[2].partition("\n")[0]
        assert any(suspect in first for suspect in suspects), name
        assert "going on from step 4" in said and "newest whole checkpoint, step_00000004" in said
        assert rows(run) == before
        shutil.rmtree(run)


@pytest.mark.parametrize("harm", ["zeroed", "short", "missing"])
def test_a_damaged_only_checkpoint_is_refused_by_name(tmp_path, harm):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=2).fit()
    weights = (tmp_path / "run" / "last").resolve() / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes({"zeroed": whole[:4096] + bytes(4096) + whole[8192:], "short": whole[:-9]}.get(harm, b""))
    if harm == "missing":
        weights.unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint \(step_00000002: model\.safetensors is "):
        toy_trainer(tmp_path / "run", data, max_steps=3)


def test_a_checkpoint_that_lost_its_training_state_is_damaged(tmp_path, capsys):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=4, save_interval=2).fit()
    shutil.rmtree((tmp_path / "run" / "last").resolve() / "training_state")
    assert toy_trainer(tmp_path / "run", data, max_steps=4, save_interval=2).fit()["steps"] == 4
    said = capsys.readouterr().err
    assert "step_00000004 is damaged: training_state/state.pt is missing" in said and "going on from step 2" in said


def test_an_old_checkpoint_without_sums_goes_on_with_a_notice(tmp_path, capsys):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=2).fit()
    for name in ("sha256.json", "progress.json"):
        (tmp_path / "run" / "last" / "training_state" / name).unlink(missing_ok=True)
    assert toy_trainer(tmp_path / "run", data, max_steps=3).fit()["steps"] == 3
    assert "has no SHA-256 of its files" in capsys.readouterr().err


def test_an_error_in_the_last_evaluation_loses_nothing_and_no_row_stands_twice(tmp_path):
    data = toy_data(tmp_path)
    torch.manual_seed(0)
    whole = toy_trainer(tmp_path / "whole", data, max_steps=5, eval_data=data).fit()
    torch.manual_seed(0)
    broken = toy_trainer(tmp_path / "run", data, max_steps=5, eval_data=data)

    def fail(*_, **__):
        raise ValueError("a damaged held-out bin")

    broken.evaluate = fail
    with pytest.raises(ValueError, match="held-out bin"):
        broken.fit()
    assert load_state(tmp_path / "run" / "last")["progress"]["step"] == 5
    # killed after the row of the evaluation was written, before the checkpoint knew of it
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "eval_loss": 1.0}) + "\n")
    again = toy_trainer(tmp_path / "run", data, max_steps=5, eval_data=data).fit()
    assert [row["step"] for row in rows(tmp_path / "run") if "eval_loss" in row] == [5]
    assert {k: v for k, v in again.items() if k != "model"} == {k: v for k, v in whole.items() if k != "model"}
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_other_data_is_refused_by_name_and_an_old_run_without_its_data_goes_on(tmp_path, capsys):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=2, identity={"seed": 0, "data": {"a.bin": "1", "b.bin": "2"}}).fit()
    with pytest.raises(ValueError, match=r"training data had other contents or another order, in b\.bin: it cannot"):
        toy_trainer(tmp_path / "run", data, max_steps=2, identity={"seed": 0, "data": {"a.bin": "1", "b.bin": "3"}})
    with pytest.raises(ValueError, match=r"another order, in b\.bin: it cannot"):  # one less
        toy_trainer(tmp_path / "run", data, max_steps=2, identity={"seed": 0, "data": {"a.bin": "1"}})
    renamed = {"seed": 0, "data": {"c.bin": "1", "b.bin": "2"}}
    assert toy_trainer(tmp_path / "run", data, max_steps=2, identity=renamed).nothing_to_do
    toy_trainer(tmp_path / "old", data, max_steps=2, identity={"seed": 0}).fit()
    toy_trainer(tmp_path / "old", data, max_steps=2, identity={"seed": 0, "data": {"a.bin": "1"}})
    assert "does not state the contents of its data" in capsys.readouterr().err

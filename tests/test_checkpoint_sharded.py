"""Checkpoints that are written in parts and while steps go on: the same bits as whole ones, for whoever reads them, at
any kill, damage or full disk."""

import errno
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.tiny_training_run import Changed, quick, rows, toy_data, toy_trainer  # noqa: F401

import convert
from checkpoint import history, sharded
from checkpoint.directory import load_model
from checkpoint.sharded_writer import Share
from convert import Import
from lora import adapters
from lora.spec import LoraArgs
from optim.args import OptimArgs
from planning.shapes import find_shape
from quantizing.ladder import files_of_weights
from quantizing.measure import sizes
from training import pending, state
from training.checksums import check_model
from training.state import checkpoints, load_state

FLAGS = {"max_steps": 10, "save_interval": 3, "eval_interval": 4, "log_interval": 3}


class Killed(BaseException):
    pass


def train(run, data, steps=None, seed=0, **changes):
    """Train, and stop before the batch of step `steps`, as if killed."""

    def stop(step, batch):
        if step == steps:
            raise Killed
        return batch

    torch.manual_seed(seed)
    return toy_trainer(run, Changed(data, stop), eval_data=data, **FLAGS | {"save": "sharded"} | changes).fit()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with the data, and the same run with whole checkpoints and with sharded ones."""
    folder = tmp_path_factory.mktemp("sharded")
    data = toy_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.trainer.peak_flops", lambda *_: (1e12, "not measured"))
        results = [train(folder / save, data, save=save) for save in ("whole", "sharded")]
    assert [{**each, "model": ""} for each in results[1:]] == [{**results[0], "model": ""}]
    return SimpleNamespace(folder=folder, data=data, whole=folder / "whole", sharded=folder / "sharded")


def equal(one, other):
    ours, theirs = (model.state_dict() for model in (one, other))
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_numbers_are_those_of_whole_checkpoints(both):
    assert rows(both.sharded) == rows(both.whole)
    for link in ("last", "best"):
        model = load_model(both.sharded / link)
        assert equal(model, load_model(both.whole / link))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not list((both.sharded / link).glob("*.safetensors"))
        check_model(both.sharded / link)
        assert history.parameters(both.sharded / link) == history.parameters(both.whole / link) == model.n_parameters()
        assert {path.name for path in files_of_weights(both.sharded / link)} == {".metadata", "__0_0.distcp"}
        assert find_shape(str(both.sharded / link)).command.startswith("--init_from")
        found = sizes(both.sharded / link, model)  # without the moments, which lie in the same files
        assert found["bytes"] == 4 * model.n_parameters()
        assert found["bits_per_parameter"] == found["bits_per_weight"] == 32
    state, stored = (load_state(run / "last") for run in (both.whole, both.sharded))
    moments = sharded.Sharded(model).moments(both.sharded / "last")
    assert moments.keys() == state["moments"].keys() and stored["moments"] == {}
    for name, values in state["moments"].items():
        assert dict(moments[name]).keys() == values.keys()
        assert all(torch.equal(moments[name][key], value) for key, value in values.items())
    assert [path.name for path in checkpoints(both.sharded)] == [path.name for path in checkpoints(both.whole)]


def test_torch_reads_the_files_too(both):
    model = load_model(both.whole / "last")
    state = {f"weights.{name}": torch.zeros_like(p) for name, p in model.named_parameters()}
    dcp.load(state, checkpoint_id=both.sharded / "last" / "sharded", no_dist=True)
    assert all(torch.equal(state[f"weights.{name}"], p) for name, p in model.named_parameters())
    metadata = (both.sharded / "last" / "sharded" / ".metadata").read_bytes()
    assert str(both.folder).encode() not in metadata  # neither a path of this machine nor a random name


def test_the_bytes_do_not_depend_on_the_order_of_moments(both, tmp_path):
    """An optimizer that has loaded its state may have it in another order than one that has made it."""
    model = load_model(both.whole / "last")
    weights = {p: p.detach() for p in model.parameters()}
    moments = {name: {"step": torch.ones(()), "exp_avg": p.detach()} for name, p in model.named_parameters()}
    turned = {name: dict(reversed(values.items())) for name, values in reversed(moments.items())}
    for name, each in (("a", moments), ("b", turned)):
        share = sharded.Sharded(model).start(tmp_path / name, weights, each, 0, lambda value: [value])
        results, files = share.write()
        share.finish([results])
        assert files == [tmp_path / name / "sharded" / "__0_0.distcp"]
    for name in ("__0_0.distcp", ".metadata"):
        assert (tmp_path / "a" / "sharded" / name).read_bytes() == (tmp_path / "b" / "sharded" / name).read_bytes()


@pytest.mark.parametrize("source", ["last", "last/sharded"])
def test_convert_makes_a_plain_directory(both, source, tmp_path):
    out = tmp_path / "plain"
    convert.import_(Import(source=both.sharded / source, out=out))
    assert equal(load_model(out), load_model(both.whole / "last"))
    assert list(out.glob("*.safetensors")) and not (out / "sharded").exists()


@pytest.mark.parametrize("first, then", [("sharded", "sharded"), ("sharded", "whole"), ("whole", "sharded")])
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "galore_adamw", "adamw8bit"])
def test_a_killed_run_goes_on_bit_for_bit(both, tmp_path, optimizer, first, then):
    if optimizer in ("galore_adamw", "adamw8bit") and (first, then) != ("sharded", "sharded"):
        pytest.skip("their moments, of other shapes and dtypes, go the same way")
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    optim = OptimArgs(optimizer=optimizer, lr=0.01, **{"muon_lr": 0.01} if optimizer == "muon" else {})
    whole = both.folder / f"whole {optimizer}"
    if not whole.exists():
        train(whole, both.data, optim=optim, save="whole")
    for steps, save in ((5, first), (8, then)):
        with pytest.raises(Killed):
            train(tmp_path / "run", both.data, steps, steps - 5, optim=optim, save=save)
    train(tmp_path / "run", both.data, seed=3, optim=optim, save=then)
    assert rows(tmp_path / "run") == rows(whole)
    assert equal(load_model(tmp_path / "run" / "last"), load_model(whole / "last"))


@pytest.mark.parametrize("save", ["whole", "sharded"])
def test_steps_go_on_and_change_nothing_of_what_is_written(both, tmp_path, monkeypatch, save):
    """The writer waits for a step that comes after the save: where that step waited for the writer, neither came."""
    later, saved = threading.Event(), []
    to_disk = pending.to_disk

    def slow(aside, *more):
        assert later.wait(60), "no step was done while the checkpoint was written"
        saved.append(aside.name)
        return to_disk(aside, *more)

    monkeypatch.setattr(pending, "to_disk", slow)

    def batch(step, made):
        if step == 5:  # two steps after the save
            assert (
                not (tmp_path / "run" / "last").exists() or (tmp_path / "run" / "last").resolve().name < "step_00000004"
            )
            later.set()
        return made

    torch.manual_seed(0)
    flags = FLAGS | {"save": save, "save_interval": 0, "eval_interval": 4, "keep": 9}
    toy_trainer(tmp_path / "run", Changed(both.data, batch), eval_data=both.data, **flags).fit()
    assert saved[0] == ".step_00000004.writing"
    expected = both.folder / "kept"
    if not expected.exists():
        train(expected, both.data, save="whole", keep=9, save_interval=0)
    assert equal(load_model(tmp_path / "run" / "step_00000004"), load_model(expected / "step_00000004"))
    assert {path.name for path in checkpoints(tmp_path / "run")} == {path.name for path in checkpoints(expected)}


def test_steps_do_not_wait_until_old_checkpoints_are_removed(both, tmp_path, monkeypatch):
    later, prune = threading.Event(), state.prune

    def slow(*given):
        assert later.wait(20), "no step was done while old checkpoints were removed"
        prune(*given)

    def batch(step, made):
        if step == 5:  # the step after the save lets the checkpoint appear
            until = time.monotonic() + 20
            while not trainer.checkpoints.done() and time.monotonic() < until:
                time.sleep(0.01)
        if step == 6:
            assert (tmp_path / "last").resolve().name == "step_00000005"
            later.set()
        return made

    monkeypatch.setattr(state, "prune", slow)
    flags = FLAGS | {"save_interval": 5, "eval_interval": 0, "keep": 1}
    trainer = toy_trainer(tmp_path, Changed(both.data, batch), **flags)
    trainer.fit()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000010"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.unlink()]
)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_damage_is_named_and_the_checkpoint_before_is_used(both, tmp_path, capsys, name, harm):
    with pytest.raises(Killed):
        train(tmp_path / "run", both.data, 7)
    newest = (tmp_path / "run" / "last").resolve()
    harm(newest / "sharded" / name)
    with pytest.raises(ValueError, match=r"sharded/.*(is|are|and its) (damaged|missing|not)|damaged|missing"):
        check_model(newest)
    train(tmp_path / "run", both.data)
    said = capsys.readouterr().err
    assert f"{newest} is damaged: sharded/{name} is " in said
    assert "from its newest whole checkpoint, step_00000004" in said
    assert rows(tmp_path / "run") == rows(both.whole)
    assert equal(load_model(tmp_path / "run" / "last"), load_model(both.whole / "last"))


def test_damaged_files_of_a_model_are_refused_without_sums_too(both, tmp_path):
    shutil.copytree(both.sharded / "last", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "training_state")
    load_model(tmp_path / "model")
    part = tmp_path / "model" / "sharded" / "__0_0.distcp"
    content = part.read_bytes()
    part.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"__0_0\.distcp is truncated"):
        load_model(tmp_path / "model")
    part.unlink()
    with pytest.raises(ValueError, match=r"__0_0\.distcp is missing: copy the whole checkpoint"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "sharded" / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="metadata is"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("save", ["whole", "sharded"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(both, tmp_path, monkeypatch, save):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    number = []

    def second(aside, *more):
        number.append(aside)
        return full() if len(number) == 2 else to_disk(aside, *more)

    to_disk = pending.to_disk
    monkeypatch.setattr(pending, "to_disk", second)
    with pytest.raises(OSError, match=r"could not write .*step_00000004, what was saved before is as it was"):
        train(tmp_path / "run", both.data, save=save)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000003"]
    assert not list((tmp_path / "run").glob(".step*"))
    train(tmp_path / "run", both.data, save=save)
    assert rows(tmp_path / "run") == rows(both.whole)


def test_a_kill_while_parts_are_written_leaves_the_checkpoint_before(both, tmp_path, monkeypatch):
    """The files of the last save are there in part, as a killed process leaves them, and do not count."""
    write = Share.write

    def half(self):
        write(self)
        if self.folder.parent.name == ".step_00000006.writing":
            flip(self.folder / "__0_0.distcp")
            raise Killed
        return [], []

    with monkeypatch.context() as patch:
        patch.setattr(Share, "write", lambda self: half(self) if "6.writing" in str(self.folder) else write(self))
        patch.setattr("files.shutil.rmtree", lambda *_, **__: None)  # nothing is tidied
        with pytest.raises(Killed):
            train(tmp_path / "run", both.data)
    assert (tmp_path / "run" / ".step_00000006.writing" / "sharded" / "__0_0.distcp").exists()
    train(tmp_path / "run", both.data)
    assert rows(tmp_path / "run") == rows(both.whole)
    assert not list((tmp_path / "run").glob(".step*"))


def test_adapters_are_saved_whole(both, tmp_path):
    model = load_model(both.whole / "last")
    adapters.apply(model, LoraArgs(method="lora"), torch.float32)
    assert sharded.saver_of(model) is None
    with pytest.raises(ValueError, match=r"--train\.save sharded is for models of the LLaMA family that are trained"):
        pending_checkpoints(tmp_path)


def pending_checkpoints(run):
    from training.state import Checkpoints

    return Checkpoints(run, 3, *[None] * 5, {}, sharded=True)

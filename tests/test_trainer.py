"""The loop against a loop written the plainest way, and what it does when things go wrong."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toy import EOS, SHAPE, VOCAB, toy_bin, toy_data, toy_trainer

import runlog
import trainer
from checkpoint import checkpoints, load_model, load_state
from dataset import IGNORE, Batch, PretrainData
from evaluation import evaluate
from hardware import can_compile
from model import ModelArgs, Transformer
from optim import OptimArgs, lr_factor
from runlog import read_metrics
from trainer import TrainArgs

# an epsilon this large keeps AdamW from blowing up the last bit of small gradients
SMOOTH = OptimArgs(optimizer="adamw", lr=0.01, eps=0.01, warmup_steps=3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Neither half a second for the rate of matrix products nor one for the picture, in every run."""
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: (1e12, "not measured"))
    monkeypatch.setattr(runlog, "draw_losses", lambda *_: None)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def rows(run: Path) -> list[dict]:
    """The rows of the log that do not depend on the clock."""
    return [row for row in read_metrics(run / "metrics.jsonl") if "mfu" not in row]


@dataclasses.dataclass
class Changed:
    """A batch source whose batches go through `change(step, batch)`."""

    source: PretrainData
    change: object

    def __getattr__(self, name):
        return getattr(self.source, name)

    def batch(self, step, rank=0, world=1) -> Batch:
        return self.change(step, self.source.batch(step, rank, world))


def weighted(bad_steps) -> object:
    """A change that makes the loss of some steps infinite."""

    def change(step, batch):
        value = math.inf if step in bad_steps else 1.0
        return dataclasses.replace(batch, loss_weights=torch.full(batch.tokens.shape, value))

    return change


# ---- what it computes


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("grad_clip", [0.0, 0.5])
def test_equals_a_plain_loop(tmp_path, schedule, grad_clip):
    data = toy_data(tmp_path)
    optim = OptimArgs(optimizer="adamw", lr=0.01, warmup_steps=3, schedule=schedule)
    ours = toy_trainer(tmp_path / "run", data, optim, max_steps=12, grad_clip=grad_clip, micro_batch_size=4)
    model = Transformer(ours.model.args)
    model.load_state_dict(ours.model.state_dict())
    ours.fit()

    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    expected = []
    for step in range(12):
        batch = data.batch(step)
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        lr = 0.01 * lr_factor(step, 12, optim)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        expected.append({"step": step + 1, "loss": loss.item(), "lr": lr, "grad_norm": norm.item()})
    # float32 with another order of sums, which AdamW's first steps make larger
    for got, want in zip(rows(tmp_path / "run"), expected, strict=False):
        assert {name: got[name] for name in want} == pytest.approx(want, rel=2e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_learns(tmp_path, optimizer, dtype):
    optim = OptimArgs(optimizer=optimizer, lr=0.01, muon_lr=0.01, warmup_steps=5)
    result = toy_trainer(
        tmp_path / "run", toy_data(tmp_path), optim, max_steps=60, dtype=dtype, eval_data=toy_data(tmp_path)
    ).fit()
    curve = losses(tmp_path / "run")
    assert curve[0] == pytest.approx(math.log(VOCAB), abs=0.2)
    # after a document's first token every next one follows from the last; only starts and ends are chance
    assert curve[-1] < 1.2
    assert result["loss"] < 1.2
    assert result["model"] == str(tmp_path / "run" / "best")
    assert all(p.dtype == torch.float32 for p in load_model(tmp_path / "run" / "best").parameters())


def test_bfloat16_follows_the_curve_of_float32(tmp_path):
    data = toy_data(tmp_path)
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(0)
        toy_trainer(tmp_path / dtype, data, max_steps=40, dtype=dtype).fit()
    a, b = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert a != b
    assert max(abs(x - y) for x, y in zip(a, b)) < 0.06  # a curve that falls from 3.4 to below 1.5
    assert sum(a[-10:]) == pytest.approx(sum(b[-10:]), rel=0.02)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5])
def test_accumulation_changes_nothing(tmp_path, micro_batch_size):
    """Rows of very unequal numbers of targets: a mean of the means of micro-batches would be another loss."""

    def change(step, batch):
        targets = batch.targets.clone()
        for row in range(len(targets)):
            targets[row, : 3 * row] = IGNORE
        return dataclasses.replace(batch, targets=targets)

    data = Changed(toy_data(tmp_path), change)
    for size in (0, micro_batch_size):
        torch.manual_seed(0)
        toy_trainer(tmp_path / f"{size}", data, SMOOTH, max_steps=8, micro_batch_size=size).fit()
    whole, parts = rows(tmp_path / "0"), rows(tmp_path / f"{micro_batch_size}")
    assert len(whole) == 8
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=5e-6)  # float32 with another order of sums


def test_gradient_checkpointing_changes_nothing(tmp_path):
    data = toy_data(tmp_path)
    for switch in (False, True):
        torch.manual_seed(0)
        toy_trainer(tmp_path / f"{switch}", data, max_steps=5, gradient_checkpointing=switch).fit()
    assert rows(tmp_path / "True") == rows(tmp_path / "False")


def test_shifted_sparse_attention_trains_long_rows_and_evaluates_in_full(tmp_path):
    data = toy_data(tmp_path)  # rows of 16 tokens
    first = {}
    for name, s2 in {"full": {}, "groups": {"s2_group": 4}, "long": {"s2_group": 4, "s2_min_len": 17}}.items():
        torch.manual_seed(0)
        ours = toy_trainer(tmp_path / name, data, max_steps=1, eval_data=data, **s2)
        ours.fit()
        first[name] = losses(tmp_path / name)[0]
        ours.model.shifted_sparse = None
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert evaluate(ours.model, data, None, None)["loss"] == pytest.approx(result["loss"], rel=1e-6)
    assert first["long"] == first["full"] != first["groups"]


def test_attention_that_cannot_be_had_is_refused_before_the_first_step(tmp_path):
    data = toy_data(tmp_path)
    with pytest.raises(ValueError, match="7 tokens cannot be halved"):
        TrainArgs(s2_group=7)
    with pytest.raises(ValueError, match="a LLaMA with two heads or more"):
        toy_trainer(tmp_path / "a", data, shape={"n_heads": 1}, max_steps=1, s2_group=4).fit()
    with pytest.raises(ValueError, match="pip install"):
        toy_trainer(tmp_path / "b", data, max_steps=1, attention="flash").fit()


def test_training_by_the_formula_follows_the_same_curve(tmp_path):
    data = toy_data(tmp_path, isolate_documents=True)
    for name in ("sdpa", "reference"):
        torch.manual_seed(0)
        toy_trainer(tmp_path / name, data, SMOOTH, max_steps=4, attention=name).fit()
    for a, b in zip(rows(tmp_path / "sdpa"), rows(tmp_path / "reference"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # float32 with another order of sums


def test_tied_and_untied_clip_by_the_norm_over_each_parameter_once(tmp_path):
    data = toy_data(tmp_path)
    for tie in (True, False):
        ours = toy_trainer(tmp_path / f"{tie}", data, shape={"tie_embeddings": tie}, max_steps=1)
        model, batch = ours.model, data.batch(0)
        loss, count = model(batch.tokens, batch.targets)
        grads = torch.autograd.grad(loss / count, list(model.parameters()))
        expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        ours.fit()
        assert rows(tmp_path / f"{tie}")[0]["grad_norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_compiled_follows_the_same_curve(tmp_path):
    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    data = toy_data(tmp_path, isolate_documents=True)
    for switch in ("off", "on"):
        torch.manual_seed(0)
        changes = {"max_steps": 6, "micro_batch_size": 3, "eval_interval": 3, "eval_data": data, "compile": switch}
        toy_trainer(tmp_path / switch, data, SMOOTH, {"n_layers": 1}, **changes).fit()
    for a, b in zip(rows(tmp_path / "off"), rows(tmp_path / "on"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert (
        load_model(tmp_path / "on" / "last").state_dict().keys()
        == Transformer(ModelArgs(**SHAPE | {"n_layers": 1})).state_dict().keys()
    )


# ---- evaluation


def test_bits_per_byte_by_hand(tmp_path):
    data = PretrainData([toy_bin(tmp_path, documents=5)], seq_len=7, batch_size=4, seed=0)
    model = Transformer(ModelArgs(**SHAPE))
    token_bytes = torch.arange(VOCAB).numpy() % 5
    token_bytes[EOS] = 0
    nats, targets, n_bytes = 0.0, 0, 0
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        log_p = model(batch.tokens).double().log_softmax(-1)
        for row in range(4):
            for t in range(7):
                target = batch.targets[row, t].item()
                if target != IGNORE:
                    nats -= log_p[row, t, target].item()
                    targets += 1
                    n_bytes += int(token_bytes[target])
    assert targets == len(data.bins[0])
    measures = evaluate(model, data, token_bytes)
    assert measures == pytest.approx({"loss": nats / targets, "bits_per_byte": nats / math.log(2) / n_bytes}, rel=1e-5)
    assert evaluate(model, data).keys() == {"loss"}
    assert evaluate(model, data, token_bytes, micro_batch_size=3) == pytest.approx(measures, rel=1e-6)  # float32 sums
    first = evaluate(model, data, max_batches=1)["loss"]
    batch = data.batch(0)
    loss, count = model(batch.tokens, batch.targets)
    assert first == pytest.approx((loss / count).item(), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(tmp_path, training):
    model = Transformer(ModelArgs(**SHAPE)).train(training)
    state = torch.get_rng_state()
    evaluate(model, toy_data(tmp_path))
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


# ---- the log


def test_rows_of_the_log(tmp_path):
    data = toy_data(tmp_path)
    result = toy_trainer(
        tmp_path / "run", data, max_steps=10, log_interval=3, eval_interval=4, eval_batches=2, eval_data=data
    ).fit()
    found = read_metrics(tmp_path / "run" / "metrics.jsonl")
    training = [row for row in found if "loss" in row]
    assert [row["step"] for row in training] == [3, 6, 9]
    assert training[0].keys() == {"step", "loss", "lr", "grad_norm", "tokens"}
    assert [row["tokens"] for row in training] == [3 * 6 * 16, 6 * 6 * 16, 9 * 6 * 16]
    assert [row["step"] for row in found if "mfu" in row] == [3, 6, 9]
    assert [row["step"] for row in found if "eval_loss" in row] == [4, 8, 10]
    assert result["steps"] == 10
    assert result["tokens"] == 10 * 6 * 16
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    # a row's loss is the mean over all targets since the row before it
    torch.manual_seed(0)
    toy_trainer(tmp_path / "again", data, max_steps=10).fit()
    each = losses(tmp_path / "again")
    counts = [data.batch(step).n_targets for step in range(10)]
    for i, row in enumerate(training):
        part = slice(3 * i, 3 * i + 3)
        expected = sum(x * n for x, n in zip(each[part], counts[part])) / sum(counts[part])
        assert row["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes, steps", [({"epochs": 2.0}, 2), ({"epochs": 0.5}, 0.5), ({"max_steps": 3}, None)])
def test_length_of_a_run(tmp_path, changes, steps):
    data = toy_data(tmp_path)
    expected = 3 if steps is None else math.ceil(steps * data.steps_per_epoch)
    assert toy_trainer(tmp_path / "run", data, **changes, log_interval=1000).fit()["steps"] == expected


# ---- what is left on disk


def test_checkpoints_best_and_last(tmp_path):
    data = toy_data(tmp_path)
    run = tmp_path / "run"
    # evaluated on what it is not trained on: counting in steps of one, so the first evaluation is the best
    other = Changed(data, lambda step, batch: dataclasses.replace(batch, targets=(batch.targets + 5) % VOCAB))
    optim = OptimArgs(lr=0.02, muon_lr=0.02, warmup_steps=0)
    result = toy_trainer(
        run, data, optim, max_steps=30, eval_interval=7, save_interval=5, keep=2, eval_data=other
    ).fit()
    evals = {row["step"]: row["eval_loss"] for row in rows(run) if "eval_loss" in row}
    best = min(evals, key=evals.get)
    assert best != 30  # the test is about something
    assert (run / "best").resolve().name == f"step_{best:08d}"
    assert (run / "last").resolve().name == "step_00000030"
    assert [path.name for path in checkpoints(run)] == [f"step_{n:08d}" for n in (best, 30)]
    # the result is the measure of the model that it names
    assert result["model"] == str(run / "best")
    assert result["loss"] == pytest.approx(evaluate(load_model(run / "best"), other)["loss"], rel=1e-6)
    assert load_state(run / "last")["progress"]["step"] == 30


def test_without_held_out_data_the_last_is_the_best(tmp_path):
    result = toy_trainer(tmp_path / "run", toy_data(tmp_path), max_steps=4, save_interval=2).fit()
    assert (tmp_path / "run" / "best").resolve().name == "step_00000004"
    assert result == {"steps": 4, "tokens": 4 * 96, "model": str(tmp_path / "run" / "last")}


def test_what_last_leads_to_is_never_rewritten(tmp_path, monkeypatch):
    """Else a kill between removing the old and naming the new would leave nothing."""
    written = []
    aside = trainer.checkpoint.written_aside

    def spy(directory):
        last = directory.with_name("last")
        assert not last.exists() or last.resolve() != directory.resolve()
        written.append(directory.name)
        return aside(directory)

    monkeypatch.setattr(trainer.checkpoint, "written_aside", spy)
    data = toy_data(tmp_path)
    optim = OptimArgs(lr=0.0, muon_lr=0.0)
    changes = {"eval_interval": 2, "save_interval": 3, "eval_data": data, "patience": 2}
    toy_trainer(tmp_path / "run", data, optim, max_steps=12, **changes).fit()
    (tmp_path / "run" / "result.json").unlink()  # killed just before the end
    toy_trainer(tmp_path / "run", data, optim, max_steps=12, **changes).fit()
    assert written == [f"step_{n:08d}" for n in (2, 3, 4, 6)]


def test_early_stopping(tmp_path, capsys):
    data, optim = toy_data(tmp_path), OptimArgs(lr=0.0, muon_lr=0.0)  # never better than the first time
    changes = {"max_steps": 50, "eval_interval": 2, "patience": 3, "eval_data": data, "log_interval": 0}
    result = toy_trainer(tmp_path / "run", data, optim, **changes).fit()
    assert result["steps"] == 8  # best at 2, then not at 4, 6, 8
    assert [row["step"] for row in rows(tmp_path / "run") if "eval_loss" in row] == [2, 4, 6, 8]
    assert (tmp_path / "run" / "best").resolve().name == "step_00000002"
    assert "no better held-out loss in 3 evaluations" in capsys.readouterr().err
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert toy_trainer(tmp_path / "run", data, optim, **changes).fit() == result  # finished, as it says
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


# ---- going on


def test_killed_after_the_last_evaluation(tmp_path):
    data = toy_data(tmp_path)
    result = toy_trainer(tmp_path / "run", data, max_steps=4, eval_data=data).fit()
    before = rows(tmp_path / "run"), load_state(tmp_path / "run" / "last")["progress"]
    (tmp_path / "run" / "result.json").unlink()
    assert toy_trainer(tmp_path / "run", data, max_steps=4, eval_data=data).fit() == result
    assert (rows(tmp_path / "run"), load_state(tmp_path / "run" / "last")["progress"]) == before


class Stop(Exception):
    pass


def test_a_finished_run_returns_at_once(tmp_path):
    data = toy_data(tmp_path)
    result = toy_trainer(tmp_path / "run", data, max_steps=4, eval_data=data).fit()
    again = toy_trainer(tmp_path / "run", data, max_steps=4, eval_data=data)
    again.data = again.eval_data = again.log = None  # nothing of these is touched
    assert again.fit() == result
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
    with pytest.raises(ValueError, match=r"checkpoints of different steps \(0, 4\) in .*/run: let it lie on"):
        trainer.Trainer(
            *(ours.model, ours.optimizer, data, ours.backend, ours.args, ours.optim, ours.run),
            **{"save": ours.save_weights, "load": ours.load_weights, "identity": ours.identity},
        )


def test_starting_anew_on_request(tmp_path):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=6, save_interval=2, identity={"seed": 5}).fit()
    torch.manual_seed(0)
    ours = toy_trainer(tmp_path / "run", data, max_steps=3, resume="never")
    assert checkpoints(tmp_path / "run") == []
    ours.fit()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000003"]


def test_a_damaged_last_checkpoint_is_named(tmp_path):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=2).fit()
    weights = (tmp_path / "run" / "last").resolve() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        toy_trainer(tmp_path / "run", data, max_steps=3)


# ---- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["batch", "forward", "backward", "save"])
def test_asked_to_stop_at_any_moment_of_a_step(tmp_path, number, moment, monkeypatch, capsys):
    data = toy_data(tmp_path)
    torch.manual_seed(0)
    toy_trainer(tmp_path / "whole", data, max_steps=9, save_interval=4).fit()
    torch.manual_seed(0)
    ours = toy_trainer(tmp_path / "run", data, max_steps=9, save_interval=4)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def ask(*_):
        if ours.progress.step == (4 if moment == "save" else 5):
            os.kill(os.getpid(), number)

    if moment == "batch":
        ours.data = Changed(data, lambda step, batch: ask() or batch)
    elif moment == "forward":
        ours.model.model.layers[0].register_forward_hook(ask)
    elif moment == "backward":
        ours.model.model.norm.weight.register_hook(ask)
    else:
        save = ours.save_weights
        ours.save_weights = lambda directory: ask() or save(directory)
    with pytest.raises(SystemExit) as stop:
        ours.fit()
    assert stop.value.code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    reached = 5 if moment == "save" else 6  # the step it was in, or the next, and no further
    assert f"stopped by {signal.Signals(number).name} after step" in capsys.readouterr().err
    assert load_state(tmp_path / "run" / "last")["progress"]["step"] == reached
    assert not (tmp_path / "run" / "result.json").exists()
    toy_trainer(tmp_path / "run", data, max_steps=9, save_interval=4).fit()
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_second_interrupt_acts_at_once(tmp_path):
    ours = toy_trainer(tmp_path / "run", toy_data(tmp_path), max_steps=9, save_interval=2)

    def interrupt(step, batch):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    ours.data = Changed(ours.data, interrupt)
    with pytest.raises(KeyboardInterrupt):
        ours.fit()
    assert load_state(tmp_path / "run" / "last")["progress"]["step"] == 2


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path, capsys):
    data = toy_data(tmp_path)
    ours = toy_trainer(tmp_path / "run", Changed(data, weighted({3})), max_steps=6, save_interval=1, keep=9)
    ours.fit()
    a, b, c = (load_model(tmp_path / "run" / f"step_0000000{n}").state_dict() for n in (3, 4, 5))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(b[name], c[name]) for name in a)
    curve = losses(tmp_path / "run")
    assert [math.isfinite(x) for x in curve] == [True, True, True, False, True, True]
    assert "step 4: gradient norm nan; the step was skipped (1 in a row)" in capsys.readouterr().err
    assert load_state(tmp_path / "run" / "last")["progress"]["skipped"] == 0


def test_out_of_memory_says_what_to_do(tmp_path):
    def full(step, batch):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ..."
        )

    ours = toy_trainer(tmp_path / "run", Changed(toy_data(tmp_path), full))
    with pytest.raises(ValueError, match=r"^CUDA out of memory: lower --train\.micro_batch_size"):
        ours.fit()


@pytest.mark.parametrize("name", ["grad_clip", "micro_batch_size", "max_steps", "epochs", "patience"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} should be 0 or more, and finite, found -1"):
        TrainArgs(**{name: -1})


def test_rows_longer_than_the_model_takes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seq_len 16 is longer than the model's max_seq_len 15"):
        toy_trainer(tmp_path / "run", toy_data(tmp_path), shape={"max_seq_len": 15})


def test_twenty_such_gradients_in_a_row_end_the_run(tmp_path):
    data = toy_data(tmp_path)
    good = 4
    bad = set(range(good, 100))
    ours = toy_trainer(tmp_path / "run", Changed(data, weighted(bad)), max_steps=50, save_interval=2, log_interval=0)
    with pytest.raises(ValueError, match="20 steps in a row had a gradient that is not finite; lower the learning"):
        ours.fit()
    assert ours.progress.step == good + 19
    weights = load_model(tmp_path / "run" / "last").state_dict()
    assert all(p.isfinite().all() for p in weights.values())
    # nineteen in a row do not
    bad -= {good + 19}
    toy_trainer(tmp_path / "other", Changed(data, weighted(bad)), max_steps=good + 21, log_interval=0).fit()


def test_batches_without_any_target(tmp_path):
    def change(step, batch):
        return dataclasses.replace(batch, targets=torch.full_like(batch.targets, IGNORE)) if step % 2 else batch

    ours = toy_trainer(tmp_path / "run", Changed(toy_data(tmp_path), change), max_steps=6, micro_batch_size=2)
    ours.fit()
    assert [math.isnan(x) for x in losses(tmp_path / "run")] == [False, True] * 3
    assert all(p.isfinite().all() for p in ours.model.parameters())
    # every other step of two is a mean over the targets there are
    torch.manual_seed(0)
    toy_trainer(tmp_path / "two", Changed(toy_data(tmp_path), change), max_steps=6, log_interval=2).fit()
    assert all(math.isfinite(x) for x in losses(tmp_path / "two"))


def test_held_out_data_without_any_target(tmp_path):
    data = toy_data(tmp_path)
    empty = Changed(data, lambda step, batch: dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100)))
    assert toy_trainer(tmp_path / "run", data, max_steps=2, eval_data=empty).fit()["loss"] == 0


def test_time_left_and_rate():
    progress = trainer.Progress(step=10, tokens=1000)
    clock = trainer.Clock(progress, total_steps=30, peak=2e6)
    clock.time -= 4.0
    progress.step, progress.tokens = 15, 1800
    rate, left, mfu = clock.read(progress, flops_per_token=500.0)
    assert rate == pytest.approx(200, rel=0.01)  # 800 tokens in 4 seconds
    assert left == pytest.approx(12, rel=0.01)  # 15 steps more, 0.8 seconds each
    assert mfu == pytest.approx(0.05, rel=0.01)


def test_nothing_to_train_and_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        TrainArgs(max_steps=0, epochs=0.0)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="grad_clip"):
            TrainArgs(grad_clip=wrong)

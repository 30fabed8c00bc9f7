"""The loop against a loop written the plainest way, its log, and what it leaves on disk."""

import dataclasses
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_training_run import SHAPE, SMOOTH, VOCAB, Changed, losses, quick, rows, toy_data, toy_trainer  # noqa: F401

from checkpoint.directory import load_model
from dataset import IGNORE
from hardware import can_compile
from model import Transformer
from model_args import ModelArgs
from optim.args import OptimArgs
from optim.schedule import lr_factor
from training import precision, state
from training.heldout import evaluate
from training.log import read_metrics
from training.state import checkpoints, load_state
from training.trainer import TrainArgs

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
    with pytest.raises(ValueError, match=r"s2_group should be an even number of tokens.* found 7"):
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


# ---- the log


def test_rows_of_the_log(tmp_path):
    data = toy_data(tmp_path)
    result = toy_trainer(
        tmp_path / "run", data, max_steps=10, log_interval=3, eval_interval=4, eval_batches=2, eval_data=data
    ).fit()
    found = read_metrics(tmp_path / "run" / "metrics.jsonl")
    training = [row for row in found if "loss" in row]
    assert [row["step"] for row in training] == [3, 6, 9, 10]  # and what is left at the end
    assert training[0].keys() == {"step", "loss", "lr", "grad_norm", "tokens"}
    assert [row["tokens"] for row in training] == [n * 6 * 16 for n in (3, 6, 9, 10)]
    assert [row["step"] for row in found if "mfu" in row] == [3, 6, 9, 10]
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


def test_first_lines_of_a_run(tmp_path, capsys):
    data = toy_data(tmp_path)
    n = data.steps_per_epoch
    optim = OptimArgs(warmup_steps=2 * n)
    toy_trainer(tmp_path / "run", data, optim, epochs=2.0, eval_data=data, eval_interval=n, eval_batches=2).fit()
    said = capsys.readouterr().err
    assert (
        f"in float32 on 1 CPU process:\n{2 * n} steps of {6 * data.seq_len} tokens (2 epochs of {n} steps).\n" in said
    )
    assert "compiles" not in said and f"step 1/{2 * n} took " in said
    assert "(mfu below: share of 1,000 GFLOP/s, not measured.)" in said and "torch.compile" not in said
    assert f"The run has {2 * n} steps, and {2 * n} are for warming up" in said
    assert (
        f"Raise --train.epochs (to 20 for ten times that), or lower --optim.warmup_steps (to {2 * n // 10} for" in said
    )
    assert re.search(rf"step {n}: held-out loss \d\.\d{{4}} \(first 2 batches\), best so far\n", said)


def test_whether_a_run_is_compiled_is_told_with_an_estimate(tmp_path, monkeypatch):
    """20 s for two layers, against 30 % of the run's operations at 6e10 a second."""
    ours = toy_trainer(tmp_path / "run", toy_data(tmp_path), compile="auto", max_steps=5)
    cpu, n = torch.device("cpu"), sum(p.numel() for p in ours.model.parameters())

    def told(flops: float, device: torch.device = cpu, can: bool = True, **changes: str) -> str | None:
        monkeypatch.setattr(precision, "run_flops", lambda *_: flops)
        monkeypatch.setattr(precision, "can_compile", lambda _: can)
        args = dataclasses.replace(ours.args, **changes)
        told = precision.about_compiling(ours.model, args, device, ours.data)
        assert precision.compiles(ours.model, args, device, ours.data) == bool(told and told.startswith("The first"))
        return told

    tokens = 5 * ours.data.batch_size * ours.data.seq_len
    assert precision.saved_seconds(ours.model, ours.args, ours.data) > 0.3 * 6 * n * 0.5 * tokens / 6e10
    takes = "Not compiled: on two idle cores compiling takes about 20 s, and would save about"
    assert told(6e11) == f"{takes} 3 s of the run." and told(6e11, can=False) == f"{takes} 3 s of the run."
    assert told(6e12) == "The first step compiles the model: about 20 s on two idle cores."
    assert told(6e14, can=False) == (
        "Not compiled: torch.compile needs a C++ compiler and Python's headers, and not all of that is here; it would "
        "save about 2,980 s of the run on two idle cores."
    )
    assert told(6e11, compile="on").startswith("The first step compiles") and told(6e14, compile="off") is None
    assert told(1, torch.device("cuda"), can=False).endswith(
        "Triton, a C compiler and Python's headers, and not all of that is here."
    )
    assert told(1, torch.device("mps"), can=False) is None


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
    aside = state.written_aside

    def spy(directory):
        last = directory.with_name("last")
        assert not last.exists() or last.resolve() != directory.resolve()
        written.append(directory.name)
        return aside(directory)

    monkeypatch.setattr(state, "written_aside", spy)
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
    result = toy_trainer(tmp_path / "run", data, optim, **changes | {"log_interval": 3}).fit()
    assert result["steps"] == 8  # best at 2, then not at 4, 6, 8
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [3, 6, 8]
    assert [row["step"] for row in rows(tmp_path / "run") if "eval_loss" in row] == [2, 4, 6, 8]
    assert (tmp_path / "run" / "best").resolve().name == "step_00000002"
    assert "no better held-out loss in 3 evaluations" in capsys.readouterr().err
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert toy_trainer(tmp_path / "run", data, optim, **changes).fit() == result  # finished, as it says
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_best_is_by_the_metric_that_is_asked_for(tmp_path):
    """Targets of two groups: the second is trained towards something else than what it is evaluated on."""

    def grouped(shift):
        def change(step, batch):
            groups = (torch.arange(len(batch)) % 2)[:, None].expand_as(batch.tokens).contiguous()
            targets = torch.where(groups == 1, (batch.targets + shift) % VOCAB, batch.targets)
            return dataclasses.replace(batch, targets=targets.where(batch.targets != IGNORE, IGNORE), groups=groups)

        return Changed(toy_data(tmp_path), change)

    def fit(name, metric, steps=12):
        torch.manual_seed(0)
        changes = {"max_steps": steps, "eval_interval": 2, "keep": 20, "metric": metric, "group_names": ["a", "b"]}
        run, optim = tmp_path / name, OptimArgs(optimizer="adamw", lr=0.05, warmup_steps=0)
        return toy_trainer(run, grouped(0), optim, eval_data=grouped(5), **changes).fit()

    fit("a", "loss/a")
    fit("b", "loss/b")
    logged = [row for row in rows(tmp_path / "a") if "eval_loss" in row]
    fit("mean", "task_mean")
    assert logged == [row for row in rows(tmp_path / "mean") if "eval_loss" in row]
    for name, best_of in (("a", "eval_loss/a"), ("b", "eval_loss/b"), ("mean", "eval_task_mean")):
        best = min(logged, key=lambda row: row[best_of])["step"]
        assert (tmp_path / name / "best").resolve().name == f"step_{best:08d}"
    assert (tmp_path / "a" / "best").resolve().name != (tmp_path / "b" / "best").resolve().name
    for row in rows(tmp_path / "a"):
        if "loss" in row:  # both groups have about as many targets
            assert min(row["loss/a"], row["loss/b"]) < row["loss"] < max(row["loss/a"], row["loss/b"])
    assert fit("a", "loss/b", 14)["steps"] == 14  # the best so far was by another measure
    best = (tmp_path / "a" / "best").resolve().name
    assert best == "step_00000014"
    with pytest.raises(
        ValueError, match=r"--train\.metric should be one of loss, task_mean, loss/a, loss/b, found 'loss/c'"
    ):
        fit("c", "loss/c")


@pytest.mark.parametrize("metric, all_of_them", [("loss", False), ("loss/late", True), ("task_mean", True)])
def test_a_metric_of_groups_takes_all_batches_since_the_first_ones_may_lack_a_group(tmp_path, metric, all_of_them):
    def change(step, batch):
        return dataclasses.replace(batch, groups=torch.full_like(batch.tokens, int(step > 1)))

    data = Changed(toy_data(tmp_path), change)
    changes = {"max_steps": 4, "eval_interval": 2, "eval_batches": 1, "eval_data": data, "metric": metric}
    toy_trainer(tmp_path / "run", data, **changes, group_names=["early", "late"]).fit()
    first = next(row for row in rows(tmp_path / "run") if "eval_loss" in row)
    assert ("eval_loss/late" in first) == all_of_them
    if not all_of_them:
        assert first["eval_loss/early"] == pytest.approx(first["eval_loss"], rel=1e-6)  # float32


def test_intervals_as_a_share_of_an_epoch(tmp_path):
    data = toy_data(tmp_path)
    n = data.steps_per_epoch
    changes = {"epochs": 2.0, "eval_interval": 0.5, "save_interval": 0.25, "eval_data": data, "keep": 50}
    toy_trainer(tmp_path / "run", data, **changes, log_interval=0).fit()
    half, quarter = round(n / 2), round(n / 4)
    evaluated = [row["step"] for row in rows(tmp_path / "run") if "eval_loss" in row]
    assert evaluated == sorted({*range(half, 2 * n, half), 2 * n})
    saved = {int(path.name[5:]) for path in checkpoints(tmp_path / "run")}
    assert saved == {*evaluated, *range(quarter, 2 * n + 1, quarter)}
    with pytest.raises(ValueError, match=r"save_interval should be a whole number of steps, a share of an epoch"):
        TrainArgs(save_interval=1.5)

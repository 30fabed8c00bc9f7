"""fine_tuning.py on pairs of answers: what it learns and logs, how it goes on, on two processes, what it refuses."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_chat_model import save_chat_model

import fine_tuning
from cli.args import parse
from cli.record import file_sha256
from training.log import read_metrics
from tuning import reference
from tuning.objectives import OBJECTIVES

SMALL = """
    --data.seq_len 48 --data.batch_size 4 --data.heldout_share 0.25 --train.compile off --train.device cpu
    --train.dtype fp32 --train.max_steps 12 --train.save_interval 3 --train.eval_interval 6 --train.keep 9
    --train.log_interval 2 --optim.warmup_steps 2 --optim.optimizer adamw --optim.lr 3e-3
""".split()  # noqa: SIM905
KINDS = {
    "dpo": ["--objective", "dpo", "--data.packing", "none"],
    "dpo on an adapter": [
        *("--objective", "dpo", "--preference.label_smoothing", "0.1", "--preference.sft_weight", "0.2"),
        *("--lora.method", "lora", "--lora.dropout", "0.2", "--neftune_alpha", "5"),
    ],
    "orpo": ["--objective", "orpo", "--preference.beta", "0.5", "--train.micro_batch_size", "1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl with one record whose answers are the same, and chats.jsonl."""
    folder = tmp_path_factory.mktemp("runs")
    save_chat_model(folder / "model")
    words = ["the", "moon", "above", "river", "1984"]
    pairs = [{"prompt": f"{a} {b}?", "chosen": f"{a} {b}", "rejected": f"{b} no"} for a in words for b in words]
    pairs.append({"prompt": "?", "chosen": "same", "rejected": "same"})
    chats = [{"prompt": "moon?", "response": "the moon"}] * 4
    for name, records in (("pairs", pairs), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def flags(folder: Path, out: str, kind: str, *more: str) -> list[str]:
    where = ["--init_from", folder / "model", "--data", folder / "pairs.jsonl", "--out", folder / out]
    return [*map(str, where), *SMALL, *KINDS[kind], *more]


def run(folder: Path, out: str, kind: str, *more: str) -> dict:
    return fine_tuning.main(parse(fine_tuning.Args, "fine_tuning", flags(folder, out, kind, *more)))


def rows(folder: Path, out: str) -> list[dict]:
    return [row for row in read_metrics(folder / out / "metrics.jsonl") if "mfu" not in row]


def rows_without_accuracy(folder: Path, out: str) -> list[dict]:
    """Which side of 0 a margin is on is a matter of rounding at the start, where the model is its reference."""
    return [{name: row[name] for name in row if "accuracy" not in name} for row in rows(folder, out)]


def outcome(folder: Path, out: str) -> tuple[str, list[dict]]:
    """The last weights, and all that was computed on the way."""
    (weights,) = (folder / out / "last").glob("*model.safetensors")
    return file_sha256(weights), rows(folder, out)


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, dict]:
    """The result of each kind of run, to its end at once; made when asked for."""

    class Made(dict):
        def __missing__(self, kind: str) -> dict:
            self[kind] = run(folder, f"whole {kind}", kind)
            return self[kind]

    return Made()


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_to_prefer_and_says_so(kind, folder, whole):
    result = whole[kind]
    logged = [row for row in rows(folder, f"whole {kind}") if "loss" in row]
    assert logged[-1]["loss"] < logged[0]["loss"] and logged[-1]["margin"] > logged[0]["margin"]
    assert logged[-1]["accuracy"] > 0.7
    names = {*OBJECTIVES[KINDS[kind][1]].metrics}
    assert names >= {"reward_chosen", "reward_rejected", "margin", "accuracy"}
    held_out = [row for row in rows(folder, f"whole {kind}") if "eval_loss" in row]
    assert all(names <= row.keys() for row in logged) and names <= result.keys()
    assert len(held_out) == 2 and all({f"eval_{name}" for name in names} <= row.keys() for row in held_out)
    assert "bits_per_byte" not in result
    for row in logged:
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-9)
    (record,) = map(json.loads, (folder / f"whole {kind}" / "broken_pairs.jsonl").read_text().splitlines())
    assert record["where"].endswith("pairs.jsonl:26") and "the same" in record["reason"]


def test_dpo_begins_at_log_2(folder, capsys):
    run(folder, "begin", "dpo", "--optim.lr", "0", "--train.max_steps", "5")
    for row in rows(folder, "begin"):
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in row:
                assert row[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-6)  # float32 log-probabilities
                assert row[f"{prefix}margin"] == pytest.approx(0, abs=1e-6)
    said = "".join(capsys.readouterr())
    assert "pairs.jsonl: 19 pairs, " in said and "of which " in said and "are answers and are trained on" in said
    assert "held out to evaluate on: 6 pairs (25 % of" in said and "accuracy" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(kind, folder, whole, monkeypatch):
    assert whole[kind]
    out = f"stopped {kind}"
    shutil.copytree(folder / f"whole {kind}", folder / out, symlinks=True)
    for name in ("last", "best"):
        (folder / out / name).unlink()
    for step, name in ((3, "last"), (3, "best")):  # between two lines of the log
        (folder / out / name).symlink_to(f"step_{step:08}")
    (folder / out / "result.json").unlink()
    monkeypatch.setattr(reference, "_log_probs", None)  # the reference is not computed again
    run(folder, out, kind)
    weights, logged = outcome(folder, out)
    assert (weights, logged) == outcome(folder, f"whole {kind}")


def test_another_objective_is_another_run(folder, whole):
    assert whole["dpo"]
    for more in (["--preference.beta", "0.2"], ["--objective", "orpo"]):
        with pytest.raises(ValueError, match=r"holds a run with objective .* it cannot be continued"):
            run(folder, "whole dpo", "dpo", *more)


def test_two_processes_are_one(folder, environment):
    kind = "dpo on an adapter"
    same = ["--train.max_steps", "6", "--lora.dropout", "0", "--neftune_alpha", "0", "--optim.eps", "0.01"]
    run(folder, f"one {kind}", kind, *same)
    script = str(Path(fine_tuning.__file__))
    words = flags(folder, f"two {kind}", kind, *same, "--train.backend", "ddp")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    subprocess.run([*launch, *words], env=environment, check=True, capture_output=True, timeout=240)
    one, two = (rows_without_accuracy(folder, f"{n} {kind}") for n in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)  # float32, summed in another order


@pytest.mark.parametrize(
    "more, message",
    [
        (["--data", "chats.jsonl"], "chats.jsonl has no pair of answers in 4 records; .* with --objective sft"),
        (["--objective", "sft"], "pairs.jsonl has no usable answer in 26 records; .*: use a preference objective"),
        (
            ["--data.seq_len", "2"],
            r"no pair has two different answers within 2 tokens; --data\.seq_len \d+ ",
        ),
        (["--data.seq_len", "201"], "seq_len 201 is longer than the model's max_seq_len 200"),
        (["--preference.beta", "0"], r"--preference\.beta should be above 0"),
        (
            ["--objective", "sft", "--preference.beta", "1"],
            r"--preference\.beta 1\.0 needs --objective dpo.* orpo.*, found sft",
        ),
        (
            ["--objective", "orpo", "--preference.sft_weight", "1"],
            r"sft_weight 1\.0 needs --objective dpo.*, found orpo: no",
        ),
        (
            ["--data.packing", "concat"],
            r"--data\.packing concat needs --objective sft, found dpo: pairs are packed best_fit or",
        ),
        (
            ["--data.train_on", "last"],
            r"--data\.train_on last needs --objective sft, found dpo: .* always train the last ans",
        ),
        (
            ["--data.loss", "sample"],
            r"--data\.loss sample needs --objective sft, found dpo: .* losses of their own; remove it",
        ),
        (["--data", "a,b"], r"--data\.train needs --objective sft, found dpo: preference objectives train one task"),
        (
            ["--train.metric", "accuracy"],
            r"--train\.metric accuracy needs --objective sft, found dpo: .* the least loss is the best",
        ),
        (["--train.s2_group", "8"], r"--train\.s2_group 8 needs --objective sft, found dpo: .* attend in full"),
    ],
)
def test_refused_before_anything_is_written(folder, more, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, SystemExit), match=message) as refused:
        run(folder, "refused", "dpo", *more)
    assert not (folder / "refused").exists(), refused


@pytest.mark.slow
def test_compiled(folder):
    same = ["--train.max_steps", "4", "--lora.dropout", "0", "--neftune_alpha", "0"]
    for how in ("off", "on"):
        run(folder, f"compile {how}", "dpo on an adapter", *same, "--train.compile", how)
    eager, compiled = (rows_without_accuracy(folder, f"compile {how}") for how in ("off", "on"))
    for a, b in zip(eager, compiled, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)  # float32, fused in another order


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_presets(objective):
    preset = Path(fine_tuning.__file__).parent / f"configs/fine_tuning/{objective}.yaml"
    args = parse(fine_tuning.Args, "fine_tuning", ["--config", str(preset), "--data", "pairs.jsonl"])
    assert args.objective == objective and args.data.train == (Path("pairs.jsonl"),)

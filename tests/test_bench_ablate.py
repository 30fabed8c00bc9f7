"""bench/ablate.py: pairs by seed, intervals against numpy, no run is repeated. The trainings are stubs."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import ablate
from bench.ablate import Args, interval, main, read_table, seconds_to


@pytest.fixture
def trainings(monkeypatch):
    """The commands that were run; a training's loss depends on its seed and, less, on its learning rate."""
    commands = []

    def run(command, **_):
        flags = dict(zip(command[4::2], command[5::2]))
        commands.append(flags)
        out, lr, seed = Path(flags["--out"]), float(flags.get("--optim.lr", 1)), int(flags["--train.seed"])
        out.mkdir(parents=True)
        loss = 4 + seed + 0.1 * lr + 0.001 * seed * lr
        (out / "result.json").write_text(json.dumps({"steps": 5, "tokens": 50, "loss": loss}))
        rows = [{"step": s, "eval_loss": 9 - s} for s in (1, 2, 3)] + [
            {"step": s, "seconds": 10 * s * lr} for s in (2, 3)
        ]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return type("Done", (), {"returncode": int(lr > 100), "stderr": "a\nerror: too high\n"})

    monkeypatch.setattr(ablate.subprocess, "run", run)
    return commands


def args(folder, *variants, **more):
    return Args(variants or ("base:", "fast: --optim.lr 3"), out=folder, flags="--train.max_minutes 1", **more)


def test_variants_are_compared_within_seeds(tmp_path, trainings, capsys):
    base, fast = main(args(tmp_path, target=6.5))[:2]
    assert base["difference"] == base["half_width"] == 0
    assert fast["difference"] == pytest.approx(0.202) and fast["half_width"] == pytest.approx(4.303 * 0.002 / 3**0.5)
    assert [flags["--train.seed"] for flags in trainings] == ["0", "0", "1", "1", "2", "2"]
    assert all(flags["--train.max_minutes"] == "1" for flags in trainings)
    answer = capsys.readouterr().out
    assert "+0.2020   +0.1970 to +0.2070   worse" in answer and "seconds to a held-out loss of 6.5" in answer
    assert [row["seconds_to_target"] for row in read_table(tmp_path / "results.tsv")] == ["30.0", "90.0"] * 3


def test_what_is_in_the_table_is_not_run_again(tmp_path, trainings):
    first = main(args(tmp_path, seeds=2))
    more = main(args(tmp_path, "base:", "fast: --optim.lr 3", "slow: --optim.lr 0.5", seeds=2))
    assert len(trainings) == 6 and more[:2] == first
    with pytest.raises(SystemExit, match=r"has 'fast' with other flags \(--train.max_minutes 1 --optim.lr 3\)"):
        main(args(tmp_path, "base:", "fast: --optim.lr 4", seeds=2))


def test_a_failed_training_is_named_with_its_last_lines(tmp_path, trainings):
    with pytest.raises(SystemExit, match=r"(?s)high, seed 0, failed:.*error: too high"):
        main(args(tmp_path, "base:", "high: --optim.lr 1000"))


@pytest.mark.parametrize("n", [2, 3, 8, 16])
def test_the_interval_holds_the_true_mean_in_95_of_100_cases(n):
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, n))
    means, halves = zip(*(interval(list(row)) for row in draws))
    inside = np.abs(np.array(means) - 3.0) <= halves
    assert 0.94 < inside.mean() < 0.96  # binomial: 0.95 +- 0.0034


def test_a_target_that_was_not_reached(tmp_path, trainings, capsys):
    rows = [{"step": 4, "eval_loss": 5.0}, {"step": 4, "seconds": 7.0}]
    assert seconds_to(5.0, rows) == 7.0 and seconds_to(4.9, rows) == math.inf
    main(args(tmp_path, target=1.0))
    assert "(not reached in every run)" in capsys.readouterr().out


@pytest.mark.parametrize("variants", [("base:",), ("a:", "a: --optim.lr 2"), ("a", "b:"), (": --optim.lr 2", "b:")])
def test_variants_need_names_and_two_of_them(variants):
    with pytest.raises(ValueError, match="--variants: expected"):
        Args(variants)

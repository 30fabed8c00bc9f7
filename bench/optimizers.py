"""Compare the optimizers by loss against tokens and seconds: the best rate of a small sweep each, then more seeds.

    python bench/optimizers.py --steps 1100 --flags="--train.eval_interval 50 --train.compile on"
    python bench/optimizers.py --names "AdamW, half batch" "Muon, half batch, short" --picture docs/optimizers.png

Runs of pretrain.py on the data of a preset; the model is LLaMA's exactly (an untied head). Every rate is tried with
seed 0, and where the best one is at an edge, the next one beyond it, too. Then the best rate runs with the other seeds.
Runs are kept in `results.tsv` and not repeated. The table has the held-out loss at the end, and the seconds until a run
was as good as the first of the names at its end with the same seed. A name with "short" has fewer steps, so that its
rate falls in that time; in the first part of a longer run it does not. It has one rate. "Half batch": 16 rows a step.
"nanochat": its rates, schedule and betas (karpathy/nanochat, scripts/base_train.py, 00255c1) for LLaMA.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import ablate
from files import read_rows


class Optimizer(NamedTuple):
    """Flags of an optimizer, the flag of the rate that is tried, the rates (one: nothing is tried), and its share of
    --steps."""

    flags: str
    dial: str
    rates: tuple[float, ...]
    share: float = 1.0


REFERENCE = "AdamW, cosine"
ALL_ALIKE = "--optim.embed_lr_ratio 1"
ADAMW = Optimizer(f"--optim.optimizer adamw --optim.schedule cosine {ALL_ALIKE}", "lr", (2e-3, 4e-3, 8e-3))
MUON = Optimizer("--optim.optimizer muon --optim.schedule wsd --optim.embed_lr_ratio 2", "muon_lr", (3e-3, 6e-3, 12e-3))
HALF = "--data.batch_size 16"
QUICK = f"{HALF} --optim.embed_lr_ratio 8 --optim.momentum 0.85 --optim.betas 0.7 0.95"  # for a million tokens
# The rate of its embedding is for entries of size 1; ours are of size 0.02: 0.3 sqrt(768 / 128) 0.02. That of its Muon
# has another scale: 0.02 = 8.8e-3 x 0.2 sqrt(128). Its norms have no weights.
NANOCHAT = (
    f"{HALF} --optim.optimizer muon --optim.lr 0.0147 {ALL_ALIKE} --optim.norm_lr_ratio 0 --optim.betas 0.8 0.95 "
    "--optim.eps 1e-10 --optim.schedule wsd --optim.warmup_steps 40 --optim.decay_share 0.65 --optim.min_lr_ratio 0.05"
)
OPTIMIZERS = {
    REFERENCE: ADAMW,
    "AdamW, WSD": ADAMW._replace(flags=f"--optim.optimizer adamw --optim.schedule wsd {ALL_ALIKE}"),
    "Muon, WSD": MUON,
    "Muon, WSD, short": MUON._replace(rates=(6e-3,), share=0.45),
    "AdamW, half batch": ADAMW._replace(flags=f"{ADAMW.flags} {HALF}", share=2.0),
    "Muon, half batch, short": Optimizer(
        f"--optim.optimizer muon --optim.schedule wsd {QUICK}", "muon_lr", (6e-3,), 0.7
    ),
    "nanochat, half batch, short": Optimizer(NANOCHAT, "muon_lr", (8.8e-3,), 0.7),
    "Lion, WSD": Optimizer(
        f"--optim.optimizer lion --optim.schedule wsd --optim.weight_decay 0.5 {ALL_ALIKE}", "lr", (5e-4, 1e-3, 2e-3)
    ),
    "Adafactor, WSD": Optimizer(
        f"--optim.optimizer adafactor --optim.schedule wsd {ALL_ALIKE}", "lr", (0.01, 0.02, 0.04)
    ),
    "GaLore AdamW, WSD": Optimizer(
        f"--optim.optimizer galore_adamw --optim.schedule wsd {ALL_ALIKE}", "lr", (4e-3, 8e-3, 16e-3)
    ),
}
FACTOR = 2.0  # between the rates of a sweep
MOST_RATES = 6


@dataclass(frozen=True)
class Args:
    """Compare the optimizers by loss against tokens and seconds."""

    names: tuple[str, ...] = tuple(OPTIMIZERS)
    """which ones; the first is what the others are compared with"""
    config: Path = Path("configs/tiny.yaml")
    """preset, whose data have to be there (bash run.sh --stage data)"""
    steps: int = 1100
    """steps of a run"""
    flags: str = "--train.eval_interval 50 --train.compile on"
    """more flags of all runs"""
    seeds: int = 3
    """seeds of the best rate of each"""
    out: Path = Path("out/optimizers")
    """directory of the runs and of results.tsv"""
    picture: Path | None = None
    """PNG of the curves"""

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown name, or for too few of anything."""
        if unknown := [name for name in self.names if name not in OPTIMIZERS]:
            raise ValueError(f"--names: unknown {', '.join(unknown)}; known are {'; '.join(OPTIMIZERS)}")
        if len(self.names) < 2 or self.seeds < 2:
            raise ValueError("expected at least two --names and two --seeds")


def main(args: Args) -> None:
    """Do the runs that are missing; print the table and draw the curves."""
    args.out.mkdir(parents=True, exist_ok=True)
    best = {name: swept(args, name) for name in args.names}
    curves = {
        name: [curve(args, name, rate, trained(args, name, rate, seed)) for seed in range(args.seeds)]
        for name, rate in best.items()
    }
    print(f"{'':20}{'rate':>8}{'loss':>9}  95 %{'seconds':>9}{'until as good':>15}{'of its time':>13}")
    for name, rate in best.items():
        ends = [each[-1] for each in curves[name]]
        loss, half = ablate.interval([end[2] for end in ends])
        seconds = statistics.fmean(end[1] for end in ends)
        pairs = [(reached(each, base[-1][2]), base[-1][1]) for each, base in zip(curves[name], curves[args.names[0]])]
        until = statistics.fmean(pair[0] for pair in pairs)  # inf where a seed never is
        share = statistics.fmean(pair[0] / pair[1] for pair in pairs)
        print(f"{name:20}{rate:8.4g}{loss:9.4f} ±{half:.3f}{seconds:9.1f}{until:15.1f}{share:13.0%}")
    if args.picture:
        draw(args.picture, curves)


def swept(args: Args, name: str) -> float:
    """Return the rate with the least loss with seed 0."""
    losses = {rate: float(trained(args, name, rate, 0)["metric"]) for rate in OPTIMIZERS[name].rates}
    while 1 < len(losses) < MOST_RATES:
        rate = min(losses, key=losses.get)
        beyond = {min(losses): rate / FACTOR, max(losses): rate * FACTOR}.get(rate)
        if beyond is None:
            break
        losses[beyond] = float(trained(args, name, beyond, 0)["metric"])
    print(f"{name}: " + ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(losses.items())), file=sys.stderr)
    return min(losses, key=losses.get)


def trained(args: Args, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Return the row of a run, which is done where there is none."""
    table, variant = args.out / "results.tsv", f"{name}, {rate:g}"
    chosen = OPTIMIZERS[name]
    steps = f"--train.max_steps {round(args.steps * chosen.share)}"
    flags = f"{args.flags} --model.tie_embeddings False {steps} {chosen.flags} --optim.{chosen.dial} {rate:g}"
    for row in ablate.read_table(table):
        if (row["variant"], row["seed"]) == (variant, str(seed)):
            if row["flags"] != flags:
                raise SystemExit(f"{table} has {variant!r} with other flags ({row['flags']}): choose another --out")
            return row
    wanted = ablate.Args(variants=("a:", "b:"), config=args.config, out=args.out)
    row = {"variant": variant, "seed": seed, "flags": flags} | ablate.run(wanted, variant, flags, seed)
    ablate.add(table, row)
    return row


def curve(args: Args, name: str, rate: float, row: dict[str, Any]) -> list[tuple[float, float, float]]:
    """Return (tokens, seconds of the loop, held-out loss) at every evaluation of a run, and its end."""
    rows = read_rows(args.out / "runs" / f"{name}, {rate:g}_{row['seed']}" / "metrics.jsonl")
    clock = [(each["step"], each["seconds"]) for each in rows if "seconds" in each]
    points = []
    for each in rows:
        if "eval_loss" in each:
            seconds = next((s for step, s in clock if step >= each["step"]), clock[-1][1])
            points.append((each["step"] / int(row["steps"]) * int(row["tokens"]), seconds, each["eval_loss"]))
    return [*points[:-1], (points[-1][0], points[-1][1], float(row["metric"]))]


def reached(points: Sequence[tuple[float, float, float]], loss: float) -> float:
    """Return the seconds until the loss is at most `loss`, between two evaluations by a straight line; inf: never."""
    for (_, before, above), (_, after, below) in zip([(0.0, 0.0, math.inf), *points], points):
        if below <= loss:
            part = (above - loss) / (above - below) if math.isfinite(above) else 1.0
            return before + part * (after - before)
    return math.inf


def draw(path: Path, curves: dict[str, list[list[tuple[float, float, float]]]]) -> None:
    """Draw the mean loss of each optimizer over tokens and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, at, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("tokens", "seconds")):
        for name, runs in curves.items():
            points = [[statistics.fmean(each[i] for each in same) for i in range(3)] for same in zip(*runs)]
            axes.plot([point[at] for point in points], [point[2] for point in points], label=name)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.set_ylim(top=min(runs[0][0][2] for runs in curves.values()))
    figure.axes[0].set_ylabel("held-out loss")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

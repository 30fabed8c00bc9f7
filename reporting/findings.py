"""Warnings that the record of a run gives rise to. Each function looks at one thing and returns findings, or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from reporting.record import Run, finite

FEW_HELD_OUT = 10_000  # positions: the loss of so few is known to about 0.05 nats
FEW_RECORDS = 30  # held-out conversations, as fine_tuning.py says
FLAT = 0.01  # nats: a smaller change between the first and the last third of a run is none
WINDOW = 10  # rows of the log before a spike, which it is compared with


class Finding(NamedTuple):
    """Something in a run that its owner should know."""

    level: str  # "error": the numbers cannot be trusted; "warning": look at this; "note": good to know
    title: str
    text: str  # what was found, what it means, what to do


def findings(run: Run) -> list[Finding]:
    """Return all findings of a run, the gravest first."""
    found = [Finding("warning", "Files", f"{problem}.") for problem in run.problems]
    for check in CHECKS:
        found += check(run)
    return sorted(found, key=lambda each: ("error", "warning", "note").index(each.level))


# ---- numbers that are not finite, damage


def not_finite(run: Run) -> list[Finding]:
    """A loss or a gradient norm that is infinite or no number."""
    found = []
    for name, what in (("loss", "training loss"), ("eval_loss", "held-out loss"), ("grad_norm", "gradient norm")):
        steps, values = run.series(name)
        bad = [step for step, value in zip(steps, values) if not math.isfinite(value)]
        if bad:
            level = "warning" if name == "grad_norm" else "error"
            text = (
                f"The {what} is not finite in {len(bad)} of {len(steps)} rows, first at step {bad[0]:,}. "
                "A step without a finite gradient is skipped; where many are, lower the learning rate, or use "
                "--train.dtype bf16 in place of fp16."
            )
            found.append(Finding(level, "Not finite", text))
    return found


# ---- the beginning of a run


def initial_loss(run: Run) -> list[Finding]:
    """The first loss of a new model is near ln V, since it finds all V ids about equally likely."""
    first, vocab = first_loss(run), vocab_size(run)
    if run.kind != "pretrain" or run.settings.get("init_from") or first is None or not vocab:
        return []
    expected = math.log(vocab)
    if not math.isfinite(first) or abs(first - expected) <= max(0.5, 0.1 * expected):
        return []
    compared = (
        f"The first step had a loss of {first:.2f}, and a new model should begin near ln {vocab:,} = {expected:.2f}."
    )
    if first > expected:
        return [Finding("warning", "First loss", f"{compared} Initial weights that are too large look like this.")]
    text = f"{compared} A model that sees what it should predict looks like this, or data of a few ids only."
    return [Finding("warning", "First loss", text)]


def vocab_size(run: Run) -> int | None:
    """Return the number of ids of a run's model; None where its record does not say."""
    return run.training.get("vocab_size") or run.settings.get("model.vocab_size")


def first_loss(run: Run) -> float | None:
    """Return the loss of the first step; None where the log does not have it by itself."""
    alone = [row for row in run.rows if row["step"] == 1]
    values = [row.get("first_step", row.get("loss")) for row in alone]
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def warming_up(run: Run) -> list[Finding]:
    """A run that ends before its rate has risen."""
    warmup, steps = run.settings.get("optim.warmup_steps"), run.steps
    if not isinstance(warmup, int) or steps is None or steps > warmup:
        return []
    text = f"The run has {steps:,} steps, and --optim.warmup_steps is {warmup:,}: its rate never reaches --optim.lr."
    return [Finding("warning", "Warm-up", text)]


# ---- the course of a run


def spikes(run: Run) -> list[Finding]:
    """Losses far above those of the rows before."""
    steps, values = run.series("loss")
    found = spike_steps(steps, values)
    if not found:
        return []
    at = ", ".join(f"{step:,}" for step in found[:5]) + (", ..." if len(found) > 5 else "")
    text = (
        f"The training loss jumps at step {at}. One jump that heals is harmless; several mean that the learning rate "
        "is too high, the clipping (--train.grad_clip) too loose, or that some documents are of another kind."
    )
    return [Finding("warning", "Spikes", text)]


def spike_steps(steps: Sequence[int], values: Sequence[float]) -> list[int]:
    """Return the steps whose value is far above the median of the rows before: by half a nat and by eight times their
    usual distance from it. Values that are not finite are passed over."""
    pairs = [(step, value) for step, value in zip(steps, values) if math.isfinite(value)]
    found = []
    for i in range(WINDOW // 2, len(pairs)):
        before = [value for _, value in pairs[max(0, i - WINDOW) : i]]
        middle = median(before)
        usual = median(abs(value - middle) for value in before)
        if pairs[i][1] > middle + max(0.5, 8 * usual):
            found.append(pairs[i][0])
    return found


def not_learning(run: Run) -> list[Finding]:
    """A training loss that does not fall."""
    values = finite(run.series("loss")[1])
    third = len(values) // 3
    if third < 3:
        return []
    first, last = median(values[:third]), median(values[-third:])
    if last < first - FLAT:
        return []
    objective = run.settings.get("objective", "sft")
    if objective != "sft" and abs(last - math.log(2)) < 0.02:
        text = (
            f"The loss stays at ln 2 = 0.693 ({first:.3f}, then {last:.3f}): the model tells the two answers of a pair "
            "no better apart than at the beginning. Raise the rate, train longer, or look at the pairs (--show 3)."
        )
    else:
        text = (
            f"The training loss does not fall: {first:.3f} in the first third, {last:.3f} in the last. "
            "The rate may be far too low or too high, or nothing is trained (--show 3 marks the targets)."
        )
    return [Finding("warning", "Not learning", text)]


def worse_than_chance(run: Run) -> list[Finding]:
    """A loss at the end that is above ln V, that of a model which finds all V ids equally likely."""
    values, vocab = finite(run.series("eval_loss")[1]) or finite(run.series("loss")[1]), vocab_size(run)
    if not values or not vocab or run.settings.get("objective", "sft") != "sft" or values[-1] < math.log(vocab) + 0.5:
        return []
    text = (
        f"The loss ends at {values[-1]:.2f}, and a model that has learned nothing has ln {vocab:,} = "
        f"{math.log(vocab):.2f}: the rate is far too high (lower --optim.lr and --optim.muon_lr by ten), or the model "
        "began with damaged weights, or with those for another tokenizer."
    )
    return [Finding("error", "Worse than chance", text)]


def overfitting(run: Run) -> list[Finding]:
    """A held-out loss that rises again."""
    steps, values = run.series("eval_loss")
    pairs = [(value, step) for step, value in zip(steps, values) if math.isfinite(value)]
    if len(pairs) < 2:
        return []
    (best, at), last = min(pairs), pairs[-1][0]
    if last <= best * 1.01:
        return []
    text = (
        f"The held-out loss was lowest at step {at:,} ({best:.3f}) and ends at {last:.3f}: from there on the model "
        "learns the training data by heart. `best` is the model of that step. More data or fewer epochs help; "
        "--train.patience 3 stops such a run."
    )
    return [Finding("warning", "Overfitting", text)]


def gap(run: Run) -> list[Finding]:
    """A training loss far below the held-out one."""
    train, held = finite(run.series("loss")[1]), finite(run.series("eval_loss")[1])
    if not train or not held or run.settings.get("objective", "sft") != "sft":
        return []
    now = median(train[-3:])
    if held[-1] - now < max(0.5, 0.25 * held[-1]):
        return []
    text = (
        f"The training loss ({now:.2f}) is far below the held-out loss ({held[-1]:.2f}): the model knows its training "
        "data by heart, or the held-out data are of another kind."
    )
    return [Finding("warning", "Gap", text)]


def clipped(run: Run) -> list[Finding]:
    """Gradients that are almost always clipped."""
    most, norms = run.settings.get("train.grad_clip"), finite(run.series("grad_norm")[1])
    if not isinstance(most, (int, float)) or most <= 0 or len(norms) < 10:
        return []
    share = sum(norm > most for norm in norms) / len(norms)
    if share < 0.9:
        return []
    text = (
        f"The gradient is longer than --train.grad_clip {most:g} in {share:.0%} of the rows (half of them: above "
        f"{median(norms):.2g}), so the clipping sets the size of nearly every step. For Adam and Muon that is harmless."
    )
    return [Finding("note", "Clipping", text.replace("%", " %"))]


def slow(run: Run) -> list[Finding]:
    """A rate that fell in the course of the run, or a GPU that is mostly idle."""
    rates, found = finite(run.series("tokens_per_second")[1]), []
    third = len(rates) // 3
    if third >= 4 and (late := median(rates[-third:])) < 0.6 * (early := median(rates[:third])):
        text = (
            f"The rate fell from {early:,.0f} to {late:,.0f} tokens a second: another program took the processor, the "
            "machine became hot, or its memory is full."
        )
        found.append(Finding("warning", "Slower", text))
    use = finite(run.series("mfu")[1])
    if run.training.get("device") == "cuda" and len(use) > 3 and median(use) < 0.1:
        text = (
            f"The GPU does {median(use):.1%} of what it could: its steps are too small. A larger "
            "--train.micro_batch_size, --train.compile on and --train.dtype bf16 help most."
        )
        found.append(Finding("note", "Idle GPU", text.replace("%", " %")))
    return found


# ---- the data


def held_out(run: Run) -> list[Finding]:
    """No held-out data, or too few."""
    if run.kind not in ("pretrain", "fine_tuning") or not run.training:
        return []
    positions = run.training.get("held_out_positions")
    if not positions:
        text = "Nothing is held out: no number tells whether the model learns or only memorizes."
        return [Finding("warning", "Held-out data", text)]
    entries = [entry for entry in run.data if entry.get("held_out")]
    records = [entry.get("conversations", entry.get("pairs")) for entry in entries]
    if any(isinstance(n, int) and n < FEW_RECORDS for n in records):
        fewest = min(n for n in records if isinstance(n, int))
        text = f"Only {fewest} records are held out: too few to tell a small gain from chance."
        return [Finding("warning", "Held-out data", text)]
    tokens = sum(entry.get("tokens", 0) for entry in entries) or positions
    if tokens < FEW_HELD_OUT:
        text = f"Only {tokens:,} tokens are held out: their loss is known to some hundredths only."
        return [Finding("warning", "Held-out data", text)]
    return []


def repeated(run: Run) -> list[Finding]:
    """Many passes over the data."""
    steps, epoch = run.steps, run.training.get("steps_per_epoch")
    if not steps or not epoch or run.kind != "pretrain" or steps / epoch <= 4:
        return []
    text = (
        f"The run passes over its data {steps / epoch:.1f} times. Up to four passes are worth nearly as much as new "
        "data (Muennighoff et al. 2023); later ones are worth less and less."
    )
    return [Finding("note", "Epochs", text)]


def left_out(run: Run) -> list[Finding]:
    """Records that could not be read, or whose answers lie beyond a row."""
    found = []
    for entry in run.data:
        total = entry.get("conversations", entry.get("pairs"))
        lost = {key: entry.get(key, 0) for key in ("broken", "beyond", "dropped")}
        if isinstance(total, int) and total and sum(lost.values()) > 0.1 * total:
            parts = ", ".join(f"{n:,} {key}" for key, n in lost.items() if n)
            text = f"{entry.get('name')}: of {total:,} records, {parts}. Longer rows (--data.seq_len) keep long ones."
            found.append(Finding("warning", "Records left out", text))
    return found


# ---- what the model says, what was changed


def samples(run: Run) -> list[Finding]:
    """Samples that are empty, or one piece over and over."""
    last = [row for row in run.samples if row["step"] == run.samples[-1]["step"]] if run.samples else []
    texts = [str(row.get("text", "")).strip() for row in last]
    if texts and not any(texts):
        return [Finding("warning", "Samples", "The last samples are all empty: the model ends its answer at once.")]
    if texts and all(is_loop(text) for text in texts):
        return [
            Finding("note", "Samples", "The last samples repeat themselves: the model needs more training or data.")
        ]
    return []


def is_loop(text: str) -> bool:
    """Return whether a text of some length repeats few different pieces of four characters."""
    pieces = [text[i : i + 4] for i in range(len(text) - 3)]
    return len(pieces) >= 40 and len(set(pieces)) < 0.3 * len(pieces)


def changes(run: Run) -> list[Finding]:
    """Settings that were changed where the run went on."""
    found = []
    for change in run.record.get("changes") or []:
        if isinstance(change, dict) and isinstance(settings := change.get("settings"), dict):
            words = ", ".join(f"--{name} {_now(values)}" for name, values in settings.items())
            found.append(Finding("note", "Changed settings", f"After step {change.get('after_step')}: {words}."))
    return found


def _now(values: Any) -> str:
    """Return a pair (before, now) in words."""
    return f"{values[1]} (before: {values[0]})" if isinstance(values, list) and len(values) == 2 else str(values)


CHECKS: tuple[Callable[[Run], list[Finding]], ...] = (
    *(not_finite, initial_loss, warming_up, spikes, not_learning, worse_than_chance, overfitting, gap),
    *(slow, held_out, repeated, left_out, samples, changes, clipped),
)

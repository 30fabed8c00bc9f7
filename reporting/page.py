"""One page of HTML about one run, or several side by side. It needs no network: style and curves are inside.

All text of a run is escaped by the template (Jinja's autoescape), and the page allows no script at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from reporting.curves import Line, chart
from reporting.findings import findings
from reporting.record import Run, finite, is_number, when
from reporting.tables import composition, evaluation_tables, layer_tables, machine, number, setting_rows

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_STEPS = 5  # of the samples of a prompt; the others can be unfolded


class Shown:
    """A run as the template reads it: its name on the page, and its findings."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.findings = run, name, findings(run)


def page(runs: Sequence[Run], command: str = "", now: datetime | None = None) -> str:
    """Return the page of runs as text. command: what writes it anew. Control characters are shown as symbols."""
    shown = [Shown(run, name) for run, name in zip(runs, unique_names(runs))]
    parts = {
        "charts": charts(shown),
        "samples": [(each, prompts(each.run)) for each in shown if each.run.samples],
        "evaluations": evaluation_tables([(each.name, each.run) for each in shown]),
        "layers": [(each, *table) for each in shown for table in layer_tables(each.run)],
        "data": [(each, *table) for each in shown for table in composition(each.run)],
    }
    titles = {"charts": ("curves", "Curves"), "layers": ("quantization", "Quantized layers")}
    usual = {"samples": "Samples", "evaluations": "Evaluations", "data": "Data"}
    contents = [("overview", "Overview"), ("warnings", "Warnings")]
    contents += [titles.get(name, (name, usual.get(name, ""))) for name, value in parts.items() if value]
    settings = setting_rows([each.run for each in shown])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf8")).render(
        title=", ".join(each.name for each in shown),
        written=(now or datetime.now()).strftime("%Y-%m-%d %H:%M"),
        command=command,
        contents=[*contents, ("settings", "Settings"), ("machine", "Machine")],
        runs=shown,
        overview=overview([each.run for each in shown]),
        settings=settings,
        differences=[row for row in settings if row[2]],
        machine=machine([each.run for each in shown]),
        **parts,
    )
    return visible(text)


def visible(text: str) -> str:
    """Return a text whose control characters are symbols, and which UTF-8 can hold."""
    symbols = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "\u2421"}
    return text.translate(symbols).encode("utf8", "replace").decode("utf8")


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Return the names of runs, as whole paths where two are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.directory) for run in runs]


def overview(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return rows of what a reader asks first, without those that no run has."""
    rows = [(name, [tell(run) for run in runs]) for name, tell in OVERVIEW.items()]
    return [(name, values) for name, values in rows if any(value not in ("", "-") for value in values)]


def what(run: Run) -> str:
    """Return what kind of a run it is, in words."""
    if run.kind == "pretrain":
        start = run.settings.get("init_from")
        return f"pretraining, from {start}" if start else "pretraining of a new model"
    if run.kind == "fine_tuning":
        objective, method = run.settings.get("objective", "sft"), run.settings.get("lora.method", "none")
        how = {"sft": "fine-tuning on conversations"}.get(str(objective), f"fine-tuning on pairs ({objective})")
        base = run.settings.get("lora.base", "none")
        adapter = "" if method == "none" else f", adapters: {method}" + (f" on {base}" if base != "none" else "")
        return f"{how}{adapter}, from {run.settings.get('init_from', 'a model that is not known')}"
    if run.kind == "quantize":
        method, bits, model = (run.settings.get(name, "?") for name in ("method", "bits", "model"))
        return f"quantized by {method}, {bits} bits, from {model}"
    return run.kind or "a model"


def parameters(run: Run) -> str:
    """Return the number of parameters, and of trained ones where they are fewer."""
    whole, trained = run.training.get("parameters"), run.training.get("trained_parameters")
    if not is_number(whole):
        return "-"
    return f"{whole:,}" + (f", trained: {trained:,}" if is_number(trained) and trained < whole else "")


def seconds(run: Run) -> float:
    """Return the time of training: of each row the tokens since the row before, by their rate."""
    rates, tokens = dict(zip(*run.series("tokens_per_second"))), dict(zip(*run.series("tokens")))
    total, before = 0.0, 0.0
    for step in sorted(set(rates) & set(tokens)):
        total += (tokens[step] - before) / rates[step] if rates[step] > 0 else 0
        before = tokens[step]
    return total


def duration(run: Run) -> str:
    """Return the time of training in words."""
    if not (time := round(seconds(run))):
        return "-"
    hours, rest = divmod(time, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def rate(run: Run) -> str:
    """Return the tokens a second of the whole training, and of its last steps."""
    tokens, rates = run.series("tokens")[1], run.series("tokens_per_second")[1]
    if not tokens or not rates or not (time := seconds(run)):
        return "-"
    return f"{tokens[-1] / time:,.0f} on average, {rates[-1]:,.0f} at the end"


def lowest(run: Run, name: str) -> str:
    """Return the lowest held-out value of a metric, with its step."""
    steps, values = run.series(f"eval_{name}")
    pairs = [(value, step) for step, value in zip(steps, values) if math.isfinite(value)]
    return f"{min(pairs)[0]:.4f} (step {min(pairs)[1]:,})" if pairs else "-"


def last(run: Run, name: str, form: str) -> str:
    """Return the last finite value of a metric."""
    values = finite(run.series(name)[1])
    return form.format(values[-1]) if values else "-"


def where(run: Run) -> str:
    """Return the kind of device and how many processes."""
    device, processes = run.training.get("device"), run.training.get("processes", 1)
    names = (run.record.get("system") or {}).get("gpus") if device == "cuda" else None
    return f"{names[0] if names else device}, {processes} process{'es' * (processes != 1)}" if device else "-"


OVERVIEW = {
    "what": what,
    "state": when,
    "parameters": parameters,
    "tokens trained": lambda run: last(run, "tokens", "{:,.0f}"),
    "time of training": duration,
    "tokens a second": rate,
    "training loss, last": lambda run: last(run, "loss", "{:.4f}"),
    "held-out loss, lowest": lambda run: lowest(run, "loss"),
    "held-out bits per byte, lowest": lambda run: lowest(run, "bits_per_byte"),
    "on all held-out data": lambda run: ", ".join(
        f"{name.replace('_', ' ')} {number(value)}"
        for name, value in run.result.items()
        if is_number(value) and name not in ("steps", "tokens")
    ),
    "device": where,
}


# ---- curves and samples


def lines(shown: Sequence[Shown], *names: tuple[str, str]) -> list[Line]:
    """Return the curves of metrics (name -> words) of all runs; held-out ones have marks."""
    found = []
    for place, each in enumerate(shown):
        for at, (name, words) in enumerate(names):
            steps, values = each.run.series(name)
            if not steps:
                continue
            label = words if len(shown) == 1 else f"{each.name} {words}".strip()
            evaluated = name.startswith("eval_")
            several = len(shown) == 1 and len({n.removeprefix("eval_") for n, _ in names}) > 1
            found.append(Line(label, tuple(steps), tuple(values), at if several else place, evaluated))
    return found


def charts(shown: Sequence[Shown]) -> list[tuple[str, str, str]]:
    """Return headings, notes and curves: the loss, rates, and whatever else the logs hold."""
    several = len(shown) > 1
    wanted = [
        ("Loss", "nats a token", [("loss", "training"), ("eval_loss", "held out")], False),
        ("Held-out bits per byte", "", [("eval_bits_per_byte", "")], False),
        ("Learning rate", "", [("lr", "")], False),
        ("Gradient norm", "before clipping", [("grad_norm", "")], True),
        ("Tokens a second", "", [("tokens_per_second", "")], False),
    ]
    pairs = [name for each in shown for name in ("margin", "accuracy", "kl") if each.run.names(name)]
    if pairs:
        rewards = [("reward_chosen", "chosen"), ("reward_rejected", "rejected")]
        wanted[1:1] = [
            ("Rewards", "of the preferred and the other answer", rewards, False),
            ("Margin", "", [("margin", "training"), ("eval_margin", "held out")], False),
            ("Accuracy", "share of pairs in order", [("accuracy", "training"), ("eval_accuracy", "held out")], False),
        ]
    tasks = dict.fromkeys(name for each in shown for name in each.run.names("eval_loss/"))
    if several:
        wanted += [(f"Held-out loss of {name.removeprefix('eval_loss/')}", "", [(name, "")], False) for name in tasks]
    elif tasks:
        wanted.append(("Held-out loss by task", "", [(name, name.removeprefix("eval_loss/")) for name in tasks], False))
    drawn = [(heading, note, chart(lines(shown, *names), log)) for heading, note, names, log in wanted]
    return [(heading, note, svg) for heading, note, svg in drawn if svg]


def prompts(run: Run) -> list[dict[str, Any]]:
    """Return the samples by prompt: a few steps from the first to the last, and the others."""
    by_prompt: dict[str, list[dict]] = {}
    counts: dict[tuple[int, str], int] = {}
    for row in run.samples:
        text = str(row.get("prompt", ""))
        counts[row["step"], text] = counts.get((row["step"], text), 0) + 1
        # equal prompts of one step are different ones
        by_prompt.setdefault(text + "\u200b" * (counts[row["step"], text] - 1), []).append(row)
    found = []
    for text, rows in by_prompt.items():
        told = [(f"{row['step']:,}", shortened(str(row.get("text", "")))) for row in rows]
        n = len(told)
        kept = {round(i * (n - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)} if n > SHOWN_STEPS else range(n)
        real = next((str(row["real"]) for row in rows if row.get("real")), "")
        shown = [told[i] for i in sorted(kept)]
        hidden = [told[i] for i in range(n) if i not in kept]
        found.append({"text": text, "shown": shown, "hidden": hidden, "real": real})
    return found


def shortened(text: str) -> str:
    """Return a sample for the page: at most one empty line between two others, "(empty)" for none at all."""
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text.strip("\n")) if text.strip() else "(empty)"

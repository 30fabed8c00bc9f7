"""The tables of a report: settings, scores with intervals, quantized layers, data, the machine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from cli.record import flat
from reporting.record import Run, is_number

MOST_LAYERS = 10  # that are shown; the others can be unfolded
MOST_PARTS = 7  # of the bar of the data; the rest is one part


def number(value: Any) -> str:
    """Return a value for a cell: a number with four digits behind the point, or whole."""
    if isinstance(value, bool) or not is_number(value):
        return "-" if value is None else str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value)):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e-3 and value else f"{value:,.4f}"


# ---- settings, machine


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Return every setting with its value in each run, and whether these differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [plain(run.settings[name]) if name in run.settings else "-" for run in runs]
        # a setting that a script does not have differs from none
        rows.append((name, values, len({plain(run.settings[name]) for run in runs if name in run.settings}) > 1))
    return rows


def plain(value: Any) -> str:
    """Return a setting as it is written in YAML, on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def machine(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return rows on where and by what each run was made; "not recorded" for runs of older versions."""
    rows = [(name, [tell(run.record) or "not recorded" for run in runs]) for name, tell in MACHINE.items()]
    return [("directory", [str(run.directory) for run in runs]), *rows]


def _system(record: dict[str, Any], name: str) -> str:
    system = record.get("system")
    value = system.get(name) if isinstance(system, dict) else None
    if name == "memory" and is_number(value):
        return f"{value / 2**30:,.1f} GiB"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _pairs(record: dict[str, Any], name: str) -> str:
    entries = record.get(name)
    return ", ".join(f"{key} {str(value)[:16]}" for key, value in entries.items()) if isinstance(entries, dict) else ""


MACHINE = {
    "processor": lambda record: _system(record, "processor") or str(record.get("machine") or ""),
    "cores": lambda record: _system(record, "cores"),
    "memory": lambda record: _system(record, "memory"),
    "GPUs": lambda record: _system(record, "gpus"),
    "system": lambda record: _system(record, "system"),
    "Python": lambda record: str(record.get("python") or ""),
    "libraries": lambda record: _pairs(record, "versions"),
    "commit": lambda record: str(record.get("git") or ""),
    "command": lambda record: " ".join(map(str, record["command"])) if isinstance(record.get("command"), list) else "",
    "inputs": lambda record: _pairs(record, "inputs"),
}


# ---- evaluations


def evaluation_tables(runs: Sequence[tuple[str, Run]]) -> list[dict[str, Any]]:
    """Return a table for each report of eval.py, those of the same task beside each other."""
    tables = []
    for name, run in runs:
        for file, report in run.evaluations.items():
            table = evaluation(report)
            table["heading"] = table["heading"] if len(runs) == 1 else f"{name}: {table['heading']}"
            table["note"] = f"{table['note']} {file}".strip()
            tables.append((table["task"], table))
    order = list(dict.fromkeys(task for task, _ in tables))
    return [table for task in order for each, table in tables if each == task]


def evaluation(report: dict[str, Any]) -> dict[str, Any]:
    """Return one report of eval.py as rows: a benchmark of items, --task loss, or --task poems."""
    if isinstance(report.get("measures"), dict):
        rows = [
            score_row(f"{file}: {name.replace('_', ' ')}", value)
            for file, values in report["measures"].items()
            for name, value in flat(values if isinstance(values, dict) else {}).items()
        ]
        return {"task": "loss", "heading": "held-out loss", "note": "", "rows": rows, "groups": []}
    if isinstance(report.get("model"), dict):
        corpus = report.get("corpus") if isinstance(report.get("corpus"), dict) else {}
        rows = [score_row(name, score) for name, score in report["model"].items()]
        groups = [("the same of real poems", [score_row(name, score) for name, score in corpus.items()])]
        return {"task": "poems", "heading": "poems", "note": "", "rows": rows, "groups": groups}
    groups = []
    for key in ("by_category", "by_subject"):
        if isinstance(report.get(key), dict):
            rows = [
                score_row(f"{group} {name}", score)
                for group, scores in report[key].items()
                for name, score in (scores if isinstance(scores, dict) else {}).items()
            ]
            groups.append((key.replace("_", " "), rows))
    task, shots = str(report.get("task", "")), report.get("shots")
    rows = [score_row(name, score) for name, score in report.get("all", {}).items()]
    rows += [score_row(f"mean of subjects, {n}", v) for n, v in (report.get("mean_of_subjects") or {}).items()]
    note = f"{shots} shots" if shots else ""
    return {"task": task, "heading": task, "note": note, "rows": rows, "groups": groups}


def score_row(name: str, score: Any) -> dict[str, Any]:
    """Return a score as cells: its value, its interval, on how many items it rests, and the interval as a bar."""
    if is_number(score):
        return {"name": name, "value": number(score), "interval": "", "of": "", "bar": ""}
    if not isinstance(score, dict):
        return {"name": name, "value": str(score), "interval": "", "of": "", "bar": ""}
    low, high = score.get("low"), score.get("high")
    value, of = score.get("value"), score.get("items")
    if "count" in score:  # a share of poems
        of = score.get("of")
        value = score["count"] / of if of else None
        low, high = score.get("interval") or (None, None)
    told = f"{low:.4f} to {high:.4f}" if is_number(low) and is_number(high) else ""
    drawn = bar(value, low, high) if told and is_number(value) and low >= -1e-9 and high <= 1 + 1e-9 else ""
    return {"name": name, "value": number(value), "interval": told, "of": number(of), "bar": drawn}


def bar(value: float, low: float, high: float) -> Markup:
    """Return a share with its interval as a small picture from 0 to 1."""
    x = [4 + 112 * min(max(each, 0.0), 1.0) for each in (value, low, high)]
    return Markup(
        f'<svg class="bar" viewBox="0 0 120 12"><path class="rail" d="M4 6H116"/>'
        f'<path d="M{x[1]:.1f} 6H{x[2]:.1f}"/><circle cx="{x[0]:.1f}" cy="6" r="3.5"/></svg>'
    )


# ---- quantized layers, data


def layer_tables(run: Run) -> list[tuple[str, list[str], list[list[str]], list[list[str]]]]:
    """Return a note, heads, the layers with the largest errors, and the other layers; nothing for another run."""
    if not run.layers:
        return []
    heads = list(dict.fromkeys(key for each in run.layers.values() for key, value in each.items() if is_number(value)))
    key = next((key for key in ("error_after", "weight_error") if key in heads), heads[0] if heads else "")
    errors = {name: each[key] if is_number(each.get(key)) else 0 for name, each in run.layers.items()}
    order = sorted(errors, key=errors.get, reverse=True)
    rows = [[name, *(number(run.layers[name].get(head)) for head in heads)] for name in order]
    bits = [(layer.get("bits"), layer.get("weights")) for layer in run.layers.values()]
    note = f"{len(rows)} layers, the largest {key.replace('_', ' ')} first"
    if all(is_number(b) and is_number(w) for b, w in bits):
        note += f"; {sum(b * w for b, w in bits) / sum(w for _, w in bits):.3g} bits a weight"
    return [(note, ["layer", *(head.replace("_", " ") for head in heads)], rows[:MOST_LAYERS], rows[MOST_LAYERS:])]


def composition(run: Run) -> list[tuple[list[str], list[list[str]], list[dict[str, Any]]]]:
    """Return heads and rows of what a run was trained on, and the parts of a bar of its sources; nothing if unknown."""
    if not run.data:
        return []
    keys = dict.fromkeys(key for entry in run.data for key, value in entry.items() if is_number(value) or value is None)
    heads = [key for key in keys if key != "held_out"]
    heads = [key for key in heads if any(entry.get(key) for entry in run.data)]
    rows = []
    for entry in run.data:
        name = f"{entry.get('name', '')}{' (held out)' if entry.get('held_out') else ''}"
        rows.append([name, *(number(entry.get(key)) for key in heads)])
    return [(["", *(key.replace("_", " ") for key in heads)], rows, parts(run.data))]


def parts(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the shares of what is trained on: of documents by source, or of tokens by entry."""
    sizes: dict[str, float] = {}
    trained = [entry for entry in entries if not entry.get("held_out")]
    by_source = all(isinstance(entry.get("sources"), dict) and entry["sources"] for entry in trained)
    for entry in trained:
        found = entry["sources"] if by_source else {str(entry.get("name")): entry.get("tokens", 0)}
        weight = entry.get("weight") if is_number(entry.get("weight")) else 1
        for name, size in found.items():
            sizes[name] = sizes.get(name, 0) + (size * weight if is_number(size) else 0)
    total = sum(sizes.values())
    if not total:
        return []
    order = sorted(sizes, key=sizes.get, reverse=True)
    if len(order) > MOST_PARTS + 1:
        sizes["others"] = sum(sizes[name] for name in order[MOST_PARTS:])
        order = [*order[:MOST_PARTS], "others"]
    shares = [(name, sizes[name] / total) for name in order]
    unit = " of documents" if by_source else " of tokens"
    return [
        {"name": name, "percent": f"{100 * share:.3f}", "share": f"{100 * share:.1f} %{unit}", "colour": at}
        for at, (name, share) in enumerate(shares)
    ]

"""The page of a run: what it shows, what it says of files that are missing or damaged, and that no text is markup."""

import json
import math
import random
import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import report
from cli.args import parse
from reporting.curves import Line, chart, limits, short, thin, ticks
from reporting.page import page
from reporting.record import read_run
from reporting.tables import evaluation, number, parts, score_row

EVIL = '<script>alert("x")</script>&<img src=x onerror=y>\x04'
VOID = {"meta", "br"}


class Checked(HTMLParser):
    """Collects tags, attributes and text, and asserts that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write_run(folder: Path, kind: str = "pretrain", **changes) -> Path:
    """A run of 30 lines with samples, data, and two evaluations; changes: settings."""
    folder.mkdir(parents=True)
    settings = {"optim": {"lr": 0.1, "warmup_steps": 2}, "train": {"max_steps": 300}, "out": EVIL} | changes
    (folder / "config.yaml").write_text(yaml.safe_dump({kind: settings}), encoding="utf8")
    training = {"steps": 300, "parameters": 1234567, "vocab_size": 100, "device": "cpu", "processes": 2}
    data = [
        {"name": EVIL, "tokens": 1000, "sources": {"poems": 30, "laws": 10}, "held_out": False},
        {"name": "heldout.bin", "tokens": 100, "sources": {"poems": 3}, "held_out": True},
    ]
    record = {"command": ["pretrain.py", EVIL], "python": "3.11", "training": training, "data": data}
    record["system"] = {"processor": "abacus", "memory": 3 << 30, "gpus": ["A", "B"]}
    (folder / "run.json").write_text(json.dumps(record))
    rows = []
    for n in range(1, 31):
        rows.append({"step": 10 * n, "loss": 5 / n, "lr": 0.1, "tokens": 100 * n, f"loss/{EVIL}": 1.0})
        rows.append({"step": 10 * n, "tokens_per_second": 50.0})
        if n % 10 == 0:
            rows.append({"step": 10 * n, "eval_loss": 6 / n, "eval_bits_per_byte": 3 / n, f"eval_loss/{EVIL}": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"step": 100 * n, "prompt": EVIL, "text": f"{EVIL}{n}", "real": EVIL} for n in range(1, 9)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    score = {"value": 0.25, "low": 0.2, "high": 0.3, "items": 40}
    exam = {"task": "ceval", "model_directory": "m", "shots": 5, "all": {"accuracy": score}}
    exam |= {"by_subject": {EVIL: {"accuracy": score}}, "mean_of_subjects": {"accuracy": 0.26}}
    (folder / "best.ceval.json").write_text(json.dumps(exam))
    poems = {"model_directory": "m", "model": {"exact": {"count": 9, "of": 10, "interval": [0.6, 0.98]}}, "corpus": {}}
    (folder / "poems.json").write_text(json.dumps(poems))
    return folder


def shown(*folders: Path) -> str:
    text = page([read_run(folder) for folder in folders], "python report.py", datetime(2026, 1, 2, 3, 4))
    Checked(text)
    return text


def test_a_run_has_all_its_parts(tmp_path):
    text = " ".join(" ".join(Checked(shown(write_run(tmp_path / "x/run"))).text).split())
    for expected in (
        "x/run Written 2026-01-02 03:04 by python report.py",
        "pretraining of a new model",
        "not finished: step 300 of 300 is the last in the log",
        "1,234,567",
        "1 min 0 s",  # 3000 tokens at 50 a second
        "50 on average, 50 at the end",
        "held-out loss, lowest 0.2000 (step 300)",
        "Learning rate",
        "temperature 0.7",
        "ceval 5 shots best.ceval.json",
        "accuracy 0.2500 0.2000 to 0.3000 40",
        "exact 0.9000 0.6000 to 0.9800 10",
        "poems 75.0 % of documents",
        "abacus",
        "3.0 GiB",
        "A, B",
        "optim.lr",
    ):
        assert expected in text, expected


def test_no_text_of_a_run_is_markup(tmp_path):
    text = shown(write_run(tmp_path / EVIL.replace("/", "")[:40]), write_run(tmp_path / "b"))
    found = Checked(text)
    assert "script" not in found.tags and "img" not in found.tags and "\x04" not in text
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert [value for name, value in found.attributes if name in ("href", "src") and not value.startswith("#")] == []
    assert "http" not in text.replace("http-equiv", "")  # it needs no network
    assert "default-src 'none'" in text


def test_several_runs_show_their_differences(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optim={"lr": 0.2, "warmup_steps": 2})]
    differences = shown(*folders).partition("Differences")[2].partition("</table>")[0]
    assert re.findall(r'class="mono">([^<]*)', differences) == ["optim.lr", "0.1", "0.2"]


def test_equal_names_become_whole_paths(tmp_path):
    folders = [write_run(tmp_path / name / "x/run") for name in "ab"]
    assert all(f"<th>{folder}</th>" in shown(*folders) for folder in folders)


FILES = ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "best.ceval.json", "poems.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "noise", "null", "list"])
def test_a_damaged_file_costs_its_part_and_is_named(tmp_path, name, damage):
    folder = write_run(tmp_path / "run")
    path = folder / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        new = {
            "cut": whole[: len(whole) // 2],
            "noise": random.Random(0).randbytes(300),
            "null": b"null",
            "list": b"[1]",
        }
        path.write_bytes(new[damage])
    text = shown(folder)
    findings = re.findall(r'class="finding[^>]*>(.*?)</div>', text)
    named = name in " ".join(findings)
    assert len(findings) == len(set(findings))
    if name in ("config.yaml", "metrics.jsonl") or (damage != "missing" and name.endswith("json")):
        assert named or (name, damage) == ("metrics.jsonl", "cut")  # a last line that a kill has cut
    assert "<h2" in text and "from None" not in text


def test_values_of_odd_kinds_in_whole_json(tmp_path):
    folder = write_run(tmp_path / "run")
    odd = {
        "training": [1],
        "data": {"a": 1},
        "system": 5,
        "changes": "x",
        "command": 3,
        "versions": [2],
        "inputs": None,
    }
    (folder / "run.json").write_text(json.dumps(odd))
    (folder / "result.json").write_text(json.dumps({"loss": None, "model": 5}))
    lines = ['{"step": 1, "loss": "a"}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": true, "lr": []}', "{}"]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "samples.jsonl").write_text('{"step": 1}\n{"step": 2, "prompt": 5, "text": null}\n')
    (folder / "best.ceval.json").write_text(
        json.dumps({"model_directory": "m", "all": {"a": None, "b": {"value": "x"}}, "by_subject": {"s": 4}})
    )
    shown(folder)


def test_a_quantized_model_and_its_evaluation_beside_it(tmp_path):
    folder = tmp_path / "quant"
    folder.mkdir()
    layers = {f"layer.{n}": {"bits": 4, "weights": 10, "error_after": n / 100} for n in range(12)}
    report_ = {"settings": {"method": "gptq", "bits": 4, "model": "m"}, "layers": layers}
    (folder / "quantization_report.json").write_text(json.dumps(report_))
    score = {"value": 1.5, "low": 1.4, "high": 1.6, "items": 3}
    beside = {"model_directory": "q", "task": "perplexity", "all": {"nats": score}}
    (tmp_path / "quant.perplexity.json").write_text(json.dumps(beside))
    text = " ".join(" ".join(Checked(shown(folder)).text).split())
    assert "quantized by gptq, 4 bits, from m" in text and "2 more layers" in text and "4 bits a weight" in text
    assert text.index("layer.11") < text.index("layer.2") and "nats 1.5000 1.4000 to 1.6000" in text


def test_pairs_have_their_curves(tmp_path):
    folder = write_run(tmp_path / "dpo", "fine_tuning", objective="dpo", lora={"method": "lora", "base": "nf4"})
    rows = [{"step": n, "loss": 0.6, "margin": n / 9, "accuracy": 0.7, "reward_chosen": 1.0} for n in range(9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(folder)
    assert "fine-tuning on pairs (dpo), adapters: lora on nf4" in text
    assert all(heading in text for heading in ("Margin", "Accuracy", "Rewards"))


def test_samples_of_empty_lines_take_little_room(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [{"step": 1, "prompt": "p", "text": "a\n\n \n\n\nb\n"}, {"step": 2, "prompt": "p", "text": " \n"}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(folder)
    assert ">a\n\nb<" in text and ">(empty)<" in text


# ---- curves


def numbers(svg: str) -> list[tuple[float, float]]:
    (path,) = re.findall(r'<path class="many"[^>]* d="([^"]*)"', svg)
    return [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]


def test_points_lie_where_their_values_are():
    points = numbers(chart([Line("a", (0, 50, 100), (1.0, 3.0, 2.0))]))
    assert [x for x, _ in points] == [52, pytest.approx((52 + 448) / 2), 448]
    (low, high, middle) = (y for _, y in points)
    assert low > middle > high and middle == pytest.approx((low + high) / 2, abs=0.1)


def test_in_powers_of_ten_equal_ratios_are_equal_distances():
    svg = chart([Line("a", (1, 2, 3, 4), (0.0, 1.0, 10.0, 100.0))], logarithmic=True)
    y = [y for _, y in numbers(svg)]
    assert len(y) == 3 and y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)


def test_what_is_not_finite_breaks_the_line_and_is_a_cross():
    svg = chart([Line("a", (1, 2, 3, 4), (1.0, math.nan, 2.0, -math.inf))])
    assert svg.count('class="cross"') == 2 and len(re.findall("M", re.findall(r'many"[^>]* d="([^"]*)"', svg)[0])) == 2
    assert chart([Line("a", (1,), (math.nan,))]) == "" and chart([]) == ""


def test_one_spike_does_not_flatten_a_curve():
    values = [1 + n / 100 for n in range(100)] + [1e9]
    assert limits(values)[1] < 3 and limits(values[:-1])[1] > 1.99
    svg = chart([Line("a", tuple(range(101)), tuple(values))])
    assert svg.count('class="cross"') == 1


def test_a_long_curve_keeps_its_peaks():
    points = [(n, math.sin(n)) for n in range(100_000)]
    points[777] = (777, 50.0)
    kept = thin(points)
    assert len(kept) <= 510 and (777, 50.0) in kept and kept == sorted(kept)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 900), (2.9, 8.5), (1e-7, 3e-3), (-5, 5), (99.99, 100.01)])
def test_the_grid_has_round_numbers(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert all(len(short(value)) <= 7 for value in found)
    assert len({short(value) for value in found}) == len(found)


def test_numbers_of_the_grid_are_short():
    assert [short(v) for v in (0, 1500, 20000, 2e6, 2e-4, 0.1 + 0.2)] == ["0", "1500", "20k", "2M", "2e-4", "0.3"]


# ---- tables


def test_scores_and_numbers():
    assert [number(v) for v in (3, 1234567, 0.25, 1e-6, None, True, "x", math.inf)] == [
        *("3", "1,234,567", "0.2500", "1e-06", "-", "True", "x", "inf")
    ]
    assert score_row("a", {"value": 2.5, "low": 2.0, "high": 3.0, "items": 7})["bar"] == ""  # no share
    assert evaluation({"measures": {"heldout": {"loss": 3.0, "bits_per_byte": 2.0}}})["rows"][1]["value"] == "2"


def test_shares_of_the_data_by_source_weight_and_size():
    entries = [{"name": "a", "tokens": 10, "weight": 3.0}, {"name": "b", "tokens": 10}]
    assert [(p["name"], p["percent"]) for p in parts(entries)] == [("a", "75.000"), ("b", "25.000")]
    many = [{"name": str(n), "tokens": 1} for n in range(20)]
    assert len(parts(many)) == 8 and parts(many)[-1]["share"].startswith("65.0 %")
    assert parts([{"name": "a", "tokens": 0}]) == []


# ---- the script


def test_the_script_writes_beside_the_run_or_where_it_is_told(tmp_path, capsys):
    run = write_run(tmp_path / "out/pretrain")
    result = report.main(parse(report.Args, "report", [str(run)]))
    assert result == {"page": str(run / "report.html"), "runs": 1} and (run / "report.html").is_file()
    write_run(tmp_path / "out/sft", "fine_tuning")
    (tmp_path / "out/logs").mkdir()
    result = report.main(parse(report.Args, "report", [str(tmp_path / "out"), "--out", str(tmp_path / "new/x.html")]))
    assert result["runs"] == 2 and capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "new/x.html")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "expected a directory of a run"),
        (["{0}/none"], "none is no directory"),
        (["{0}"], "holds no file of a run"),
        (["{0}", "{0}"], "several runs need --out"),
        (["{0}", "--out", "{0}/x.pdf"], "should end in .html"),
    ],
)
def test_misuse_is_one_sentence(tmp_path, words, expected):
    with pytest.raises(ValueError, match=expected):
        report.main(parse(report.Args, "report", [word.format(tmp_path) for word in words]))
    assert list(tmp_path.iterdir()) == []

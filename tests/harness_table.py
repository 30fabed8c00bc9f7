"""Our benchmarks beside lm-evaluation-harness on the same items, item by item, with the time of each.

python -m tests.harness_table --model DIR --data DIR      needs setup.sh --extra eval, no network

DIR of --data holds ceval/, mmlu/, ... in their published layouts. Rows of the table: task, items, choices that differ,
largest difference of a log-probability, seconds of the harness's own `hf` model, of our adapter in the harness, and of
eval.py. The harness's `hf` model gets the same batch size. Items that do not fit the window are not compared: eval.py
asks them with fewer examples, the harness without their beginning.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import eval as eval_script
from checkpoint.directory import load_model, save_model
from cli.extras import need
from evaluation.exam_subjects import CEVAL, MMLU
from evaluation.exams import LETTERS, CEval, MMLUExam
from evaluation.harness import adapter
from evaluation.registry import make_task
from tokenizer import load_tokenizer

FORMS = {"ceval": (CEVAL, CEval, "val", "答案："), "mmlu": (MMLU, MMLUExam, "val", "Answer:")}


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file by the names in its first line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def harness_task(folder: Path, name: str, data: Path, subject: str, shots: int) -> dict[str, Any]:
    """Write one subject as files of the harness; return its task as a dict."""
    subjects, exam, split, cue = FORMS[name]
    files = {}
    for part, key in (("dev", "train"), (split, "test")):
        path = next(p for p in (data / part / f"{subject}_{part}.csv", data / part / f"{subject}.csv") if p.exists())
        target = folder / f"{subject}.{part}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(path))
        target.write_text("".join(lines), encoding="utf8")
        files[key] = str(target)
    options = "".join(f"\n{letter}. {{{{{letter}}}}}" for letter in LETTERS[:4])
    return {
        "task": f"{name}_{subject}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "num_fewshot": shots,
        "description": exam.description(None, subjects[subject].title),
        "doc_to_text": "{{question.strip()}}" + options + "\n" + cue,
        "doc_to_choice": list(LETTERS[:4]),
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def ask_harness(model: Any, tasks: list[dict[str, Any]]) -> tuple[dict[str, list[list[float]]], float]:
    """Return the log-probabilities of the choices of every item by task, and the seconds that it took."""
    import lm_eval

    begin = time.perf_counter()
    result = lm_eval.simple_evaluate(model, tasks=tasks, log_samples=True, bootstrap_iters=0)
    found = {}
    for name, samples in result["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        found[name] = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    return found, time.perf_counter() - begin


def ask_ourselves(name: str, args: argparse.Namespace, subjects: list[str]) -> tuple[dict[str, list], float]:
    """Return what `ask_harness` does, of eval.py."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        begin = time.perf_counter()
        options = {"model": args.model, "task": name, "data": args.data / name, "shots": args.shots, "output": output}
        options |= {"subjects": tuple(subjects), "batch_size": args.batch_size, "dtype": "fp32"}
        options |= {} if name == "ceval" else {"split": FORMS[name][2]}
        eval_script.main(eval_script.Args(**options))
        seconds = time.perf_counter() - begin
        found: dict[str, list] = {}
        for line in output.with_suffix(".items.jsonl").open(encoding="utf8"):
            record = json.loads(line)
            fits = record["shots"] == args.shots and not record["cut"]
            found.setdefault(f"{name}_{record['subject']}", []).append(record["logprobs"] if fits else None)
    return found, seconds


def best(logprobs: list[float]) -> int:
    """Return the number of the likeliest choice, of equal ones the first."""
    return logprobs.index(max(logprobs))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--subjects", type=int, default=3, help="number of subjects of each task")
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    need("tests.harness_table", "eval", "lm_eval")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from lm_eval.models.huggingface import HFLM

    heads = ("shots", "items", "choices differ", "largest difference", "hf s", "adapter s", "eval.py s")
    print(f"{'task':<8}" + "".join(f"{head:>{len(head) + 2}}" for head in heads))
    saved = tempfile.TemporaryDirectory()  # as we save a model: with the tokenizer.json that transformers reads
    save_model(Path(saved.name), load_model(args.model), load_tokenizer(args.model))
    args.model = Path(saved.name)
    for name, (table, *_) in FORMS.items():
        make_task(name, eval_script.Args(task=name, data=args.data / name))  # says what is missing
        subjects = [s for s in table if any((args.data / name / FORMS[name][2]).glob(f"{s}*.csv"))][: args.subjects]
        with tempfile.TemporaryDirectory() as folder:
            tasks = [harness_task(Path(folder), name, args.data / name, subject, args.shots) for subject in subjects]
            hf = HFLM(str(args.model), dtype="float32", device="cpu", batch_size=args.batch_size)
            theirs, hf_seconds = ask_harness(hf, tasks)
            with torch.inference_mode():
                there, our_seconds = ask_harness(adapter()(str(args.model), batch_size=args.batch_size), tasks)
        ours, seconds = ask_ourselves(name, args, subjects)
        assert theirs.keys() == there.keys() == ours.keys()
        rows = [row for task in theirs for row in zip(theirs[task], there[task], ours[task], strict=True)]
        rows = [
            row for row in rows if row[-1] is not None
        ]  # of a prompt that is too long, each leaves out another part
        differ = sum(len({best(logprobs) for logprobs in row}) > 1 for row in rows)
        largest = max(abs(a - b) for row in rows for other in row[1:] for a, b in zip(row[0], other))
        seconds = [f"{each:.1f}" for each in (hf_seconds, our_seconds, seconds)]
        cells = (args.shots, len(rows), differ, f"{largest:.1e}", *seconds)
        print(f"{name:<8}" + "".join(f"{cell:>{len(head) + 2}}" for cell, head in zip(cells, heads)))


if __name__ == "__main__":
    main()

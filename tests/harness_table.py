"""Our benchmarks beside lm-evaluation-harness on the same items, item by item, with the time of each.

python -m tests.harness_table --model DIR --data DIR      needs setup.sh --extra eval --extra dev, no network

DIR of --data holds ceval/, mmlu/ and gsm8k_test.jsonl in their published layouts. The same items are asked of the
harness with its own `hf` model, of the harness with our models (evaluation/harness.py), of eval.py and, with --server,
of the harness's `local-completions` against our server. Columns of the table: items, choices or answers that differ
between any two (answers but for blanks at their ends), largest difference of a log-probability, seconds of each, and
how many times eval.py is faster than `hf`. All get the same batch size. Items that do not fit the window are not
compared: eval.py asks them with fewer examples, the harness without their beginning. --random makes a model with random
weights by transformers, with the shape and the tokenizer of --model.
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
from evaluation.generated import GSM8K
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


def written_task(folder: Path, path: Path, limit: int) -> dict[str, Any]:
    """Write the first problems of GSM8K as a file of the harness; return its task, without shots, as a dict."""
    target = folder / "gsm8k.jsonl"
    target.write_text("".join(path.read_text(encoding="utf8").splitlines(keepends=True)[:limit]), encoding="utf8")
    return {
        "task": "gsm8k_gsm8k",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(target)}},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": list(GSM8K.until), "do_sample": False, "max_gen_toks": GSM8K.new_tokens},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def ask_harness(model: Any, tasks: list[dict[str, Any]]) -> tuple[dict[str, list[list[float]]], float]:
    """Return the log-probabilities of the choices of every item, or its answer, by task; and the seconds it took."""
    import lm_eval

    begin = time.perf_counter()
    result = lm_eval.simple_evaluate(model, tasks=tasks, log_samples=True, bootstrap_iters=0)
    found = {}
    for name, samples in result["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        found[name] = [responses(sample["resps"]) for sample in samples]
    return found, time.perf_counter() - begin


def responses(found: list) -> list[float] | str:
    """Return what the harness stores of an item: the log-probability of each choice, or a text."""
    return found[0][0] if isinstance(found[0][0], str) else [float(response[0][0]) for response in found]


def ask_ourselves(name: str, args: argparse.Namespace, subjects: list[str]) -> tuple[dict[str, list], float]:
    """Return what `ask_harness` does, of eval.py."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        begin = time.perf_counter()
        options = {"model": args.model, "task": name, "output": output, "batch_size": args.batch_size, "dtype": "fp32"}
        if name == "gsm8k":
            options |= {"data": args.data / "gsm8k_test.jsonl", "shots": 0, "limit": args.problems}
        else:
            options |= {"data": args.data / name, "shots": args.shots, "subjects": tuple(subjects)}
            options |= {} if name == "ceval" else {"split": FORMS[name][2]}
        eval_script.main(eval_script.Args(**options))
        seconds = time.perf_counter() - begin
        found: dict[str, list] = {}
        for line in output.with_suffix(".items.jsonl").open(encoding="utf8"):
            record = json.loads(line)
            fits = record["shots"] == options["shots"] and not record["cut"]
            value = record["answer"] if name == "gsm8k" else record["logprobs"]
            found.setdefault(f"{name}_{record['subject']}", []).append(value if fits else None)
    return found, seconds


def ask_server(args: argparse.Namespace, tasks: list[dict[str, Any]]) -> tuple[dict[str, list], float]:
    """Return what `ask_harness` does, of the harness's client of completions against a server of ours."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from tests.helpers.server import Server

    server = Server(args.model, rows=args.batch_size, queue=1000, timeout=600)
    try:
        options = {"tokenizer": str(args.model), "tokenizer_backend": "huggingface", "max_length": args.window}
        client = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="tiny", batch_size=1, **options)
        return ask_harness(client, tasks)
    finally:
        server.close()


def save_models(args: argparse.Namespace, folder: Path) -> None:
    """Save the model as we save one, with the tokenizer.json that transformers reads; or a random one of its own."""
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model)
    args.window = model.args.max_seq_len
    save_model(folder, model, tokenizer)
    if args.random:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(args.random)
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        for parameter in made.parameters():  # else all choices are nearly as likely
            parameter.data *= 4 if parameter.dim() == 2 else 1
        made.save_pretrained(folder)
    args.model = folder


def best(logprobs: list[float]) -> int:
    """Return the number of the likeliest choice, of equal ones the first."""
    return logprobs.index(max(logprobs))


def compare(found: list[dict[str, list]]) -> tuple[int, int, float]:
    """Return over how many items, in how many any two differ, and the largest difference of a log-probability."""
    assert all(each.keys() == found[0].keys() for each in found)
    rows = [row for task in found[0] for row in zip(*(each[task] for each in found), strict=True)]
    rows = [row for row in rows if None not in row]  # of a prompt that is too long, each leaves out another part
    differ, largest = 0, 0.0
    for row in rows:
        if isinstance(row[0], str):
            differ += len({text.strip() for text in row}) > 1
        else:
            differ += len({best(logprobs) for logprobs in row}) > 1
            largest = max(largest, *(abs(a - b) for other in row[1:] for a, b in zip(row[0], other)))
    return len(rows), differ, largest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--subjects", type=int, default=3, help="number of subjects of each task")
    parser.add_argument("--tasks", nargs="+", choices=[*FORMS, "gsm8k"], default=[*FORMS, "gsm8k"])
    parser.add_argument("--problems", type=int, default=20, help="number of problems of gsm8k")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--server", action="store_true", help="ask through our server, too")
    parser.add_argument("--random", type=int, default=0, help="seed of a model of transformers; 0: that of --model")
    args = parser.parse_args()
    need("tests.harness_table", "eval", "lm_eval")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from lm_eval.models.huggingface import HFLM

    heads = ["shots", "items", "differ", "largest difference", "hf s", "adapter s", "eval.py s"]
    heads += ["server s"] * args.server + ["eval.py is faster"]
    print(f"{'task':<8}" + "".join(f"{head:>{len(head) + 2}}" for head in heads))
    with tempfile.TemporaryDirectory() as saved:
        save_models(args, Path(saved))
        for name in args.tasks:
            subjects, shots = [], 0
            with tempfile.TemporaryDirectory() as folder:
                if name == "gsm8k":
                    tasks = [written_task(Path(folder), args.data / "gsm8k_test.jsonl", args.problems)]
                else:
                    make_task(name, eval_script.Args(task=name, data=args.data / name))  # says what is missing
                    names, shots = FORMS[name][0], args.shots
                    subjects = [s for s in names if any((args.data / name / FORMS[name][2]).glob(f"{s}*.csv"))]
                    subjects = subjects[: args.subjects]
                    tasks = [harness_task(Path(folder), name, args.data / name, s, shots) for s in subjects]
                hf = HFLM(str(args.model), dtype="float32", device="cpu", batch_size=args.batch_size)
                results = [ask_harness(hf, tasks)]
                with torch.inference_mode():
                    results.append(ask_harness(adapter()(str(args.model), batch_size=args.batch_size), tasks))
                results.append(ask_ourselves(name, args, subjects))
                results += [ask_server(args, tasks)] if args.server else []
            items, differ, largest = compare([found for found, _ in results])
            seconds = [f"{each:.1f}" for _, each in results]
            cells = [shots, items, differ, f"{largest:.1e}", *seconds, f"{results[0][1] / results[2][1]:.1f}"]
            print(f"{name:<8}" + "".join(f"{cell:>{len(head) + 2}}" for cell, head in zip(cells, heads)), flush=True)


if __name__ == "__main__":
    main()

"""The items of each benchmark as tasks of lm-evaluation-harness, for tests/harness_table.py.

The harness reads the published files by its own tasks, of which only the place of the data is changed; where it has
none (longeval, passkey, answers, perplexity) it is given the texts as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import eval as eval_script
from cli.progress import say
from evaluation.exam_subjects import ACLUE, CEVAL, CMMLU, MMLU
from evaluation.exams import LETTERS
from evaluation.generated import GSM8K
from evaluation.long_context import SETS, SETS_E
from evaluation.registry import make_task
from tokenizer import load_tokenizer

# task -> subjects, files of the harness's tasks, split
EXAMS = {
    "ceval": (CEVAL, "ceval/ceval-valid_{}.yaml", "val"),
    "cmmlu": (CMMLU, "cmmlu/cmmlu_{}.yaml", "test"),
    "aclue": (ACLUE, "aclue/aclue_{}.yaml", "test"),
    "mmlu": (MMLU, "mmlu/default/mmlu_{}.yaml", "val"),
}
PAIRS = {"blimp": "blimp/{}.yaml", "zhoblimp": "zhoblimp/{}.yaml"}
LONG = {"longbench": (SETS, ""), "longbench_e": (SETS_E, "_e")}
RAW = ("longbench", "longbench_e", "longeval")  # eval.py asks them with the model's chat template by itself
TASKS = (*EXAMS, *PAIRS, "gsm8k", *LONG, "longeval", "passkey", "answers", "perplexity")

Asked = tuple[dict[str, dict[str, Any]], dict[str, Any]]  # tasks of the harness by subject, options of eval.py


def its_task(folder: Path, file: str, files: dict[str, Iterable[dict]], **changes: Any) -> dict[str, Any]:
    """Return a task of the harness, as its yaml file has it, that reads records which are written below `folder`."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    for key in ("dataset_name", "tag", "task_alias", "group"):
        config.pop(key, None)
    return config | changes | data_of(folder, files)


def data_of(folder: Path, files: dict[str, Iterable[dict]]) -> dict[str, Any]:
    """Write records (split -> records) below `folder`; return what a task of the harness says of its data."""
    folder.mkdir()
    for split, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf8")
    paths = {split: str(folder / f"{split}.jsonl") for split in files}
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": paths}}


def plain_task(folder: Path, name: str, texts: Iterable[str], new_tokens: int | None) -> dict[str, Any]:
    """Return a task of the harness that continues texts by `new_tokens`, or judges all of their tokens (None)."""
    config: dict[str, Any] = {"task": name, "test_split": "test", "num_fewshot": 0, "metadata": {"version": 0}}
    config |= data_of(folder, {"test": ({"text": text} for text in texts)})
    if new_tokens is None:
        metric = {"metric": "bits_per_byte"}
        return config | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [metric],
        }
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    options = {"until": [], "do_sample": False, "max_gen_toks": new_tokens}
    config |= {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": ""}
    return config | {"generation_kwargs": options, "metric_list": [metric]}


def csv_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a csv file, by the names in its first line or those of MMLU."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    names = ["question", *LETTERS[:4], "answer"]
    if "question" in [cell.lower() for cell in rows[0]]:
        names, rows = rows[0], rows[1:]
    return [dict(zip(names, row)) for row in rows]


def json_rows(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of lines of JSON."""
    return [json.loads(line) for line in path.open(encoding="utf8")]


def exam(name: str, folder: Path, args: argparse.Namespace) -> Asked:
    """Return the first subjects of an examination."""
    subjects, file, split = EXAMS[name]
    tasks = {}
    for subject, title in subjects.items():
        files = {}
        for part in ("dev", split):
            names = (f"{subject}_{part}.csv", f"{subject}.csv", f"{title.title}.csv")
            found = [path for each in names if (path := args.data / name / part / each).is_file()]
            files[part] = csv_rows(found[0]) if found else []
        if len(tasks) == args.subjects or not files[split]:
            continue
        if name == "mmlu":  # the harness's copy of the data has other names
            for rows in files.values():
                for row in rows:
                    row |= {"choices": [row[letter] for letter in LETTERS[:4]], "answer": LETTERS.index(row["answer"])}
        splits = {"validation_split": None, "test_split": split, "fewshot_split": "dev" if args.shots else None}
        tasks[subject] = its_task(folder / subject, file.format(subject), files, num_fewshot=args.shots, **splits)
    options = {"shots": args.shots, "subjects": tuple(tasks)}
    return tasks, options | ({} if name == "ceval" else {"split": split})


def pairs(name: str, folder: Path, args: argparse.Namespace) -> Asked:
    """Return the first paradigms of minimal pairs."""
    paths = sorted((args.data / name).rglob("*.jsonl"))[: args.subjects]
    tasks = {}
    for path in paths:
        file = PAIRS[name].format(path.stem)
        tasks[path.stem] = its_task(folder / path.stem, file, {"train": json_rows(path)})
    return tasks, {"subjects": tuple(tasks)}


def gsm8k(name: str, folder: Path, args: argparse.Namespace) -> Asked:
    """Return problems without solved examples."""
    rows = json_rows(args.data / name / "test.jsonl")
    splits = {"training_split": None, "fewshot_split": None, "num_fewshot": 0}
    task = its_task(folder / name, "gsm8k/gsm8k.yaml", {"test": rows}, **splits)
    task["generation_kwargs"] = task["generation_kwargs"] | {"max_gen_toks": GSM8K.new_tokens}
    return {name: task}, {"shots": 0}


def longbench(name: str, folder: Path, args: argparse.Namespace) -> Asked:
    """Return the sets of LongBench that are there, with its own prompts: the harness's have other blanks, end some
    answers at the first line break, and name a temperature of 1 that its client of servers obeys. In the harness's copy
    of the data `input` is called `question`."""
    sets, suffix = LONG[name]
    prompts = json.loads((args.data / "longbench" / "dataset2prompt.json").read_text(encoding="utf8"))
    tasks = {}
    for each in sets:
        path = args.data / "longbench" / f"{each}{suffix}.jsonl"
        if path.is_file():
            rows = [row | {"question": row["input"]} for row in json_rows(path)]
            task = its_task(folder / each, f"longbench/{each}{suffix}.yaml", {"test": rows})
            task["doc_to_text"] = prompts[each].replace("{context}", "{{context}}").replace("{input}", "{{question}}")
            task["generation_kwargs"] = task["generation_kwargs"] | {"until": [], "temperature": 0}
            if task["generation_kwargs"]["max_gen_toks"] <= args.window // 2:  # else eval.py asks for a shorter answer
                tasks[each] = task
    return tasks, {"data": args.data / "longbench", "subjects": tuple(tasks)}


def given(name: str, folder: Path, args: argparse.Namespace) -> Asked:
    """Return the prompts of a task that the harness does not have; the texts are those of eval.py's items."""
    data = {"answers": args.data / "answers.jsonl", "perplexity": args.data / "texts", "passkey": None}
    options: dict[str, Any] = {"data": data.get(name, args.data / name)}
    if name == "perplexity":
        options["stride"] = args.window  # the harness judges windows that do not overlap
    task = make_task(name, eval_script.Args(task=name, limit=args.items, **options))
    if name == "passkey":
        task.tokenizer, task.window = load_tokenizer(args.model), args.window
    blocks, tokenizer = task.chosen(), load_tokenizer(args.model)
    if name == "perplexity" and args.server:
        blocks = [items for items in blocks if all(len(tokenizer.encode(i.question)) < args.window for i in items)]
    tasks = {}
    for items in blocks[: args.subjects]:
        longest = None if name == "perplexity" else task.length(items[0]) if name != "answers" else task.new_tokens
        key = items[0].subject
        tasks[key] = plain_task(folder / key, f"{name}_{key}", [item.question for item in items], longest)
    return tasks, options | {"subjects": tuple(tasks)}


def make_asked(name: str, folder: Path, args: argparse.Namespace) -> Asked | None:
    """Return the items of a task for both sides; None where their data are missing."""
    makers: dict[str, Callable[..., Asked]] = {
        **dict.fromkeys(EXAMS, exam),
        **dict.fromkeys(PAIRS, pairs),
        **dict.fromkeys(LONG, longbench),
        "gsm8k": gsm8k,
    }
    try:
        tasks, options = makers.get(name, given)(name, folder, args)
    except FileNotFoundError as error:
        say(f"{name} is left out: {error}")
        return None
    if not tasks:
        say(f"{name} is left out: {args.data} has no data of it")
        return None
    options = {"data": args.data / name} | options | ({"raw": True} if name in RAW else {})
    return tasks, options | ({"cut": "left"} if name in (*LONG, "longeval", "passkey") else {})

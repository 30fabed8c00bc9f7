"""Our benchmarks beside lm-evaluation-harness on the same items, item by item, with the time of each.

python -m tests.harness_table --model DIR --data DIR      needs setup.sh --extra eval --extra dev, no network

DIR of --data holds a folder of the published files for each task: ceval/, cmmlu/, aclue/, mmlu/, blimp/, zhoblimp/,
gsm8k/, longbench/ and longeval/; answers.jsonl and texts/ are for `answers` and `perplexity`. What is missing is left
out. The same items are asked of the harness with its own `hf` model (transformers), of the harness with our models
(evaluation/harness.py), of eval.py and, with --server, of the harness's `local-completions` against our server. The
harness reads them by its own tasks, of which only the place of the data is changed; where it has none (longeval,
passkey, answers, perplexity) it is given the texts as they are, so that transformers computes them again.

Columns of the table: items, choices or answers that differ between any two (answers but for blanks at their ends),
answers of the same ids that transformers writes as another text (it writes U+FFFD for all bytes of a run in which a
byte belongs to no character, also for those that are one; they are compared as our tokenizer writes them), largest
difference of a log-probability, also as a share of it (the harness adds up in float32), seconds of each, and how many
times eval.py is faster than `hf`. Seconds are those of the processor (of all threads), so that other programs
of the machine count little: for the harness those of its models without what it does beside, for eval.py all. All get
the same batch size and the same id before a text without context, and leave out the beginning of a prompt that does not
fit. Items that eval.py asks with fewer examples, or of which it asks for a shorter answer, are not compared. With
--server, perplexity is that of files whose texts all fit the window: the harness's client of servers judges longer ones
in windows that are one id shorter. --random makes a model with random weights by transformers, with the shape and the
tokenizer of --model and a window of 2048 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import eval as eval_script
from checkpoint.directory import load_model, save_model
from checkpoint.locate import read_stop_ids
from cli.extras import need
from evaluation.harness import adapter
from serving.assistant import first_id, usable_template
from tests.helpers.harness_tasks import TASKS, json_rows, make_asked
from tokenizer import Tokenizer, load_tokenizer

# ---- who is asked


def ask_harness(model: Any, tasks: dict[str, dict[str, Any]], limit: int, chat: bool) -> tuple[dict[str, list], float]:
    """Return what the model said of every item, by subject, and the seconds it took in the model's methods."""
    import lm_eval

    seconds = 0.0

    def timed(method: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal seconds
            begin = time.process_time()
            try:
                return method(*args, **options)
            finally:
                seconds += time.process_time() - begin

        return call

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, name, timed(getattr(model, name)))
    options = {"log_samples": True, "bootstrap_iters": 0, "limit": limit, "apply_chat_template": chat}
    result, found = lm_eval.simple_evaluate(model, tasks=list(tasks.values()), **options), {}
    for subject, task in tasks.items():
        samples = sorted(result["samples"][task["task"]], key=lambda sample: sample["doc_id"])
        # GSM8K has two samples of a problem, one for each way to find its number
        found[subject] = list({sample["doc_id"]: responses(sample["resps"]) for sample in samples}.values())
    return found, seconds


def write_as_ours(hf: Any, tokenizer: Tokenizer) -> list[str]:
    """Let the harness's `hf` model write the ids of an answer as `tokenizer` does. Return a list that will hold the
    answers that transformers writes as another text, blanks at the ends apart."""
    theirs, otherwise = hf.tok_decode, []

    def decode(ids: int | list[int], skip_special_tokens: bool = True) -> str:
        text = theirs(ids, skip_special_tokens=skip_special_tokens)
        if isinstance(ids, int):  # the name of eos, which may end an answer
            return text
        ours = tokenizer.decode(ids)
        if ours.strip() != text.strip():
            otherwise.append(text)
        return ours

    hf.tok_decode = decode
    return otherwise


def responses(found: list) -> list[float] | str:
    """Return what the harness stores of an item: the log-probability of each choice (or of the text), or an answer."""
    if isinstance(found[0][0], str):
        return found[0][0]
    return [float(each[0][0] if isinstance(each[0], (list, tuple)) else each[0]) for each in found]


def ask_ourselves(name: str, args: argparse.Namespace, options: dict[str, Any]) -> tuple[dict[str, list], float]:
    """Return what `ask_harness` does, of eval.py."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        options = {"limit": args.items, "batch_size": args.batch_size, "dtype": "fp32"} | options
        begin = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            eval_script.main(eval_script.Args(model=args.model, task=name, output=output, **options))
        seconds = time.process_time() - begin
        found: dict[str, list] = {}
        for record in json_rows(output.with_suffix(".items.jsonl")):
            same = record.get("shots", 0) == options.get("shots", 0) and not record.get("shorter_answer")
            found.setdefault(record["subject"], []).append(said(record) if same else None)
    return found, seconds


def said(record: dict[str, Any]) -> list[float] | str:
    """Return of a record of eval.py what `responses` returns."""
    if "logprobs" in record:
        return record["logprobs"]
    return record["answer"] if "answer" in record else [-record["scores"]["loss"][0]]


def ask_server(
    args: argparse.Namespace, tasks: dict[str, dict[str, Any]], begins: bool, chat: bool
) -> tuple[dict[str, list], float]:
    """Return what `ask_harness` does, of the harness's client of completions against a server of ours. begins: whether
    bos stands before a text; the client sends ids, and adds none by itself."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from tests.helpers.server import Server

    server = Server(args.model, rows=args.batch_size, queue=1000, timeout=600)
    try:
        options = {"tokenizer": str(args.model), "tokenizer_backend": "huggingface"}
        options |= {"max_length": args.window + 1}  # it keeps one for an answer, besides what the answer may take
        options |= {"custom_prefix_token_id": args.first_id, "add_bos_token": begins, "batch_size": 1}
        client = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="tiny", **options)
        return ask_harness(client, tasks, args.items, chat)
    finally:
        server.close()


def save_models(args: argparse.Namespace, folder: Path) -> None:
    """Save the model as we save one, with the tokenizer.json that transformers reads; or a random one of its own."""
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    args.window, args.first_id = model.args.max_seq_len, first_id(tokenizer)
    stop_ids = read_stop_ids(args.model)  # what ends an answer of a chat model ends it for all
    save_model(folder, model, tokenizer, stop_ids and sorted(stop_ids))
    if args.random:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(args.random)
        args.window = 2048
        config = AutoConfig.from_pretrained(folder, max_position_embeddings=args.window)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in made.parameters():  # else all choices are nearly as likely
            parameter.data *= 4 if parameter.dim() == 2 else 1
        made.save_pretrained(folder)
    args.model = folder


# ---- the table


def best(logprobs: list[float]) -> int:
    """Return the number of the likeliest choice, of equal ones the first."""
    return logprobs.index(max(logprobs))


def compare(found: list[dict[str, list]]) -> tuple[int, int, float, float]:
    """Return over how many items, in how many any two differ, and the largest difference of a log-probability, also as
    a share of it."""
    assert all(each.keys() == found[0].keys() for each in found)
    rows = [row for task in found[0] for row in zip(*(each[task] for each in found), strict=True)]
    rows = [row for row in rows if None not in row]
    differ, largest, share = 0, 0.0, 0.0
    for row in rows:
        if isinstance(row[0], str):
            differ += len({text.strip() for text in row}) > 1
        else:
            differ += len({best(logprobs) for logprobs in row}) > 1
            apart = [(abs(a - b), abs(a)) for other in row[1:] for a, b in zip(row[0], other)]
            largest = max(largest, *(difference for difference, _ in apart))
            share = max(share, *(difference / logprob for difference, logprob in apart))
    return len(rows), differ, largest, share


def measure(name: str, args: argparse.Namespace) -> Iterator[list[Any]]:
    """Yield the cells of the table for one task."""
    from lm_eval.models.huggingface import HFLM

    with tempfile.TemporaryDirectory() as folder:
        asked = make_asked(name, Path(folder), args)
        if asked is None:
            return
        tasks, options = asked
        same = {"batch_size": args.batch_size, "prefix_token_id": args.first_id}
        # of a text that is judged whole, the first id stands before it already
        begins = bool(load_tokenizer(args.model).begins) and name != "perplexity"
        hf = HFLM(str(args.model), dtype="float32", device="cpu", add_bos_token=begins, **same)
        otherwise = write_as_ours(hf, load_tokenizer(args.model))
        chat = name == "answers" and usable_template(load_tokenizer(args.model)) is not None
        results = [ask_harness(hf, tasks, args.items, chat)]
        with torch.inference_mode():
            ours = adapter()(str(args.model), batch_size=args.batch_size)
            results.append(ask_harness(ours, tasks, args.items, chat))
        results.append(ask_ourselves(name, args, options))
        if args.server:
            results.append(ask_server(args, tasks, begins, chat))
    items, differ, largest, share = compare([found for found, _ in results])
    seconds = [f"{each:.1f}" for _, each in results]
    cells = [options.get("shots", 0), items, differ, len(otherwise), f"{largest:.1e}", f"{share:.1e}"]
    yield [*cells, *seconds, f"{results[0][1] / results[2][1]:.1f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--subjects", type=int, default=3, help="number of subjects of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--items", type=int, default=20, help="number of items of each subject")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--server", action="store_true", help="ask through our server, too")
    parser.add_argument("--random", type=int, default=0, help="seed of a model of transformers; 0: that of --model")
    args = parser.parse_args()
    need("tests.harness_table", "eval", "lm_eval")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    heads = ["shots", "items", "differ", "bytes", "largest difference", "as a share", "hf s", "adapter s", "eval.py s"]
    heads += ["server s"] * args.server + ["eval.py is faster"]
    print(f"{'task':<12}" + "".join(f"{head:>{len(head) + 2}}" for head in heads))
    with tempfile.TemporaryDirectory() as saved:
        save_models(args, Path(saved))
        for name in args.tasks:
            for cells in measure(name, args):
                print(f"{name:<12}" + "".join(f"{cell:>{len(h) + 2}}" for cell, h in zip(cells, heads)), flush=True)


if __name__ == "__main__":
    main()

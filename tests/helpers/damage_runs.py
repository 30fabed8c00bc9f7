"""Runs that are small enough to be killed and damaged hundreds of times, and what they computed."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from helpers.forked import Child, Ended, script
from helpers.tiny_texts import made_up_texts

SCRIPTS = ("train_tokenizer", "data_process", "pretrain", "fine_tuning", "quantize", "convert", "eval")
VERDICTS = ("held", "silent", "traceback", "lost")


class Result(NamedTuple):
    """The outcome of one trial: a word of VERDICTS, and a few words about it.

    silent: something is wrong and nothing says so. lost: it was said, and more is lost than was promised.
    """

    verdict: str
    note: str = ""


class Kind(NamedTuple):
    """A promise, how often a full run tries it, and one trial of it."""

    promise: str
    trials: int
    trial: Callable[[World, random.Random], Result]


LOOP = """--train.device cpu --train.compile off --train.log_interval 1 --train.eval_interval 7 --train.eval_batches 2
    --train.save_interval 3 --train.keep 3 --train.max_steps 20 --optim.warmup_steps 3"""
SHAPE = "--model.dim 32 --model.n_layers 2 --model.n_heads 2 --model.multiple_of 8 --model.max_seq_len 200"
PRETRAIN = f"pretrain --data.dir data {SHAPE} {LOOP} --data.seq_len 16 --data.batch_size 8 --train.micro_batch_size 4"
TUNE = f"fine_tuning --init_from model/best {LOOP} --data.seq_len 96 --data.batch_size 4 --data.heldout_share 0.2"
CHAT, PAIRS = f"{TUNE} --data chats.jsonl", f"{TUNE} --data pairs.jsonl"
TRAININGS = {
    "pretrain, Muon": f"{PRETRAIN} --train.dtype fp32",
    "pretrain, sharded": f"{PRETRAIN} --train.dtype fp32 --train.save sharded",
    "pretrain, AdamW, bf16": f"{PRETRAIN} --train.dtype bf16 --optim.optimizer adamw"
    " --train.gradient_checkpointing True",
    "pretrain, bf16": f"{PRETRAIN} --train.dtype bf16 --data.isolate_documents True",
    "fine-tuning": f"{CHAT} --train.dtype fp32",
    "fine-tuning, NEFTune": f"{CHAT} --train.dtype bf16 --neftune_alpha 5 --optim.optimizer adamw",
    "fine-tuning, two tasks, CoBa": f"{TUNE} --data chats.jsonl,more.jsonl --data.loss coba --train.dtype fp32",
    "LoRA": f"{CHAT} --lora.method lora --lora.dropout 0.2 --train.dtype fp32",
    "DoRA": f"{CHAT} --lora.method dora --optim.lora_lr_ratio 4 --train.dtype fp32",
    "PiSSA": f"{CHAT} --lora.method pissa --train.dtype fp32",
    "LoRA on 8 bits": f"{CHAT} --lora.method rslora --lora.base int8 --lora.dropout 0.1 --train.dtype fp32",
    "DPO": f"{PAIRS} --objective dpo --data.packing none --train.dtype fp32",
    "DPO, LoRA": f"{PAIRS} --objective dpo --lora.method lora --lora.dropout 0.2 --train.dtype fp32",
    "ORPO": f"{PAIRS} --objective orpo --train.micro_batch_size 1 --train.dtype fp32",
}


@dataclass
class World:
    """A folder with texts, a tokenizer, bins, conversations and a model, and the undisturbed runs in it."""

    folder: Path
    undisturbed: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    def fresh(self, name: str = "trial") -> Path:
        """Return an empty folder for one trial; the one before it is removed."""
        shutil.rmtree(self.folder / f"{name}{self.number}", ignore_errors=True)
        self.number += 1
        path = self.folder / f"{name}{self.number}"
        path.mkdir()
        return path

    def start(self, command: str, **options: Any) -> Child:
        """Start a script in the folder."""
        return script(command, self.folder, self.folder / "said.txt", **options)

    def run(self, command: str, **options: Any) -> Ended:
        """Run a script to its end."""
        return self.start(command, **options).finish()

    def need(self, command: str) -> Ended:
        """Run a script that has to succeed."""
        ended = self.run(command)
        if ended.status:
            raise SystemExit(f"{command}\nfailed without a disturbance:\n{ended.said}")
        return ended

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returned at the first call of this name."""
        if name not in self.undisturbed:
            self.undisturbed[name] = make()
        return self.undisturbed[name]

    def training(self, name: str) -> tuple[dict[str, Any], float]:
        """Return what the undisturbed run of TRAININGS computed, and its seconds; it lies in `whole NAME`."""

        def make() -> tuple[dict[str, Any], float]:
            out = self.folder / f"whole_{list(TRAININGS).index(name)}"
            ended = self.need(f"{TRAININGS[name]} --out {out.name}")
            return computed(out), ended.seconds

        return self.once(name, make)

    def whole(self, name: str) -> Path:
        """Return the folder of the undisturbed run of TRAININGS."""
        self.training(name)
        return self.folder / f"whole_{list(TRAININGS).index(name)}"


def load_libraries() -> None:
    """Import all scripts, so that forked processes need not; leave out what takes half a second in every run."""
    for name in (*SCRIPTS, "torch._dynamo"):  # the latter is what an optimizer imports at its first step
        importlib.import_module(name)
    from training import log, trainer

    trainer.peak_flops = lambda *_: (1e12, "not measured")
    log.draw_losses = lambda *_: None


def build(folder: Path) -> World:
    """Make the folder: texts.jsonl, data/ with the tokenizer, chats, pairs, and a model pretrained for some steps."""
    world = World(folder)
    lines(folder / "texts.jsonl", [{"text": text} for text in made_up_texts(150)])
    words = ["the", "moon", "above", "river", "1984", "月"]
    lines(folder / "chats.jsonl", [{"question": f"{a}?", "answer": f"{a} {b}"} for a in words for b in words])
    lines(folder / "more.jsonl", [{"question": f"{b} {a}", "answer": f"{a}."} for a in words for b in words])
    pairs = [{"prompt": f"{a} {b}?", "chosen": f"{a} {b}", "rejected": f"{b} no"} for a in words for b in words]
    lines(folder / "pairs.jsonl", pairs)
    lines(folder / "questions.jsonl", [{"prompt": f"{a} {b}"} for a in words for b in words])
    world.need("train_tokenizer --input texts.jsonl --out data/tokenizer --vocab_size 700")
    world.need(
        "data_process --input texts.jsonl --tokenizer data/tokenizer --out data --held_out 0.1 --processes 1"
        " --tokens_per_file 4000"
    )
    world.need(f"{PRETRAIN} --out model --train.dtype fp32")
    return world


def lines(path: Path, records: list[dict]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf8")


def logged(out: Path) -> int:
    """Return the last step in the log of a run."""
    from training.log import read_metrics

    return max((row["step"] for row in read_metrics(out / "metrics.jsonl")), default=0)


def computed(run: Path) -> dict[str, Any]:
    """Return all that a training run computed: the rows of its log without the clock, its result, its weights."""
    from cli.record import file_sha256
    from training.log import read_metrics

    rows = [row for row in read_metrics(run / "metrics.jsonl") if "mfu" not in row]
    result = json.loads((run / "result.json").read_text(encoding="utf8"))
    weights = {
        f"{link}/{path.name}": file_sha256(path)
        for link in ("last", "best")
        for pattern in ("*.safetensors", "sharded/*")
        for path in sorted((run / link).glob(pattern))
    }
    return {"rows": rows, "result": {name: result[name] for name in result if name != "model"}, "weights": weights}


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return what of two `computed` differs, in words; "" where all is equal."""
    if one == other:
        return ""
    parts = [name for name in one if one[name] != other.get(name)]
    if "rows" in parts:
        ours, theirs = one["rows"], other["rows"]
        first = next((a for a, b in zip(ours, theirs) if a != b), f"{len(ours)} rows, {len(theirs)}")
        return f"{', '.join(parts)} differ: {first}"[:300]
    return f"{', '.join(parts)} differ"


def tree(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files below a folder by path, without its name in them, and without the files that
    record how it was made."""
    skipped = ("config.yaml", "run.json")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in skipped)
    return {path.relative_to(folder).as_posix(): path.read_bytes().replace(bytes(folder), b"") for path in files}

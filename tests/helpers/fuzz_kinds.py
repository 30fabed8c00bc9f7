"""What `tests.fuzz` mutates: the flags of the scripts, the presets in configs/, the JSON files of model directories."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml

from cli import args as cli_args
from cli.schema import Flag, flags_of, mentions
from helpers.fuzz_values import WORDS, changed, damaged, with_depth

ROOT = Path(__file__).parents[2]
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
JSON_FILES += ("tokenizer.json", "adapter_config.json", "added_tokens.json")
MODEL = ["--model", "chat"]
BASE_WORDS = {  # flags without which a script has nothing to do
    "train_tokenizer": ["--input", "texts.txt"],
    "data_process": ["--input", "texts.txt", "--tokenizer", "chat"],
    "pretrain": ["--data.dir", "data", "--out", "made"],
    "fine_tuning": ["--init_from", "chat", "--data", "chats.jsonl", "--out", "made"],
    "eval": [*MODEL, "--prompt", "hi", "--max_new_tokens", "2", "--device", "cpu"],
    "quantize": [*MODEL, "--out", "made", "--method", "rtn", "--group_size", "-1", "--format", "compressed-tensors"],
    "convert merge": [*MODEL, "--adapter", "adapter", "--out", "made"],
    "convert tokens": [*MODEL, "--add_tokens", "river", "--out", "made"],
    "serve": MODEL,
}
NUMBERS = ("-1", "0", "1", "2", "3", "7", "64", "1000", "100000", str(2**31), str(2**40), str(2**63), str(2**70))
LARGEST = 10**7  # parameters of a model that a trial builds


class Trial(NamedTuple):
    """One mutation: what it is in words, and the call that is to be accepted or refused in one sentence."""

    words: str
    call: Callable[[], Any]


# ---- flags


def classes(script: str) -> type:
    """Return the dataclass of the flags of a script, or of a command of convert.py."""
    name, _, command = script.partition(" ")
    module = importlib.import_module(name)
    return module.COMMANDS[command][1] if command else module.Args


def flags(script: str, n: int) -> Callable[[Path, random.Random], Trial]:
    """Return the trial of `n` odd flags of a script."""

    def make(world: Path, rng: random.Random) -> Trial:
        cls = classes(script)
        words = list(BASE_WORDS[script])
        for flag in rng.sample(list(flags_of(cls)), n):
            values = odd_values(flag, rng)
            words += [f"--{flag.name}={values[0]}"] if rng.random() < 0.2 and values else [f"--{flag.name}", *values]
        shutil.rmtree(world / "made", ignore_errors=True)
        shown = " ".join(word[:40] + "..." * (len(word) > 40) for word in words[len(BASE_WORDS[script]) :])
        return Trial(repr(shown), lambda: use(script, cli_args.parse(cls, script.partition(" ")[0], words)))

    return make


def odd_values(flag: Flag, rng: random.Random) -> list[str]:
    """Return words for a flag: an odd one, none, several, or one of its own choices, or a number of its type."""
    numbers = NUMBERS if mentions(flag.hint, int) else ("0.5", "1e-300", "1e308", "nan", "inf", *NUMBERS)
    fitting = [str(each) for each in literals(flag.hint)] or ["yes", "no"] * mentions(flag.hint, bool)
    fitting += numbers if mentions(flag.hint, int) or mentions(flag.hint, float) else ()
    if fitting and rng.random() < 0.7:
        return rng.choices(fitting, k=2 if mentions(flag.hint, tuple) else 1)
    return rng.choices(WORDS, k=rng.choice([0, 1, 1, 1, 1, 1, 1, 2, 3]))


def literals(hint: Any) -> Iterator[Any]:
    """Yield the choices in a type."""
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    else:
        for part in typing.get_args(hint):
            yield from literals(part)


def use(script: str, args: Any) -> Any:
    """Do what a script does with its flags before the work that takes long; tiny work is done."""
    module = importlib.import_module(script.partition(" ")[0])
    if script.startswith("convert"):
        return module.COMMANDS[script.partition(" ")[2]][0](args)
    if script in ("train_tokenizer", "data_process"):
        return module.check_arguments(args)
    if script == "quantize" or (script == "eval" and args.task == "chat"):
        return module.main(args)
    if script == "eval":
        return module.make_task(args.task, args)
    if script in ("pretrain", "fine_tuning"):
        return until_training(module, args)
    return None


class Ready(Exception):
    """A run has come to its first step."""


def until_training(module: Any, args: Any) -> None:
    """Do all that a training script does before its first step; of a large new model, only count the numbers."""
    if module.__name__ == "pretrain" and args.init_from is None:
        shape = args.model.made(1000, args.data.seq_len)
        module.check_memory("the model", 4 * shape.n_parameters(), "make --model.dim or --model.n_layers smaller")
        if shape.n_parameters() > LARGEST or shape.n_layers > 100:
            return

    def fit(_: Any) -> None:
        raise Ready

    with mock.patch.object(module.Trainer, "fit", fit), contextlib.suppress(Ready):
        module.main(args)


# ---- presets


def preset(world: Path, rng: random.Random) -> Trial:
    """Return the trial of a preset of configs/ with one thing changed."""
    source = rng.choice(sorted((ROOT / "configs").rglob("*.yaml")))
    text = source.read_text(encoding="utf8")
    whole = yaml.load(text, Loader=cli_args.Plain)
    section = rng.choice([name for name in whole if name in BASE_WORDS])
    path = world / "preset.yaml"
    if rng.random() < 0.25:
        data, how = damaged(text.encode(), rng)
    elif rng.random() < 0.15:
        at = rng.choice([line for line in text.splitlines() if ":" in line])
        data, how = text.replace(at, f"{at}\n{at}").encode(), f"twice {at}"
    else:
        new, how = changed({section: whole[section]}, rng)
        data = with_depth(yaml.dump(new, sort_keys=False), rng.choice([10, 400, 3000])).encode()
    path.write_bytes(data)
    cls = classes(section)
    return Trial(f"{source.name}, {section}: {how}", lambda: cli_args.parse(cls, section, ["--config", str(path)]))


# ---- model directories


def directory(name: str) -> Callable[[Path, random.Random], Trial]:
    """Return the trial of the model in a folder with one thing in a JSON file of it changed: it is loaded and asked."""

    def make(world: Path, rng: random.Random) -> Trial:
        copy = world / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(world / name, copy)
        file = copy / rng.choice([each for each in JSON_FILES if (copy / each).is_file()])
        if rng.random() < 0.15:
            data, how = damaged(file.read_bytes(), rng)
            file.write_bytes(data)
        else:
            new, how = changed(json.loads(file.read_text(encoding="utf8")), rng)
            file.write_text(with_depth(json.dumps(new), rng.choice([10, 400, 100_000])), encoding="utf8")
        return Trial(f"{name}/{file.name}: {how}", lambda: ask(copy))

    return make


def ask(folder: Path) -> str:
    """Load the model in a folder as eval.py does, and let it answer with two tokens."""
    from checkpoint.locate import find_model
    from decoding.params import SamplingParams
    from serving.assistant import load_assistant

    assistant = load_assistant(find_model(folder), torch.device("cpu"), torch.float32)
    return "".join(assistant.reply("hi 月", SamplingParams(temperature=0, max_new_tokens=2)))


def build(folder: Path) -> Path:
    """Make the files that trials start from: texts, a model to chat with in several guises, an adapter.

    What takes seconds to import is imported here: it would count as a hang of the trial that comes first.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("bitsandbytes.functional")
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from checkpoint import peft
    from checkpoint.directory import load_model, save_model
    from checkpoint.transformers_model import TransformersModel
    from helpers.tiny_chat_model import save_chat_model
    from helpers.vocabularies import write_byte_level
    from lora.inject import inject
    from lora.spec import LoraSpec
    from model import Transformer
    from model_args import ModelArgs
    from tokenizer import load_tokenizer

    (folder / "texts.txt").write_text("the moon above the river\n\n" * 400)
    (folder / "chats.jsonl").write_text('{"question": "the moon?", "answer": "the river"}\n' * 20)
    (folder / "file").write_text("a file\n")
    (folder / "folder").mkdir()
    save_chat_model(folder / "chat")
    adapted = load_model(folder / "chat")
    inject(adapted.module_tree, LoraSpec(r=2))
    (folder / "adapter").mkdir()
    peft.save(folder / "adapter", adapted.module_tree, base=str(folder / "chat"))
    shutil.copytree(folder / "chat", folder / "json_only")
    (folder / "json_only" / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(write_byte_level(folder / "byte_level"))
    shape = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, max_seq_len=64)
    save_model(folder / "byte_level", Transformer(shape.replace(tie_embeddings=False)), tokenizer)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "hidden_size": 32}
    other = GPTNeoXForCausalLM(GPTNeoXConfig(**small, vocab_size=tokenizer.vocab_size, max_position_embeddings=64))
    save_model(folder / "gpt_neox", TransformersModel(other), tokenizer)
    words = ["--input", "texts.txt", "--tokenizer", "chat", "--out", "data", "--min_chars", "1", "--deduplicate", "no"]
    data_process = importlib.import_module("data_process")
    data_process.main(cli_args.parse(data_process.Args, "data_process", [*words, "--processes", "1"]))
    words = ["--model", "chat", "--out", "quantized", *BASE_WORDS["quantize"][4:]]
    quantize = importlib.import_module("quantize")
    quantize.main(cli_args.parse(quantize.Args, "quantize", words))
    return folder


def kinds() -> dict[str, Callable[[Path, random.Random], Trial]]:
    """Return what makes a trial, by kind."""
    found: dict[str, Callable[[Path, random.Random], Trial]] = {}
    scripts = [name for name in BASE_WORDS if name != "serve" or importlib.util.find_spec("uvicorn")]
    for script in scripts:
        found |= {f"flags: {script}": flags(script, 1), f"pairs of flags: {script}": flags(script, 2)}
    found["presets"] = preset
    for name in ("chat", "json_only", "byte_level", "quantized", "gpt_neox", "adapter"):
        found[f"directories: {name}"] = directory(name)
    return found

"""What a model directory and an adapter directory are, and where models, bases and tokenizers lie.

A model directory is one of Hugging Face's: `config.json`, `model.safetensors` (with an index, several files), the
tokenizer's files and `generation_config.json`. An adapter directory is one of PEFT's: `adapter_config.json`,
`adapter_model.safetensors`, and the tokenizer's files where they differ from those of the base.

This file does not load torch: scripts look for models before they load it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint.adapter_config import CONFIG as ADAPTER_CONFIG
from checkpoint.adapter_config import read_adapter_config
from cli.progress import say
from files import read_json_object
from tokenizer import Tokenizer, load_tokenizer

DEFAULT_MODEL = Path("out/tiny/sft/best")
CONFIG = "config.json"

# ---- what a directory holds


def is_model(directory: Path) -> bool:
    """Whether a directory holds a model or an adapter."""
    return (directory / CONFIG).is_file() or is_adapter(directory)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (Path(directory) / ADAPTER_CONFIG).is_file()


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer of its own."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_config(directory: Path) -> dict[str, Any]:
    """Return the contents of a model directory's `config.json`.

    Raises FileNotFoundError for a directory without it, an adapter's among them, and ValueError where it is damaged.
    """
    path = Path(directory) / CONFIG
    if not path.is_file() and is_adapter(directory):
        raise FileNotFoundError(
            f"{directory} holds an adapter, not a model: put it into its model with "
            f"python convert.py merge --model DIR --adapter {directory} --out DIR"
        )
    if not path.is_file():
        what = "is a file, not a model directory" if Path(directory).is_file() else "is no model directory"
        raise FileNotFoundError(f"{directory} {what}: expected a Hugging Face directory with a {CONFIG}")
    config = read_json_object(path)
    if not isinstance(config.get("model_type", ""), str):
        raise ValueError(f"{path}: model_type should be a name, found {config['model_type']!r}")
    return config


# ---- where to look


def model_in(path: Path) -> Path:
    """Return the first of `path`, and `best` and `last` in it, that is a model or adapter; `path` where none is."""
    return next((each for each in (path, path / "best", path / "last") if is_model(each)), path)


def find_model(path: Path, advice: str = "run `bash run.sh` to train one, or give --model DIR") -> Path:
    """Return the directory of the model or adapter at `path`: `path` itself, or `best` or `last` in it.

    If `path` is the default and missing, return the newest below out/. Raises FileNotFoundError, whose message ends in
    `advice`, where there is none.
    """
    if is_model(directory := model_in(path)):
        return directory
    if path.name == "best" and is_model(last := path.with_name("last")):
        say(f"there is no {path}, since its run was not evaluated; using {last}")
        return last
    if path != DEFAULT_MODEL:
        what = f"is no model directory (it has no {CONFIG})" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; {advice}")
    # A directory whose name begins with a dot is still being written.
    configs = (p for name in (CONFIG, ADAPTER_CONFIG) for p in Path("out").rglob(name))
    complete = [p for p in configs if not any(part.startswith(".") for part in p.parts)]
    if not complete:
        raise FileNotFoundError(f"there is no model at {path} and none below out/; {advice}")
    newest = max(complete, key=lambda p: p.stat().st_mtime).parent
    say(f"there is no model at {path}; using the newest, {newest}")
    return newest


def find_base(adapter: Path, base: Path | None = None) -> Path:
    """Return the directory of the model that an adapter belongs to: `base` if there is one, else the one that its
    config names. Raises FileNotFoundError where that is not here."""
    if base is not None:
        return find_model(base)
    name = read_adapter_config(adapter).get("base_model_name_or_path")
    if not name or not (Path(name) / CONFIG).is_file():
        what = f"of {name}, which is no model directory here" if name else "that does not name its model"
        raise FileNotFoundError(f"{adapter} holds an adapter {what}; say where that model lies with --base DIR")
    return Path(name)


def read_from(directory: Path, base: Path | None = None) -> list[Path]:
    """Return the directories that a model is read from: `directory`, and that of the base where it holds an adapter."""
    return [directory, find_base(directory, base)] if is_adapter(directory) else [directory]


def find_tokenizer(*directories: Path) -> tuple[Tokenizer | None, list[int] | None]:
    """Return the tokenizer of the first of `directories` that has one, and the ids that end an answer (None: not
    stated); (None, None) where no directory has one."""
    for directory in directories:
        if has_tokenizer(directory):
            return load_tokenizer(directory), read_stop_ids(directory)
    return None, None


def read_stop_ids(directory: Path) -> list[int] | None:
    """Return `eos_token_id` of generation_config.json, or else of config.json, as a list; None if neither states it.

    Raises ValueError where the file is damaged.
    """
    path = next((directory / n for n in ("generation_config.json", "config.json") if (directory / n).is_file()), None)
    if path is None:
        return None
    stop = read_json_object(path).get("eos_token_id")
    stop = [stop] if isinstance(stop, int) else stop
    if stop is not None and not (isinstance(stop, list) and all(type(i) is int for i in stop)):
        raise ValueError(f"{path}: eos_token_id should be an id or a list of ids, found {stop!r}")
    return stop

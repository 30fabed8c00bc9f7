"""Where models, the bases of adapters and tokenizers lie."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoint.adapter_config import CONFIG, read_adapter_config
from cli.progress import say
from tokenizer import Tokenizer, load_tokenizer


def find_tokenizer(*directories: Path) -> tuple[Tokenizer | None, list[int] | None]:
    """The tokenizer of the first directory that has one (the adapter's, if its vocabulary grew), and the ids that end
    an answer."""
    for directory in directories:
        if has_tokenizer(directory):
            path = directory / "generation_config.json"
            stop = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
            return load_tokenizer(directory), [stop] if isinstance(stop, int) else stop
    return None, None


DEFAULT_MODEL = Path("out/tiny/sft/best")


def find_model(path: Path, advice: str = "run `bash run.sh` to train one, or give --model DIR") -> Path:
    """`path`, or the best in it; if `path` is the default and missing, the newest model directory below out/. A
    directory that holds an adapter counts, too. `advice` is what the FileNotFoundError ends in."""
    for directory in (path, path / "best", path / "last"):
        if is_model(directory):
            return directory
    last = path.with_name("last")
    if path.name == "best" and is_model(last):
        say(f"there is no {path}, since its run was not evaluated; using {last}")
        return last
    if path != DEFAULT_MODEL:
        what = "is no model directory (it has no config.json)" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; {advice}")
    # A directory that begins with a dot is one that is still being written.
    kinds = (p for name in ("config.json", CONFIG) for p in Path("out").rglob(name))
    found = [p for p in kinds if not any(part.startswith(".") for part in p.parts)]
    if not found:
        raise FileNotFoundError(f"there is no model at {path} and none below out/; {advice}")
    newest = max(found, key=lambda p: p.stat().st_mtime).parent
    say(f"there is no model at {path}; using the newest, {newest}")
    return newest


def is_model(directory: Path) -> bool:
    """Whether a directory holds a model, or an adapter of one."""
    return (directory / "config.json").is_file() or (directory / CONFIG).is_file()


def find_base(adapter: Path, given: Path | None) -> Path:
    """The directory of the model that an adapter belongs to: `given`, or the one that the adapter names."""
    if given is not None:
        return find_model(given)
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if not named or not (Path(named) / "config.json").is_file():
        what = f"of {named}, which is no model directory here" if named else "that does not name its model"
        raise FileNotFoundError(f"{adapter} holds an adapter {what}; say where that model lies with --base DIR")
    return Path(named)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer of its own."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

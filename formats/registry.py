"""The list of formats, and which of them a file or directory is of."""

from __future__ import annotations

from pathlib import Path

from checkpoint.locate import CONFIG
from formats import dcp, deepspeed, gguf, gguf_lora, huggingface, llama2c, megatron, meta, pth
from formats.base import Format

ALL = (
    huggingface.FORMAT,
    *llama2c.FORMATS,
    gguf.FORMAT,
    meta.FORMAT,
    megatron.FORMAT,
    deepspeed.FORMAT,
    dcp.FORMAT,
    pth.FORMAT,
)
FORMATS: dict[str, Format] = {each.name: each for each in ALL}
ADAPTERS = {"gguf": gguf_lora.FORMAT}  # formats of adapters, which are read from PEFT directories


def detect(path: Path) -> Format:
    """Return the format of a file or directory; raises FileNotFoundError where there is none, and ValueError where it
    is of no format in the list."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a file or directory with a model")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path} is an empty directory: copy the model into it, or name the one that has the model")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path} is an empty file, of 0 bytes: copy or download it again")
    for each in ALL:
        if each.detect(path):
            return each
    if (path / CONFIG).is_file():  # a config.json without weights, whose reader says which files it looked for
        return huggingface.FORMAT
    if llama2c.is_cut(path):  # version 0, which has no magic; its reader says how many bytes are missing
        return FORMATS["llama2c"]
    known = "; ".join(each.title for each in ALL)
    begins = f", which begins with the bytes {path.open('rb').read(8).hex(' ')}" if path.is_file() else ""
    raise ValueError(f"{path}{begins}, is in no format that is read here. These are: {known}")

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
    for each in ALL:
        if each.detect(path):
            return each
    if (path / CONFIG).is_file():  # a config.json without weights, whose reader says which files it looked for
        return huggingface.FORMAT
    known = "; ".join(each.title for each in ALL)
    begins = f", which begins with the bytes {path.open('rb').read(8).hex(' ')}" if path.is_file() else ""
    raise ValueError(f"{path}{begins}, is in no format that is read here. These are: {known}")

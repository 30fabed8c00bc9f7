"""Round trips of small models over every pair of formats, and other programs that read the files.

python -m tests.conversions            prints the tables
python -m tests.conversions --write    and keeps them in docs/conversion.md

A model goes from a Hugging Face directory to the first format, back to a directory, to the second format and back; the
error is that of its logits, the largest of all tokens and kinds of models, divided by the largest logit.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

TESTS = Path(__file__).parent
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # as pytest has it

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.small_checkpoints import TOKENS, saved  # noqa: E402
from helpers.tiny_chat_model import chat_tokenizer  # noqa: E402

import convert  # noqa: E402
from checkpoint.directory import load_model  # noqa: E402
from convert import Export, Import  # noqa: E402

DOCUMENT = TESTS.parent / "docs" / "conversion.md"
MARKS = ("<!-- formats -->\n", "<!-- /formats -->\n")  # the tables stand between them
MODELS: dict[str, dict[str, Any]] = {
    "tied, MHA": {},
    "untied, GQA": {"tie_embeddings": False, "n_kv_heads": 2},
    "biased (Qwen2)": {"attention_bias": True, "n_kv_heads": 2},
    "normed (Qwen3)": {"qk_norm": True, "n_kv_heads": 2},
    "stretched (Llama 3.1)": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
        "max_seq_len": 131072,
        "n_kv_heads": 2,
    },
}
FORMATS: dict[str, dict[str, Any]] = {  # column -> flags of export
    "huggingface": {"format": "huggingface"},
    "huggingface, shards": {"format": "huggingface", "shard_size": 2e-5},
    "meta": {"format": "meta"},
    "meta, 2 ranks": {"format": "meta", "shards": 2},
    "megatron, 2 x 2": {"format": "megatron", "tensor_parallel": 2, "pipeline_parallel": 2},
    "gguf F32": {"format": "gguf"},
    "gguf F16": {"format": "gguf", "dtype": "fp16"},
    "gguf BF16": {"format": "gguf", "dtype": "bf16"},
    "gguf Q8_0": {"format": "gguf", "dtype": "q8_0"},
    "gguf Q4_0": {"format": "gguf", "dtype": "q4_0"},
    "gguf Q4_K": {"format": "gguf", "dtype": "q4_k"},
    "llama2c": {"format": "llama2c"},
    "llama2c_v1": {"format": "llama2c_v1"},
    "llama2c_q8": {"format": "llama2c_q8"},
}


class Small(NamedTuple):
    """A model on disk and its logits."""

    folder: Path
    logits: torch.Tensor


def round_trip(source: Path, name: str, out: Path) -> Path:
    """Write a directory in a format and read it again; returns the new directory. ValueError where it is refused."""
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with silent[0], silent[1], mock.patch("files.sync"):  # these files need not outlive a power cut
        convert.export(Export(model=source, out=out / "there", **FORMATS[name]))
        convert.import_(Import(source=out / "there", out=out / "back", dtype="fp32"))
    return out / "back"


def error_of(small: Small, folder: Path) -> float:
    """Return the largest difference of the logits, divided by the largest logit."""
    with torch.no_grad():
        return float((load_model(folder)(TOKENS) - small.logits).abs().max() / small.logits.abs().max())


def make(folder: Path, wide: bool = False, **more: int) -> dict[str, Small]:
    """Write the models; wide: with rows that blocks of 256 divide; more: sizes."""
    widths = {"dim": 256, "hidden_dim": 256} if wide else {"dim": 32, "hidden_dim": 64}
    small = {}
    for name, changes in MODELS.items():
        model = saved(folder / name, **widths, n_layers=2, **more, **changes)
        with torch.no_grad():
            small[name] = Small(folder / name, model(TOKENS))
    return small


def pairs(names: list[str], folder: Path) -> Iterator[tuple[str, str, str, float | str]]:
    """Yield first format, second format, kind of model and the error; or why the first or second refuses it."""
    for kind, small in make(folder / "models", wide=any("Q4" in name for name in names)).items():
        for first in names:
            work = folder / f"{kind} {first}"
            work.mkdir()
            try:
                middle = round_trip(small.folder, first, work)
            except ValueError as error:
                yield from ((first, second, kind, str(error)) for second in names)
                continue
            for second in names:
                (work / second).mkdir()
                try:
                    yield first, second, kind, error_of(small, round_trip(middle, second, work / second))
                except ValueError as error:
                    yield first, second, kind, str(error)


def tables(names: list[str], folder: Path) -> list[str]:
    """Return the lines of two tables: largest errors of pairs, and which models a format holds."""
    errors: dict[tuple[str, str], list[float]] = {(a, b): [] for a in names for b in names}
    held: dict[tuple[str, str], float] = {}
    for first, second, kind, found in pairs(names, folder):
        if isinstance(found, float):
            errors[first, second].append(found)
            if first == second:
                held[kind, first] = found
    rows = [["", *names]]
    rows += [[first, *(shown(max(errors[first, second], default=None)) for second in names)] for first in names]
    kinds = [["model", *names]]
    kinds += [[kind, *(shown(held.get((kind, name))) for name in names)] for kind in MODELS]
    return [
        "Largest error of the logits after the format of the row and then that of the column:",
        "",
        *table(rows),
        "",
        "The same format twice, by model; a dash: the format does not hold it, and it is refused:",
        "",
        *table(kinds),
    ]


def shown(error: float | None) -> str:
    """Return an error as the tables have it."""
    return "-" if error is None else "0" if error == 0 else f"{error:.0e}"


def table(rows: list[list[str]]) -> list[str]:
    """Return rows as the lines of a Markdown table."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


def readers(folder: Path) -> list[str]:
    """Return the lines of a table: programs of others that read our files, and their largest error.

    It is measured against the logits of what `convert.py import` makes of the same file, so that rounding is no error.
    """
    rows = [["reader", "file", *MODELS]]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = chat_tokenizer(folder)
    small = make(folder / "models", wide=True, vocab_size=tokenizer.vocab_size)
    for each in small.values():
        tokenizer.save(each.folder)
    names = ["huggingface, shards", *(name for name in FORMATS if name.startswith("gguf"))]
    errors: dict[tuple[str, str], list[float | None]] = {(reader, name): [] for name in names for reader in READERS}
    for kind, model in small.items():
        for name in names:
            work = folder / f"{kind} {name}"
            work.mkdir()
            back = round_trip(model.folder, name, work)
            for reader, (file, logits) in READERS.items():
                read = name.startswith(file) and kind not in UNREAD.get((reader, name.split()[0]), ())
                errors[reader, name].append(reader_error(logits, work / "there", back) if read else None)
    for (reader, name), found in errors.items():
        if any(error is not None for error in found):
            rows.append([reader, name, *map(shown, found)])
    return ["Programs of others that read what was written, by model; a dash: it is not read:", "", *table(rows)]


def reader_error(logits: Callable[[Path], torch.Tensor], file: Path, back: Path) -> float | None:
    """Return the largest difference of a program's logits from ours; None where the program is not installed."""
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        try:
            theirs = logits(file)
        except (ImportError, pytest.skip.Exception):
            return None
        ours = load_model(back)(TOKENS)
    if theirs.dim() == 1:  # logarithms of probabilities behind the first row
        ours, theirs = ours[0, -1].log_softmax(-1), theirs.float()
    return float((theirs - ours).abs().max() / ours.abs().max())


def in_transformers(path: Path) -> torch.Tensor:
    """Return the logits of transformers, of a directory or by its own reader of GGUF."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    return AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])(TOKENS).logits


def in_mlx(path: Path) -> torch.Tensor:
    """Return the logits of mlx-lm, of a directory."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model as load

    return torch.from_numpy(np.array(load(path)[0](mx.array(TOKENS.numpy())).astype(mx.float32)))


def in_llama_cpp(path: Path) -> torch.Tensor:
    """Return the logarithms of the probabilities behind the first row, of llama.cpp."""
    from helpers.llama_cpp import LlamaCpp

    named = path.with_suffix(".gguf")  # llama.cpp wants the ending
    named.symlink_to(path.name)
    return LlamaCpp(named).log_probs(TOKENS[0].tolist(), 330)


READERS: dict[str, tuple[str, Callable[[Path], torch.Tensor]]] = {  # name -> which files, and the logits of one
    "transformers": ("", in_transformers),
    "MLX": ("huggingface", in_mlx),
    "llama.cpp": ("gguf", in_llama_cpp),
}
UNREAD = {("transformers", "gguf"): ("normed (Qwen3)", "stretched (Llama 3.1)")}


def main(arguments: list[str]) -> int:
    """Print the tables; with --write keep them."""
    warnings.filterwarnings("ignore")
    if unknown := [each for each in arguments if each != "--write"]:
        print(f"error: {unknown[0]} is not known; there is --write, which keeps the tables", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        lines = [*tables(list(FORMATS), Path(folder, "pairs")), "", *readers(Path(folder, "readers"))]
    print(*lines, sep="\n")
    if "--write" in arguments:
        text = DOCUMENT.read_text(encoding="utf8")
        before, rest = text.split(MARKS[0])
        body = "".join(f"{line}\n" for line in lines)
        DOCUMENT.write_text(f"{before}{MARKS[0]}{body}{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

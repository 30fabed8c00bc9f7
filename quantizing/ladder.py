"""The ladder: one model, quantized by every method and width, measured in one table.

Each row is a file in the folder `rows` of --out as soon as it is done; `description.json` there says what they depend
on, so that rows of other texts or another model are never mixed with them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoint import peft
from checkpoint.directory import load_model, save_model
from checkpoint.locate import find_model, find_tokenizer, is_adapter, read_config, read_from
from checkpoint.safetensors_files import weight_files
from checkpoint.transformers_model import TransformersModel
from cli.progress import Progress, say
from cli.record import file_sha256, to_plain
from evaluation.text_rows import draw_rows
from files import check_place, read_json, write_json
from model import Transformer
from quant.kinds import KINDS, METHODS
from quant.replace import base_layers, refuse_quantized
from quant.trained import kind_of_bits
from quantizing.args import Args
from quantizing.job import quantize_in_place, write
from quantizing.ladder_args import STEPS, LadderArgs, Step
from quantizing.measure import compare, figures, resident_bytes, sizes, speeds

HELD_OUT_SEED = 1234  # of the choice of held-out rows: the same for every ladder
DESCRIPTION = "description.json"


def files_of_weights(directory: Path) -> list[Path]:
    """Return the files with the weights of a model or of an adapter."""
    return [peft.weights_file(directory)] if is_adapter(directory) else sorted(weight_files(directory))


class Ladder:
    """What all rows of the table share: the full model, its directory, the held-out rows (n, T)."""

    def __init__(self, args: LadderArgs) -> None:
        """Load the model and the texts. Raises ValueError for what cannot be measured, and for rows in --out that
        depend on other settings."""
        self.args = args = args.chosen()
        check_place(args.out)
        self.directory = find_model(args.model, "give --model a model directory")
        self.full = checked(load_model(self.directory, "cpu"), self.directory).float().eval()
        self.tokenizer, self.stop_ids = find_tokenizer(*read_from(self.directory))
        if self.tokenizer is None:
            raise FileNotFoundError(f"--model {self.directory} has no tokenizer to read text with")
        self.check_beside()
        self.length = min(args.seq_len or 512, self.full.args.max_seq_len)
        self.rows_of_text = draw_rows(args.heldout, self.tokenizer, self.length, args.heldout_tokens, HELD_OUT_SEED)
        token_bytes = torch.from_numpy(self.tokenizer.token_bytes())
        self.bytes_per_token = float(token_bytes[self.rows_of_text[:, 1:]].double().mean())
        self.folder = args.out / "rows"
        self.check_out()

    def check_beside(self) -> None:
        """Raise an error for a directory of --beside that cannot be compared, before any row is measured."""
        for path in self.args.beside:
            if not is_adapter(path):
                self.check_vocabulary(path, read_config(path).get("vocab_size"))

    def check_vocabulary(self, path: Path, size: int | None) -> None:
        """Raise ValueError where a model of --beside has another vocabulary than the full model."""
        if size != self.full.args.vocab_size:
            raise ValueError(f"--beside {path} does not have the vocabulary of {self.directory}: it cannot be compared")

    def check_out(self) -> None:
        """Make the folder of rows; raises ValueError where it belongs to other settings."""
        if (self.args.out / "config.json").exists():
            raise ValueError(f"--out {self.args.out} is a model; choose a directory for the table")
        same = ("group_size", "draws", "calib_tokens", "heldout_tokens", "seq_len")
        texts = [draw_rows(self.args.calib, self.tokenizer, self.length, self.args.calib_tokens, 0), self.rows_of_text]
        depends = {name: getattr(self.args, name) for name in same} | {
            "model": [file_sha256(path) for each in read_from(self.directory) for path in files_of_weights(each)],
            "texts": [hashlib.sha256(rows.numpy().tobytes()).hexdigest() for rows in texts],
        }
        before = read_json(self.folder / DESCRIPTION)
        if before is not None and before != depends:
            differs = [name for name in depends if before.get(name) != depends[name]]
            raise ValueError(
                f"--out {self.args.out} has rows of a ladder that differs in {', '.join(differs)}: choose another "
                "directory, or remove it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / DESCRIPTION, depends)

    def description(self) -> str:
        """Return what the table was measured on, in a line."""
        args = self.args
        return (
            f"{self.full.n_parameters():,} parameters; groups of {args.group_size}; {self.rows_of_text.numel():,} "
            f"held-out tokens in rows of {self.length}; {args.calib_tokens:,} calibration tokens, {args.draws} draws; "
            f"{torch.get_num_threads()} threads"
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the table in order, measured now or kept from an earlier run."""
        todo = [("float32", self.dense), ("bfloat16", self.dense), ("int8_cache", self.dense)]
        todo += [(path.name, lambda name, path=path: self.other(name, path)) for path in self.args.beside]
        for bits in self.args.bits:
            names = [name for name in self.args.methods if bits in STEPS[name].bits]
            todo += [(f"{name}_{bits}", self.quantized) for name in names]
        kept = {name: read_json(self.folder / f"{name}.json") for name, _ in todo}
        if done := sum(row is not None for row in kept.values()):
            say(f"{self.folder} has {done} of {len(todo)} rows already: going on behind them")
        with Progress("ladder", "rows", len(todo), done) as bar:
            for name, measure in todo:
                row = kept[name] or self.measured(name, measure)
                if row is not None:
                    yield row
                if kept[name] is None:
                    bar.add()

    def measured(self, name: str, measure: Callable[[str], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Measure a row and keep it; None, with a notice, for a method that cannot be used here."""
        row = measure(name)
        if row is not None:
            write_json(self.folder / f"{name}.json", row)
        return row

    def dense(self, name: str) -> dict[str, Any]:
        """Return the row of the full model: in float32, in bfloat16, or with a cache in 8 bits."""
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        model = self.full if dtype == torch.float32 else load_model(self.directory, "cpu", dtype).eval()
        bits, cache = {torch.float32: 32, torch.bfloat16: 16}[dtype], "int8" if name == "int8_cache" else "static"
        with tempfile.TemporaryDirectory() as folder:
            self.write_dense(Path(folder), model)
            return self.row([model], Path(folder), cache) | {"method": name, "bits": bits}

    def write_dense(self, folder: Path, model: Transformer) -> None:
        """Write the full model in its dtype, to be measured as a directory."""
        save_model(folder, model, self.tokenizer, self.stop_ids)

    def other(self, name: str, path: Path) -> dict[str, Any]:
        """Return the row of another model (--beside)."""
        model = load_model(path, "cpu").float().eval()
        self.check_vocabulary(path, model.args.vocab_size if isinstance(model, Transformer) else None)
        bits = next((layer.bits for layer in model.modules() if hasattr(layer, "bits")), 32)
        return self.row([model], path) | {"method": name, "bits": bits}

    def quantized(self, name: str) -> dict[str, Any] | None:
        """Return the row of a method and a width, the mean over draws of the calibration rows."""
        method, _, bits = name.rpartition("_")
        step = STEPS[method]
        kind = KINDS.get(step.settings["method"])
        if kind and kind.package and importlib.util.find_spec(kind.package) is None:
            say(f"{method} is left out: it needs {kind.package}, which is not installed: bash setup.sh --extra bnb")
            return None
        draws, models, seconds = self.args.draws if step.text else 1, [], 0.0
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(draws):
                one = self.settings(step, int(bits), Path(folder) / "model", seed)
                model = load_model(self.directory, "cpu").float().eval()
                began = time.perf_counter()
                report = quantize_in_place(model, self.tokenizer, one)
                seconds += (time.perf_counter() - began) / draws
                models.append(model)
            write(models[-1], self.tokenizer, self.stop_ids, one, report)
            row = self.row(models, one.out)
        text = {"calib_tokens": self.args.calib_tokens, "draws": draws} if step.text else {}
        return row | {"method": method, "bits": int(bits), "seconds": seconds} | text

    def settings(self, step: Step, bits: int, out: Path, seed: int) -> Args:
        """Return the arguments of quantize.py for one draw of a row."""
        own = {"bits": bits, "format": step.format or grouped_format(self.full, self.args.group_size)}
        if "group_size" in METHODS[step.settings["method"]].flags:
            own["group_size"] = self.args.group_size
        if step.text:
            own |= {"calib": self.args.calib, "calib_tokens": self.args.calib_tokens}
            own |= {"seq_len": self.args.seq_len, "seed": seed}
        return Args(out, self.directory, **own | step.settings)

    def row(self, models: list[Transformer], directory: Path, cache: str = "static") -> dict[str, Any]:
        """Return the figures of models, of which the last one lies in `directory`."""
        found = figures(compare(self.full, models, self.rows_of_text, cache), self.bytes_per_token)
        found |= speeds(models[-1], self.full, self.rows_of_text[0], cache) | sizes(directory, self.full)
        if cache == "static":  # the memory of generate() does not show another cache
            found["resident"] = resident_bytes(directory, models[-1].dtype)
        return found

    def write(self, rows: list[dict[str, Any]], table: str) -> None:
        """Write the rows as JSON, and the table as text."""
        settings = {"settings": to_plain(self.args), "description": self.description()}
        write_json(self.args.out / "ladder.json", settings | {"rows": rows})
        (self.args.out / "ladder.md").write_text(table, encoding="utf8")


def checked(model: Any, directory: Path) -> Transformer:
    """Return a model; raises ValueError where it is none that can be quantized."""
    if isinstance(model, TransformersModel):
        raise ValueError(f"--model {directory} is not of the LLaMA family, which is all that is quantized here")
    refuse_quantized(model, "the ladder compares with the full weights")
    if kind := kind_of_bits(model):
        raise ValueError(f"--model {directory} is trained in few bits ({kind}): give a full model, and it as --beside")
    return model


def grouped_format(model: Transformer, group_size: int) -> str:
    """Return a layout that keeps a model's shapes with groups of this size: compressed-tensors needs groups that divide
    every row, GPTQ sides that are multiples of 32."""
    divides = all(group_size == -1 or layer.in_features % group_size == 0 for _, layer in base_layers(model))
    return "compressed-tensors" if divides else "gptq_v2"

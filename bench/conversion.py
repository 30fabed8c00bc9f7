"""Measure the peak memory of conversions of one large model, each in a process of its own (Linux and macOS).

python bench/conversion.py --folder /tmp/conversion
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoint.directory import save_model
from formats.deepspeed import CUT_EACH, STATE
from model import Transformer
from model_args import ModelArgs
from planning.tables import table

SHAPE = ModelArgs(dim=1024, n_layers=36, n_heads=16, hidden_dim=2752, vocab_size=32000, tie_embeddings=False)
EXPORTS = {
    "meta": ["--format", "meta"],
    "meta, 2 ranks": ["--format", "meta", "--shards", "2"],
    "llama2c": ["--format", "llama2c"],
    "megatron, 2 x 1": ["--format", "megatron", "--tensor_parallel", "2"],
}

SHARDED = ("DeepSpeed, 2 ranks", "FSDP")


@dataclass(frozen=True)
class Args:
    """Measure conversions of a model of 521 million parameters in float32, 2.08 GB."""

    folder: Path = Path("out/conversion")
    """directory for the files, which is made and removed; it needs 9 GB"""


def main(args: Args) -> dict[str, float]:
    """Print a line for each conversion as it ends; return the peaks, in bytes."""
    args.folder.mkdir(parents=True)
    model = args.folder / "model"
    # in another process: the peak of a process that is started counts that of the one which starts it
    writer = multiprocessing.get_context("spawn").Process(target=write_sources, args=(model, args.folder))
    writer.start()
    writer.join()
    largest = (model / "model.safetensors").stat().st_size
    print(f"the model is one file of {largest / 1e9:.2f} GB", flush=True)
    peaks: dict[str, float] = {}

    def convert(name: str, out: Path, *words: str | Path) -> None:
        peaks[name] = peak_of("convert.py", *words, "--out", out)
        print(f"{name}: {peaks[name] / 1e9:.2f} GB, {peaks[name] / largest:.2f} of the file", flush=True)

    for name, flags in EXPORTS.items():
        out = args.folder / "there"
        convert(f"to {name}", out, "export", "--model", model, *flags)
        convert(f"from {name}", args.folder / "back", "import", out)
        remove(args.folder, "there*", "back")
    for name in SHARDED:
        convert(f"from {name}", args.folder / "back", "import", args.folder / name, "--like", model)
        remove(args.folder, "back")
    shutil.rmtree(args.folder)
    print(table(("conversion", "peak, GB"), [(name, f"{peak / 1e9:.2f}") for name, peak in peaks.items()]))
    return peaks


@torch.no_grad()
def write_sources(model: Path, folder: Path) -> None:
    """Write a model directory, and the same weights as DeepSpeed and FSDP do."""
    own = Transformer(SHAPE)
    save_model(model, own)
    weights = dict(own.named_parameters())
    dcp.save({"model": weights}, checkpoint_id=folder / SHARDED[1], no_dist=True)
    place = folder / SHARDED[0]
    place.mkdir()
    for rank in range(2):  # stage 3: every rank has a half of every parameter
        names = {"module": {}, "param_shapes": [{name: p.shape for name, p in weights.items()}]}
        torch.save(names, place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = torch.cat([p.flatten().chunk(2)[rank] for p in weights.values()])
        state = {STATE: {CUT_EACH: [flat], "partition_count": 2}}
        torch.save(state, place / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def peak_of(*words: str | Path) -> float:
    """Run a script of this repository; return the most bytes that the process held at once."""
    script, *rest = map(str, words)
    command = [sys.executable, str(Path(__file__).parents[1] / script), *rest]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def remove(folder: Path, *patterns: str) -> None:
    """Remove what matches in a folder."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main(tyro.cli(Args))

"""How long `bash run.sh` takes on this machine, from a few steps of its training.

    python -m planning.whole_run configs/tiny.yaml out/tiny/.seconds     # a line for each stage: its name, its seconds

The steps are done with the model, the rows and the dtype of the preset, not compiled. What else a stage does has the
seconds that it takes on the machine of docs/tiny.md, times how much slower this one runs plain Python.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from cli.args import read_section
from cli.progress import say
from files import write_text
from model_args import ModelArgs
from planning.measure import times_of
from planning.memory import Step
from planning.shapes import from_preset

TASKS = {"pretrain": "pretrain", "sft": "fine_tuning"}  # stage -> its section of a preset
OTHERS = {"tokenizer": 29.0, "data": 12.0, "eval": 95.0}  # seconds of the stages that do not train, of preset tiny
CORPUS = ["rhymed_poems"]  # for which the seconds of the tokenizer and of the data are known
LOOP_SECONDS = 0.028  # of `loop_seconds` on the machine of docs/tiny.md
AROUND = 8.0  # seconds of a training beside its steps and its compilation: loading, evaluations, checkpoints
COMPILED = {"fp32": 0.75, "bf16": 0.57}  # seconds of a compiled step, of those of a step that is not (docs/speed.md)


def stages(preset: Path) -> dict[str, float]:
    """Return the seconds of each stage of a preset, none where the number of steps depends on the data.

    Those of the tokenizer and of the data are known for the presets of poems only.
    """
    sections = {stage: read_section(preset, name) for stage, name in TASKS.items()}
    if not all(section.get("train", {}).get("max_steps") for section in sections.values()):
        return {}
    say("Some steps of the training are measured, to say how long all stages take.")
    slower = loop_seconds() / LOOP_SECONDS
    poems = read_section(preset, "train_tokenizer").get("corpus") == CORPUS
    known = OTHERS if poems else {"eval": OTHERS["eval"]}
    args = from_preset(preset).args
    trainings = {stage: training_seconds(args, section, slower) for stage, section in sections.items()}
    return {name: seconds * slower for name, seconds in known.items()} | trainings


def training_seconds(args: ModelArgs, section: dict[str, Any], slower: float) -> float:
    """Return the seconds of a training of `section`; slower: than the machine of docs/tiny.md, in plain Python."""
    import torch  # takes seconds to load, like what follows

    from hardware import choose_device
    from training.args import TrainArgs
    from training.precision import SECONDS_A_LAYER, can_compile, training_dtype

    device = choose_device("auto")
    dtype = "bf16" if training_dtype(TrainArgs(), device) == torch.bfloat16 else "fp32"
    data, steps = section["data"], section["train"]["max_steps"]
    rows = section["train"].get("micro_batch_size") or data["batch_size"]
    optimizer = section.get("optim", {}).get("optimizer", "muon")
    (times,) = times_of([args], Step(rows, data["seq_len"], dtype, optimizer), seconds=2.0)
    seconds, compiling = times.step(-(-data["batch_size"] // rows)) * steps, 0.0
    if can_compile(device):
        compiling, seconds = SECONDS_A_LAYER * args.n_layers * slower, seconds * COMPILED[dtype]
    return seconds + compiling + AROUND * slower


def loop_seconds() -> float:
    """Return how many seconds a fixed loop over strings and a dictionary takes here; the best of five times."""

    def once() -> float:
        start, counts = time.perf_counter(), {}
        for i in range(200_000):
            key = str(i % 5000)
            counts[key] = counts.get(key, 0) + len(key)
        return time.perf_counter() - start

    return min(once() for _ in range(5))


if __name__ == "__main__":
    found = stages(Path(sys.argv[1]))
    write_text(Path(sys.argv[2]), "".join(f"{name} {round(seconds)}\n" for name, seconds in found.items()))

"""Every backend of several processes against one process: the same losses, rates, norms, targets and weights, in
float64 where the backend has it; one run that goes on from process to processes; and ranks that die or hang."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import finish

from checkpoint.safetensors_files import opened
from cli.flags import check_flags
from optim.args import OptimArgs
from training.args import NEEDS, TrainArgs

SCRIPT = str(Path(__file__).parent / "helpers" / "backend_run.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
FILES = {".metadata", "__0_0.distcp", "__1_0.distcp"}  # of a sharded checkpoint of two ranks
LONG = 600  # seconds; on two idle cores, each start takes less than ten
SIX = {"steps": 6, "count": 44}  # an epoch, whose last step has half of its rows
# name -> fields of helpers.backend_run.Case
CASES = {
    "ragged": SIX | {"wide": True, "data": "ragged", "micro": 1, "train": {"gradient_checkpointing": True}},
    "muon": {"wide": True, "micro": 2, "optimizer": "muon", "shape": {"tie_embeddings": False}, "steps": 4},
    "dora": {"lora": {"method": "dora", "train_embed_norm": True}, "steps": 4},
    "dpo": {"dpo": True, "micro": 2, "lora": {"method": "lora", "base": "int8"}, "steps": 4},
}


def start(folder: Path, environment: dict[str, str], backend: str, cases: dict[str, dict], processes: int = 2):
    """Start the cases one after the other on one backend, or on that which they name."""
    words = [json.dumps({"name": name, "backend": backend} | case) for name, case in cases.items()]
    launch = [] if backend == "single" else [*TORCHRUN, str(processes)]
    command = [sys.executable, *launch, SCRIPT, str(folder), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, environment) -> Path:
    """A folder with the cases on one process, and runs that were stopped after two steps."""
    folder = tmp_path_factory.mktemp("backends")
    wide, narrow = SIX | {"wide": True}, SIX | {"micro": 2}
    more = {
        "whole": wide | {"micro": 1},
        "chain": wide | {"stop": 1},
        "narrow": narrow,
        "stopped": narrow | {"stop": 1},
    }
    status, err = finish(start(folder, environment, "single", CASES | more), LONG)
    assert status == 0, err
    return folder


def difference(folder: Path, one: str, other: str) -> tuple[float, float, float]:
    """The largest relative differences of losses and of norms, and the largest difference of weights; the rates and
    the numbers of targets are equal."""
    ours, theirs = (json.loads((folder / f"{name}.json").read_text()) for name in (one, other))
    assert ours["tied"] == theirs["tied"]
    assert len(ours["steps"]) > 3
    apart = [0.0, 0.0]
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        assert a[1] == b[1] and a[3] == b[3]
        apart = [max(d, abs(a[i] - b[i]) / abs(a[i])) for d, i in zip(apart, (0, 2))]
    apart[0] = max(apart[0], abs(ours["loss"] - theirs["loss"]) / ours["loss"])  # of all held-out data at the end
    return *apart, weights_apart(folder, one, other)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or of its adapter, whole or in parts, in float64."""
    path = next((directory).glob("*.safetensors"), directory / "sharded" / ".metadata")
    with opened(path) as file:
        return {name: file.get_tensor(name).double() for name in sorted(file.keys())}


def weights_apart(folder: Path, one: str, other: str) -> float:
    ours, theirs = (tensors(folder / name / "last") for name in (one, other))
    assert list(ours) == list(theirs)
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def run(folder: Path, environment: dict[str, str], backend: str, cases: dict[str, dict]) -> str:
    """Run the cases to their ends; returns stderr."""
    status, err = finish(start(folder, environment, backend, cases), LONG)
    assert status == 0, err
    return err


def test_fsdp_equals_one_process(alone, environment):
    ours = {f"fsdp {name}": case for name, case in CASES.items()}
    # what FSDP2 saves in parts, one process goes on from; and so does FSDP2 itself, with the same bits
    chain, parts = SIX | {"wide": True, "micro": 1}, {"train": {"save": "sharded"}}
    own = {"fsdp chain": chain, 1: chain | parts | {"name": "parts", "stop": 1}, 2: chain | parts | {"name": "parts"}}
    err = run(alone, environment, "fsdp", ours | own | {"chain": chain | {"stop": 3} | parts})
    assert "going on from step 2" in err and "stopped by SIGTERM after step 4" in err  # of one process, and its own
    assert {path.name for path in (alone / "chain" / "last" / "sharded").iterdir()} == FILES
    assert weights_apart(alone, "fsdp chain", "parts") == 0
    for name, case in CASES.items():
        # float64 keeps 16 digits; float32 has 7, and sums in another order
        small, weights = (1e-13, 1e-14) if case.get("wide") else (1e-6, 1e-6)
        loss, norm, apart = difference(alone, name, f"fsdp {name}")
        assert loss < small and norm < 10 * small and apart < weights, name
    # one process, then two, then one: the moments go with the parameters, and no row is left out or used twice
    assert "going on from step 4" in run(alone, environment, "single", {"chain": chain})
    assert weights_apart(alone, "whole", "chain") < 1e-14


@pytest.mark.parametrize("stage, names", [("2", ["dpo"]), ("3", ["ragged"])])
def test_zero_equals_one_process(stage, names, alone, environment):
    pytest.importorskip("deepspeed")
    zero = {"train": {"zero_stage": stage}}
    narrow = {name: CASES[name] | zero | {"wide": False} for name in names}  # DeepSpeed knows no float64
    ours = {f"zero{stage} {name}": case for name, case in narrow.items()}
    goes_on = f"chain {stage}"
    shutil.copytree(alone / "stopped", alone / goes_on, symlinks=True)
    parts = {"name": goes_on, "train": zero["train"] | {"save": "sharded"}}  # twice, the second time from its own
    twice = {1: SIX | parts | {"micro": 1, "stop": 3}, 2: SIX | parts | {"micro": 1}}
    err = run(alone, environment, "deepspeed", ours | twice)
    assert "going on from step 2" in err and "going on from step 4" in err
    assert {path.name for path in (alone / goes_on / "last" / "sharded").iterdir()} == FILES
    for name in names:
        loss, norm, apart = difference(alone, name, f"zero{stage} {name}")
        assert loss < 1e-6 and norm < 1e-5 and apart < 1e-6, name  # float32, with another order of sums
    assert weights_apart(alone, "narrow", goes_on) < 1e-6


def test_a_rank_that_dies_or_hangs_ends_the_run_with_its_name(tmp_path, environment):
    both = {"dies": {"die": 2}, "hangs": {"hang": 2, "train": {"rank_timeout": 3}}}
    for name in both:  # they run at the same time, and each writes its data
        (tmp_path / name).mkdir()
    runs = [start(tmp_path / name, environment, "fsdp", {name: case}) for name, case in both.items()]
    (died, why), (hung, what) = (finish(each, LONG) for each in runs)
    assert died and re.search(r"error: rank 1 \(process \d+ on .*\) has ended; the same command goes on", why), why
    assert hung and re.search(r"error: rank 1 \(process \d+ on .*\) hangs: the others have waited 3 s", what), what


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"dtype": "fp16"}, r"--train.backend fsdp needs --train.dtype auto, fp32 or bf16, found fp16"),
        (
            {"backend": "single", "rank_timeout": 5.0},
            r"--train.rank_timeout 5.0 needs --train.backend ddp, fsdp or deepspeed",
        ),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    @dataclasses.dataclass
    class Args:
        train: TrainArgs = dataclasses.field(default_factory=TrainArgs)
        optim: OptimArgs = dataclasses.field(default_factory=OptimArgs)

    with pytest.raises(ValueError, match=message):
        check_flags(Args(TrainArgs(**{"backend": "fsdp"} | flags)), NEEDS)

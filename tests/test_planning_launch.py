"""Launch files: examples/ are what their commands write, and their flags are those of pretrain.py."""

import itertools
import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import plan
import pretrain
from cli.args import parse
from planning import launch
from planning.cluster import Cluster, Prediction, Strategy
from planning.devices import GPUS
from planning.memory import Step
from planning.shapes import find_shape

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (REPOSITORY / "examples").iterdir() if path.suffix in (".sh", ".slurm"))


def made(words: list[str]) -> None:
    plan.main(parse(plan.Args, "plan", words))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_what_its_command_writes(path, tmp_path, monkeypatch):
    line = next(line for line in path.read_text().splitlines() if line.startswith("# Made by: "))
    words = shlex.split(line.removeprefix("# Made by: "))
    assert words[:2] == ["python", "plan.py"] and words[-1] == f"examples/{path.name}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    made(words[2:])
    assert (tmp_path / words[-1]).read_text() == path.read_text(), "make it anew: " + shlex.join(words)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_bash_whose_command_pretrain_understands(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    text = path.read_text().replace("\\\n", " ")
    command = next(line for line in text.splitlines() if "torchrun" in line)
    words = shlex.split(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", command))
    flags = words[words.index("pretrain.py") + 1 :]
    args = parse(pretrain.Args, "pretrain", flags)
    options = dict(itertools.pairwise(words))
    nodes = int(options.get("--nnodes", 1))
    world = nodes * int(options["--nproc_per_node"])
    data_ranks, rest = divmod(world, args.train.tp * args.train.pp)
    assert rest == 0 and args.data.batch_size % (data_ranks * args.train.micro_batch_size) == 0
    assert args.train.backend != "single" and f"_{world}xh100" in path.name
    assert f"llama2-{7 if args.model.n_layers == 32 else 70}b" in path.name
    if path.suffix == ".slurm":
        assert f"#SBATCH --nodes={nodes}" in text and words[0] == "srun"


def test_slurm_and_bash_start_the_same_training():
    both = [
        (REPOSITORY / f"examples/llama2-7b_32xh100.{kind}").read_text().split("pretrain.py")[1]
        for kind in ("sh", "slurm")
    ]
    assert both[0] == both[1]


def test_the_steps_are_those_of_the_tokens(tmp_path):
    words = f"--model tinyllama --gpu a100 --gpus 16 --tokens 3e9 --batch_size 512 --launch {tmp_path / 'a.sh'}"
    made(shlex.split(words))
    steps = int(re.search(r"--train.max_steps (\d+)", (tmp_path / "a.sh").read_text())[1])
    assert steps == math.ceil(3e9 / (512 * 2048))


def test_what_cannot_be_run_gets_no_file(tmp_path, capsys):
    words = f"--model llama2-70b --gpu 4090 --gpus 8 --tokens 1e12 --launch {tmp_path / 'a.slurm'}"
    with pytest.raises(SystemExit) as ended:
        made(shlex.split(words))
    assert ended.value.code == plan.NOTHING_FITS
    assert "no strategy fits; nothing is written" in capsys.readouterr().out
    assert not (tmp_path / "a.slurm").exists()


@pytest.mark.parametrize(
    "strategy, optimizer, why",
    [
        (Strategy("DDP", data=8), "adafactor", None),
        (Strategy("FSDP2", data=8), "muon", None),
        (Strategy("FSDP2", data=8), "adafactor", "--train.backend fsdp needs --optim.optimizer muon, adamw or lion"),
        (Strategy("ZeRO-2", data=8), "muon", "DeepSpeed's parts are flat: use --optimizer adamw"),
        (Strategy("3D", 2, 2, 2), "lion", None),
        (Strategy("3D", 2, 2, 2), "adafactor", "needs --optim.optimizer muon, adamw or lion"),
        (Strategy("3D", 3, 1, 1), "adamw", "--train.tp 3 does not divide the model's 32 query heads"),
        (Strategy("3D", 1, 32, 1), "adamw", "--train.pp 32 is more than the model's 22 layers"),
    ],
)
def test_which_strategies_run_here(strategy, optimizer, why):
    where = Cluster(GPUS["h100"], 8, 8, 50e9, 0.45, 2048, 64)
    source, step = find_shape("tinyllama"), Step(1, 2048, optimizer=optimizer)
    found = Prediction(strategy, 1, False, {}, 1, 0, 0, 0, 0, 1)
    refusal = launch.Launch(source, where, step, found).refusal()
    assert refusal is None if why is None else why in refusal


def test_a_preset_that_a_divided_model_cannot_follow_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("pretrain: {model: {dim: 64, n_heads: 4, vocab_size: 100}, train: {compile: 'on'}}")
    where, found = Cluster(GPUS["h100"], 2, 8, 50e9, 0.45, 64, 8), Prediction(Strategy("3D", 2), 1, False, {}, *[1] * 6)
    refusal = launch.Launch(find_shape(str(path)), where, Step(1, 64), found).refusal()
    assert refusal.startswith("--train.tp 2 needs --train.compile auto or off, found on: a divided model is not")

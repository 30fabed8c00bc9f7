"""Real processes of pretrain.py, killed in every way: what goes on afterwards is the very same run, bit for bit."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import finish, kill_all
from helpers.tiny_texts import made_up_texts, train_tiny_tokenizer

from bins.token_bin import BinWriter
from checkpoint.directory import load_model
from cli.record import file_sha256
from tokenizer import load_tokenizer
from training.log import read_metrics
from training.state import checkpoints, load_state

STEPS = 40
FLAGS = f"""
    --model.dim 32 --model.n_layers 2 --model.n_heads 2 --model.multiple_of 8
    --data.seq_len 16 --data.batch_size 8 --optim.warmup_steps 5
    --train.max_steps {STEPS} --train.micro_batch_size 2 --train.log_interval 1 --train.eval_interval 15
    --train.eval_batches 2 --train.save_interval 4 --train.keep 2 --train.compile off --train.device cpu
""".split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as data_process.py leaves it: tokenizer/, train.bin, heldout.bin."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = load_tokenizer(train_tiny_tokenizer(folder))
    tokenizer.save(folder / "tokenizer")
    for name, seed, count in (("train", 0, 60), ("heldout", 1, 6)):
        with BinWriter(folder / name, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
            for text in made_up_texts(count, seed):
                writer.add([*tokenizer.encode(text), tokenizer.eos_id])
    return folder


class Runs:
    """Starts pretrain.py on one folder of data, on `world` processes."""

    def __init__(self, data: Path, world: int, environment: dict[str, str]) -> None:
        self.data, self.world, self.environment = data, world, environment
        self.start_with = [sys.executable] + (TORCHRUN if world > 1 else [])
        self.flags = [*FLAGS, "--train.backend", "ddp" if world > 1 else "single"]

    def start(self, out: Path, *more: str, **options) -> subprocess.Popen:
        script = str(Path(__file__).parents[1] / "pretrain.py")
        command = [*self.start_with, script, "--data.dir", str(self.data), "--out", str(out), *self.flags, *more]
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True, **options)

    def finish(self, out: Path, *more: str, **options) -> tuple[int, str]:
        """Exit status and stderr of a run to its end."""
        return finish(self.start(out, *more, **options))

    def interrupt(self, out: Path, step: int, number: signal.Signals) -> int:
        """Send a signal once the log has reached `step`: SIGKILL to all processes, another one to the first. Returns
        the exit status."""
        process = self.start(out)
        deadline = time.monotonic() + 120
        while logged(out) < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, f"ended before step {step}: {process.communicate()[1]}"
        if number == signal.SIGKILL:
            kill_all(process)
        else:
            process.send_signal(number)
        return finish(process)[0]


def logged(out: Path) -> int:
    """The last step in the log."""
    return max((row["step"] for row in read_metrics(out / "metrics.jsonl")), default=0)


def history(out: Path) -> list[dict]:
    """All that a run computed: the rows of its log that do not depend on the clock."""
    return [row for row in read_metrics(out / "metrics.jsonl") if "mfu" not in row]


def outcome(out: Path) -> dict:
    result = json.loads((out / "result.json").read_text())
    weights = {name: file_sha256(out / name / "model.safetensors") for name in ("last", "best")}
    return weights | {name: value for name, value in result.items() if name != "model"}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def runs(request, data, environment) -> Runs:
    return Runs(data, request.param, environment)


@pytest.fixture(scope="module")
def uninterrupted(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    status, err = runs.finish(out)
    assert status == 0, err
    rows = history(out)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.2  # it trains
    return out


@pytest.mark.slow
def test_killed_again_and_again(runs, uninterrupted, tmp_path):
    chance = random.Random()  # another place every time
    kills = [(2, signal.SIGKILL), (13, signal.SIGKILL)][: 3 - runs.world]  # starting torchrun takes a while
    for first, number in (*kills, (24, signal.SIGTERM)):
        step = first + chance.randrange(10)
        before = (tmp_path / "last").resolve().name
        status = runs.interrupt(tmp_path, step, number)
        assert status != 0
        if number == signal.SIGTERM:
            assert load_state(tmp_path / "last")["progress"]["step"] >= step, f"not saved when asked at {step}"
        elif before != "last":
            assert load_state(tmp_path / "last")["progress"]["step"] >= int(before[-8:])
    status, err = runs.finish(tmp_path)
    assert status == 0, err
    assert history(tmp_path) == history(uninterrupted)
    assert outcome(tmp_path) == outcome(uninterrupted)
    assert (tmp_path / "best").resolve().name == (uninterrupted / "best").resolve().name
    assert {path.name for path in checkpoints(tmp_path)} == {path.name for path in checkpoints(uninterrupted)}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing half-written remains


def limit_file_size() -> None:
    """As a full disk: no file may grow beyond what a log takes, and the attempt is an error, not a signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("runs", [1], indirect=True, ids=["one process"])
def test_a_full_disk_while_saving_leaves_the_old_checkpoint(runs, uninterrupted, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out, symlinks=True)
    before = {path.name: file_sha256(path / "model.safetensors") for path in checkpoints(out)}
    longer = ("--train.max_steps", str(STEPS + 6))
    status, err = runs.finish(out, *longer, preexec_fn=limit_file_size)
    assert status == 1
    sentence = err.splitlines()[-1]
    assert sentence.startswith("error: could not write ")
    assert "what was saved before is as it was" in sentence
    assert "Traceback" not in err
    assert {path.name: file_sha256(path / "model.safetensors") for path in checkpoints(out)} == before
    load_model(out / "last")
    assert load_state(out / "last")["progress"]["step"] == STEPS
    assert not [path for path in out.iterdir() if path.name.endswith(".writing")]
    status, err = runs.finish(out, *longer)
    assert status == 0, err
    assert logged(out) == STEPS + 6


@pytest.mark.parametrize("runs", [1], indirect=True, ids=["one process"])
def test_another_run_is_refused_before_anything_is_touched(runs, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    status, err = runs.finish(tmp_path / "run", "--train.seed", "7")
    assert status == 1
    assert "holds a run with seed 0, and this one has 7" in err.splitlines()[-1]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

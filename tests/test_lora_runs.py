"""fine_tuning.py with adapters: its checkpoints are PEFT directories, and a run goes on bit for bit, killed or not."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import finish, kill_all
from tiny_chat import save_chat_model

import config
import convert
import fine_tuning
import lora
from checkpoint import load_model
from config import file_sha256
from runlog import read_metrics

SMALL = """
    --data.seq_len 64 --data.batch_size 4 --data.heldout none.jsonl --train.compile off --train.device cpu
    --train.max_steps 12 --train.save_interval 3 --train.keep 9 --train.log_interval 1 --optim.warmup_steps 2
""".split()  # noqa: SIM905
KINDS = {
    "lora": ["--lora.method", "lora", "--lora.dropout", "0.2", "--neftune_alpha", "5"],
    "pissa": ["--lora.method", "pissa"],
    "dora and norms": ["--lora.method", "dora", "--lora.train_embed_norm", "true", "--optim.lora_lr_ratio", "4"],
    "qlora": ["--lora.method", "lora", "--lora.base", "nf4", "--lora.dropout", "0.1"],
    "int8": ["--lora.method", "rslora", "--lora.base", "int8", "--train.gradient_checkpointing", "true"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_chat_model(folder / "model")
    words = ["the", "moon", "above", "river"]
    turns = [[("user", f"{a}?"), ("assistant", f"{a} {b}")] for a in words for b in words]
    records = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def flags(folder: Path, out: str, kind: str, *more: str) -> list[str]:
    where = ["--init_from", folder / "model", "--data.train", folder / "train.jsonl", "--out", folder / out]
    return [*map(str, where), *SMALL, *KINDS[kind], *more]


def run(folder: Path, out: str, kind: str, *more: str) -> dict:
    return fine_tuning.main(config.parse(fine_tuning.Args, "fine_tuning", flags(folder, out, kind, *more)))


def outcome(folder: Path, out: str) -> tuple[str, list[dict]]:
    """The last adapter, and all that was computed on the way."""
    rows = [row for row in read_metrics(folder / out / "metrics.jsonl") if "mfu" not in row]
    return file_sha256(folder / out / "last" / "adapter_model.safetensors"), rows


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, tuple[str, list[dict]]]:
    """What came of each kind of run, to its end at once; made when asked for."""

    class Made(dict):
        def __missing__(self, kind: str) -> tuple[str, list[dict]]:
            run(folder, f"whole {kind}", kind)
            self[kind] = outcome(folder, f"whole {kind}")
            return self[kind]

    return Made()


def skip_without_bitsandbytes(kind: str) -> None:
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(kind, folder, whole):
    skip_without_bitsandbytes(kind)
    losses = [row["loss"] for row in whole[kind][1]]
    assert losses[-1] < losses[0] - 0.02  # it trains
    out = f"stopped {kind}"
    shutil.copytree(folder / f"whole {kind}", folder / out, symlinks=True)
    for name in ("last", "best"):
        (folder / out / name).unlink()
    (folder / out / "last").symlink_to("step_00000006")
    (folder / out / "result.json").unlink()
    run(folder, out, kind)
    assert outcome(folder, out) == whole[kind]


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_a_killed_run_goes_on_bit_for_bit(kind, folder, whole, environment):
    skip_without_bitsandbytes(kind)
    script = str(Path(fine_tuning.__file__))
    out = folder / f"killed {kind}"
    process = subprocess.Popen(
        [sys.executable, script, *flags(folder, out.name, kind)], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "last").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    kill_all(process)
    assert finish(process)[0] == -signal.SIGKILL
    run(folder, out.name, kind)
    assert outcome(folder, out.name) == whole[kind]


def test_a_checkpoint_is_the_adapter_alone_and_merges(folder, whole):
    assert whole["pissa"]
    last = folder / "whole pissa" / "last"
    names = {path.name for path in last.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "training_state"} <= names
    assert not names & {"model.safetensors", "config.json"}
    assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "model")
    model, tokens = load_model(folder / "model"), torch.arange(9)[None]
    lora.load(model, last)
    convert.merge(convert.Merge(folder / "model", last, folder / "merged"))
    # float32, weights of size 0.3: logits around 10
    torch.testing.assert_close(load_model(folder / "merged")(tokens), model(tokens), rtol=0, atol=1e-4)


def test_another_adapter_is_another_run(folder, whole):
    assert whole["pissa"]
    for more in (["--lora.r", "4"], ["--lora.targets", "mlp"], ["--lora.method", "lora"], ["--neftune_alpha", "1"]):
        with pytest.raises(ValueError, match="it cannot be continued"):
            run(folder, "whole pissa", "pissa", *more)


def test_a_quantized_base_wants_an_adapter(folder):
    with pytest.raises(SystemExit):
        run(folder, "none", "qlora", "--lora.method", "none")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora and norms", "qlora"])
def test_compiled(kind, folder, whole):
    skip_without_bitsandbytes(kind)
    run(folder, f"compiled {kind}", kind, "--train.compile", "on", "--lora.dropout", "0")
    run(folder, f"eager {kind}", kind, "--lora.dropout", "0")
    losses = [[row["loss"] for row in outcome(folder, f"{how} {kind}")[1]] for how in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bf16 or fp32 fused in another order

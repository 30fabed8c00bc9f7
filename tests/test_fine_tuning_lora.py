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
from helpers.processes import finish, kill_all
from helpers.tiny_chat_model import save_chat_model

import convert
import fine_tuning
from checkpoint import peft
from checkpoint.directory import load_model
from cli.args import parse
from cli.record import file_sha256
from serving.assistant import load_assistant
from tokenizer import load_tokenizer
from training.log import read_metrics

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
    return fine_tuning.main(parse(fine_tuning.Args, "fine_tuning", flags(folder, out, kind, *more)))


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
    peft.load(model, last)
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


@pytest.mark.parametrize("kind", ["dora and norms", "qlora"])
def test_two_processes_equal_one(kind, folder, environment):
    skip_without_bitsandbytes(kind)
    no_noise = ["--lora.dropout", "0", "--train.max_steps", "4", "--train.dtype", "fp32"]
    run(folder, f"one {kind}", kind, *no_noise)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(fine_tuning.__file__))
    started = [*command, script, *flags(folder, f"two {kind}", kind, *no_noise, "--train.backend", "ddp")]
    status, err = finish(subprocess.Popen(started, env=environment, stderr=subprocess.PIPE, text=True))
    assert status == 0, err
    for one, two in zip(outcome(folder, f"one {kind}")[1], outcome(folder, f"two {kind}")[1], strict=True):
        assert two == pytest.approx(one, rel=1e-4)  # float32 with another order of sums, through AdamW


@pytest.fixture(scope="module")
def neox(folder) -> Path:
    """A random GPT-NeoX with the vocabulary of `model`."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(folder / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    shape = transformers.GPTNeoXConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, **sizes)
    torch.manual_seed(0)
    peer = transformers.GPTNeoXForCausalLM(shape)
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.dim() == 1, std=0.2)
    peer.save_pretrained(folder / "neox")
    tokenizer.save(folder / "neox")
    return folder / "neox"


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_an_adapter_of_a_model_that_is_transformers_own(base, folder, neox):
    """Trained, resumed, answered with, merged; loaded by peft."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    out = f"neox {base}"
    more = ["--init_from", str(neox), "--lora.targets", "linear", "--lora.base", base, "--lora.dropout", "0"]
    more += ["--optim.lr", "0.01"]
    run(folder, out, "lora", *more, "--train.max_steps", "6")
    run(folder, out, "lora", *more)  # goes on
    losses = [row["loss"] for row in outcome(folder, out)[1]]
    assert losses[-1] < losses[0] - 0.1
    last, tokens = folder / out / "last", torch.arange(4, 20)[None]
    assistant = load_assistant(last, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(neox), last)(tokens).logits
        for kind, wanted in (("auto", assistant.model(tokens)), ("full", theirs)):  # of nf4, theirs is put on all bits
            convert.merge(convert.Merge(neox, last, folder / f"merged {base} {kind}", base=kind))
            merged = AutoModelForCausalLM.from_pretrained(folder / f"merged {base} {kind}")
            torch.testing.assert_close(merged(tokens).logits, wanted, rtol=1e-4, atol=1e-4)  # float32, merged first
        if base == "full":
            torch.testing.assert_close(assistant.model(tokens), theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_no_model_to_start_from(folder, whole):
    assert whole["pissa"]
    with pytest.raises(FileNotFoundError, match=r"holds an adapter, not a model: .* python convert\.py merge"):
        run(folder, "none", "lora", "--init_from", str(folder / "whole pissa" / "last"))


def test_targets_that_a_model_does_not_have(folder, neox):
    with pytest.raises(ValueError, match=r"'q_proj'; .* query_key_value.*; --lora.targets linear takes all"):
        run(folder, "none", "pissa", "--init_from", str(neox), "--lora.targets", "q_proj")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora and norms", "qlora"])
def test_compiled(kind, folder, whole):
    skip_without_bitsandbytes(kind)
    run(folder, f"compiled {kind}", kind, "--train.compile", "on", "--lora.dropout", "0")
    run(folder, f"eager {kind}", kind, "--lora.dropout", "0")
    losses = [[row["loss"] for row in outcome(folder, f"{how} {kind}")[1]] for how in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bf16 or fp32 fused in another order

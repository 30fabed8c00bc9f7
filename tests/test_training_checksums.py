"""Every directory that weights are read from is compared with its sums: an adapter's base, a draft, a second model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.tiny_chat_model import save_chat_model

import convert
import eval as eval_script
import quantize
from checkpoint import peft
from checkpoint.directory import load_model
from decoding.params import SamplingParams
from evaluation.harness import load
from lora import adapters
from training.checksums import write_sums

ARGS = eval_script.Args(sampling=SamplingParams(temperature=0, max_new_tokens=2), device="cpu", prompt="江")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with `whole`, and `damaged` whose weights differ from its sums; an adapter of each in `of_NAME`."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("whole", "damaged"):
        directory = save_chat_model(folder / name)
        (directory / "training_state").mkdir()
        write_sums(directory)
        model = load_model(directory)
        adapters.apply(model, adapters.LoraArgs("lora", r=2))
        (folder / f"of_{name}").mkdir()
        peft.save(folder / f"of_{name}", model, base=str(directory))
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    return folder


def serve(folder: Path, adapter: str) -> None:
    pytest.importorskip("uvicorn")
    import serve as script

    args = script.Args(model=folder / adapter, rows=1)
    script.open_service(args, "name", folder / adapter, torch.device("cpu"), torch.float32, 1)


def asked(folder: Path, **changes: str) -> None:
    flags = {name: folder / value if name != "draft" else str(folder / value) for name, value in changes.items()}
    eval_script.main(dataclasses.replace(ARGS, **{"model": folder / "whole"} | flags))


USES = {
    "eval.py": lambda folder, name: asked(folder, model=f"of_{name}"),
    "eval.py --base": lambda folder, name: asked(folder, model="of_whole", base=name),
    "eval.py --draft": lambda folder, name: asked(folder, draft=name),
    "eval.py --draft of an adapter": lambda folder, name: asked(folder, draft=f"of_{name}"),
    "serve.py": lambda folder, name: serve(folder, f"of_{name}"),
    "quantize.py": lambda folder, name: quantize.main(
        quantize.Args(model=folder / f"of_{name}", out=folder / f"quantized_{name}", method="rtn", group_size=16)
    ),
    "convert.py merge": lambda folder, name: convert.merge(
        convert.Merge(model=folder / name, adapter=folder / "of_whole", out=folder / f"merged_{name}")
    ),
    "convert.py tokens": lambda folder, name: convert.tokens(
        convert.Tokens(model=folder / name, out=folder / f"grown_{name}", add_tokens=("月月",))
    ),
    "evaluation.harness": lambda folder, name: load(str(folder / f"of_{name}"), "cpu"),
}


@pytest.mark.parametrize("use", list(USES))
def test_no_damaged_weights_are_used(folder, use):
    USES[use](folder, "whole")
    with pytest.raises(ValueError, match=r"damaged/model\.safetensors is missing or not what was saved"):
        USES[use](folder, "damaged")

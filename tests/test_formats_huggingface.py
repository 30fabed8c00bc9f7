"""convert.py export and import between Hugging Face directories: other dtypes, other files, PyTorch's pickles."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.small_checkpoints import KINDS, TOKENS, saved
from helpers.tiny_chat_model import save_chat_model
from safetensors import safe_open
from safetensors.torch import load_file

import convert
from checkpoint import streamed
from checkpoint.directory import load_model
from convert import Export, Import
from formats.base import Entry, as_dtype
from tokenizer import load_tokenizer


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_another_dtype_is_each_tensor_rounded_once(tmp_path, changes, dtype):
    model = saved(tmp_path / "in", **changes)
    convert.export(Export(model=tmp_path / "in", format="huggingface", out=tmp_path / "out", dtype=dtype))
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    written = load_file(tmp_path / "out/model.safetensors")
    own = load_file(tmp_path / "in/model.safetensors")
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name].to(wanted)) for name in own)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    if dtype == "fp32":
        assert torch.equal(load_model(tmp_path / "out")(TOKENS), model(TOKENS))


def test_files_of_another_size_hold_the_same(tmp_path):
    model = saved(tmp_path / "in")
    convert.import_(Import(source=tmp_path / "in", out=tmp_path / "out", shard_size=2e-5))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 25_000 for path in files)  # 20 kB of numbers, and the header
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-5)
    convert.import_(Import(source=tmp_path / "out", out=tmp_path / "back"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "back"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_files_beside_come_along_and_a_tokenizer_can_be_named(tmp_path):
    save_chat_model(tmp_path / "in")
    convert.export(Export(model=tmp_path / "in", format="huggingface", out=tmp_path / "out"))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    saved(tmp_path / "bare")
    convert.import_(Import(source=tmp_path / "bare", out=tmp_path / "dressed", tokenizer=tmp_path / "in"))
    assert load_tokenizer(tmp_path / "dressed").sha256() == load_tokenizer(tmp_path / "in").sha256()


def test_a_pytorch_bin_is_read_and_its_pickle_never_run(tmp_path):
    model = saved(tmp_path / "in")
    state = load_file(tmp_path / "in/model.safetensors")
    (tmp_path / "in/model.safetensors").unlink()
    torch.save(state, tmp_path / "in/pytorch_model.bin")
    convert.import_(Import(source=tmp_path / "in", out=tmp_path / "out"))
    assert torch.equal(load_model(tmp_path / "out")(TOKENS), model(TOKENS))

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it_ran",)

    (tmp_path / "in/pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    with pytest.raises(ValueError, match="is refused: it is a pickle that asks for"):
        convert.import_(Import(source=tmp_path / "in", out=tmp_path / "never"))
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "never").exists()


def test_another_architecture_is_copied(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**shape, intermediate_size=32, max_position_embeddings=32)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "in")
    convert.export(Export(model=tmp_path / "in", format="huggingface", out=tmp_path / "out", dtype="bf16"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16 and isinstance(theirs, transformers.GPTNeoXForCausalLM)


def test_the_map_names_every_tensor_and_nothing_is_written(tmp_path, capsys):
    saved(tmp_path / "in", n_layers=1)
    convert.import_(Import(source=tmp_path / "in", out=tmp_path / "out", dry_run=True, dtype="bf16"))
    head, *lines, end = capsys.readouterr().out.splitlines()
    assert head.split() == ["source", "target", "shape", "dtype"] and end == "11 tensors; nothing is written"
    names = load_file(tmp_path / "in/model.safetensors")
    assert sorted(line.split()[0] for line in lines) == sorted(names)
    up = next(line for line in lines if "up_proj" in line)
    assert up.split()[1:] == ["model.layers.0.mlp.up_proj.weight", "40", "x", "32", "BF16"]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_one_sentence(tmp_path):
    saved(tmp_path / "in")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert.import_(Import(source=tmp_path / "in", out=tmp_path / "there"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert.import_(Import(source=tmp_path / "nowhere", out=tmp_path / "out"))
    (tmp_path / "nothing").touch()
    with pytest.raises(ValueError, match="nothing is an empty file, of 0 bytes: copy or download it again"):
        convert.import_(Import(source=tmp_path / "nothing", out=tmp_path / "out"))
    with pytest.raises(ValueError, match="there is an empty directory: copy the model into it"):
        convert.import_(Import(source=tmp_path / "there", out=tmp_path / "out"))
    (tmp_path / "noise").write_bytes(b"\x07noise of no kind")
    with pytest.raises(ValueError, match="begins with the bytes 07 6e 6f 69 73 65 20 6f, is in no format that is read"):
        convert.import_(Import(source=tmp_path / "noise", out=tmp_path / "out"))
    state = load_file(tmp_path / "in/model.safetensors")
    large = Entry((2,), "F32", ("w",), lambda: torch.tensor([1.0, 1e6]))
    with pytest.raises(ValueError, match=r"w has a number of 1e\+06, beyond float16"):
        as_dtype(large, "F16").load()
    short = Entry((3,), "F32", ("w",), lambda: torch.zeros(2))
    with pytest.raises(ValueError, match="w should be"):
        streamed.write_file(tmp_path / "x.safetensors", {"w": short})
    del state["model.norm.weight"]
    torch.save(state, tmp_path / "in/pytorch_model.bin")
    (tmp_path / "in/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it lacks model\.norm\.weight"):
        convert.import_(Import(source=tmp_path / "in", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_streamed_file_is_that_of_the_library(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(kinds)}
    names = ["F64", "F32", "F16", "BF16", "I64", "I8", "BOOL"]
    tensors["scalar"], tensors["none"] = torch.tensor(2.5), torch.zeros(0, 4)
    entries = {
        n: Entry(tuple(t.shape), dtype, (n,), lambda t=t: t)
        for (n, t), dtype in zip(tensors.items(), [*names, "F32", "F32"])
    }
    streamed.write_file(tmp_path / "x.safetensors", entries)
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

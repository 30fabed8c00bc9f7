"""GGUF files: transformers' own reader gets the same logits, what is written is read back, what is odd is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_checkpoints import KINDS, TOKENS, saved
from safetensors.torch import load_file

import convert
from checkpoint import peft
from checkpoint.directory import load_model
from convert import Export, Import
from lora import adapters
from lora.adapters import LoraArgs

gguf = pytest.importorskip("gguf")

from formats import gguf_quants  # noqa: E402
from formats.gguf import read_file, write_file  # noqa: E402
from formats.gguf_settings import Field  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 16},
}


def exported(folder: Path, dtype: str = "auto") -> Path:
    convert.export(Export(model=folder / "in", format="gguf", out=folder / f"{dtype}.gguf", dtype=dtype))
    return folder / f"{dtype}.gguf"


def imported(file: Path) -> Path:
    convert.import_(Import(source=file, out=file.parent / f"{file.stem}-back"))
    return file.parent / f"{file.stem}-back"


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_transformers_own_reader_has_equal_logits(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    if changes.get("qk_norm"):
        changes = changes | {"head_dim": 128}  # its reader of qwen3 knows no other
    model = saved(tmp_path / "in", **changes)
    exported(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="auto.gguf", dtype=torch.float32)
    # the same float32 numbers, added up in another order
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=2e-5)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_there_and_back_is_the_same_bit_for_bit(changes, dtype, tmp_path):
    model = saved(tmp_path / "in", dtype, **changes)
    back = load_model(imported(exported(tmp_path)), dtype=dtype)
    assert back.args == model.args
    ours, theirs = model.state_dict(), back.state_dict()
    assert all(theirs[name].dtype == dtype and torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_vectors_that_the_dtype_of_the_matrices_would_round_are_kept(dtype, tmp_path):
    """GGUF has them in float32, whatever its matrices are."""
    wanted = dict(saved(tmp_path / "in").named_parameters())
    source = exported(tmp_path, dtype)
    convert.import_(Import(source=source, out=tmp_path / "same"))
    convert.import_(Import(source=source, out=tmp_path / "fp32", dtype="fp32"))
    for folder in ("same", "fp32"):
        stored = load_file(tmp_path / folder / "model.safetensors")
        vectors = [name for name, tensor in stored.items() if tensor.dim() == 1]
        assert len(vectors) > 3 and all(torch.equal(stored[name], wanted[name]) for name in vectors)
        matrix = stored["model.layers.0.mlp.up_proj.weight"].dtype
        assert matrix == (torch.float32 if folder == "fp32" else {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])


@pytest.mark.parametrize("scaling", ROPES.values(), ids=ROPES)
def test_stretched_positions_come_back(scaling, tmp_path):
    model = saved(tmp_path / "in", rope_scaling=scaling)
    back = load_model(imported(exported(tmp_path)))
    assert torch.equal(back(TOKENS), model(TOKENS)) and back.args.max_seq_len == model.args.max_seq_len


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sliding_window": 8}, "a sliding window of 8 of its 64 tokens"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "qk_norm": True}, "rope_type llama3"),
        ({"rope_scaling": ROPES["yarn"] | {"attention_factor": 1.5}}, "rope_type yarn with attention_factor"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(changes, what, tmp_path):
    saved(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=f"has {what}"):
        exported(tmp_path)
    assert not list(tmp_path.glob("*gguf*"))


# ---- bits


@pytest.mark.parametrize(("dtype", "most"), [("q8_0", 0.01), ("q4_0", 0.12), ("q4_k", 0.1)])
def test_few_bits_are_those_that_the_library_reads(dtype, most, tmp_path):
    model = saved(tmp_path / "in", dim=256, hidden_dim=512, n_layers=1, tie_embeddings=False)
    file = exported(tmp_path, dtype)
    _, stored = read_file(file)
    kinds = {name: each.kind.name for name, each in stored.items()}
    assert kinds["blk.0.ffn_down.weight"] == dtype.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == "Q8_0" == kinds["output.weight"]
    back = load_model(imported(file)).state_dict()
    for name, weight in model.state_dict().items():
        assert (back[name] - weight).norm() <= most * weight.norm(), name


def test_a_notice_counts_the_matrices_that_blocks_do_not_divide(tmp_path, capsys):
    saved(tmp_path / "in", dim=256, hidden_dim=336, n_layers=2, tie_embeddings=False)
    _, stored = read_file(exported(tmp_path, "q4_k"))
    assert sum(each.kind.name == "F16" for each in stored.values()) == 2  # rows of 336 = 10.5 * 32, of ffn_down
    said = capsys.readouterr().err
    assert "2 of 16 matrices are written as F16 instead of Q4_K: blocks of 256 weights do not divide" in said
    saved(tmp_path / "small/in", dim=64, hidden_dim=160, n_layers=1)
    _, stored = read_file(exported(tmp_path / "small", "q4_k"))
    assert {each.kind.name for each in stored.values()} == {"Q8_0", "F32"}
    said = capsys.readouterr().err
    assert "7 of 8 matrices are written as Q8_0 instead of Q4_K" in said and "their rows of 64 and 160;" in said
    exported(tmp_path / "small", "q4_0")
    assert "instead of" not in capsys.readouterr().err


def test_q4_k_is_better_than_q4_0_and_takes_odd_blocks() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((32, 512)).astype(np.float32)
    weights[:3] = np.array([[0], [-0.5], [1]])
    weights[3, ::7] = 40.0
    packed = gguf_quants.q4_k(weights)
    assert packed.shape == (32, 288) and packed.dtype == np.uint8
    back = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_K)
    simple = gguf.GGMLQuantizationType.Q4_0
    worse = gguf.quants.dequantize(gguf.quants.quantize(weights, simple), simple)
    error, other = (np.square(each - weights)[4:].sum() for each in (back, worse))
    assert error < 0.75 * other
    assert (back[0] == 0).all() and np.abs(back[1] + 0.5).max() < 0.01 and np.abs(back[2] - 1).max() < 0.02


def test_each_code_and_scale_of_q4_k_is_packed_where_it_is_read() -> None:
    # numbers that 4 bits hold exactly: 63 scales of 1/63 steps, minima likewise
    scales = np.arange(1, 9, dtype=np.float32) * 8 - 1
    codes = np.tile(np.arange(16, dtype=np.float32), 2)
    weights = (scales[:, None] * codes - scales[::-1, None]).reshape(1, 256)
    back = gguf.quants.dequantize(gguf_quants.q4_k(weights), gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_allclose(back, weights, atol=1.0)  # of numbers up to 945
    assert np.abs(back - weights).mean() < 0.2


def test_rows_that_blocks_do_not_divide_have_a_larger_type(tmp_path):
    saved(tmp_path / "in", dim=32, hidden_dim=40, n_layers=1)
    _, stored = read_file(exported(tmp_path, "q4_k"))
    assert stored["blk.0.ffn_up.weight"].kind.name == "Q8_0" and stored["blk.0.ffn_down.weight"].kind.name == "F16"


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q4_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ2_0"])
def test_every_type_that_the_library_dequantizes_is_read(kind, tmp_path):
    model = saved(tmp_path / "in", dim=256, hidden_dim=256, n_layers=1)
    file = exported(tmp_path)
    fields, stored = read_file(file)
    rng = np.random.default_rng(1)
    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    raw = rng.integers(0, 60, (256, 256 // block * size), dtype=np.uint8)  # some codes; no float16 in it is infinite
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in fields.items():
        if key.startswith("llama."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_string("tokenizer.ggml.model", "none")
    for name, each in stored.items():
        if name == "blk.0.ffn_up.weight":
            writer.add_tensor(name, raw, raw_dtype=qtype)
        else:
            writer.add_tensor(name, each.load().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = load_model(imported(tmp_path / "x.gguf"))
    wanted = torch.from_numpy(gguf.quants.dequantize(raw, qtype))
    assert torch.equal(back.model.layers[0].mlp.up_proj.weight, wanted)
    assert torch.equal(back.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)


def test_files_in_parts_are_read(tmp_path):
    model = saved(tmp_path / "in")
    fields, stored = read_file(exported(tmp_path))
    half = len(stored) // 2
    for n, names in enumerate((list(stored)[:half], list(stored)[half:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"m-{n:05d}-of-00002.gguf", "llama")
        for key, value in fields.items() if n == 1 else ():
            if key.startswith("llama."):
                (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        for name in names:
            writer.add_tensor(name, stored[name].load().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert torch.equal(load_model(imported(tmp_path / "m-00001-of-00002.gguf"))(TOKENS), model(TOKENS))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"is one of 2 parts, and m-00002-of-00002\.gguf is not there"):
        convert.import_(Import(source=tmp_path / "m-00001-of-00002.gguf", out=tmp_path / "out"))


# ---- what is refused


def test_damaged_and_foreign_files_are_one_sentence(tmp_path):
    saved(tmp_path / "in", n_layers=1)
    raw = exported(tmp_path).read_bytes()
    for keep in (6, 30, 200, len(raw) // 2, len(raw) - 40):
        (tmp_path / "cut.gguf").write_bytes(raw[:keep])
        with pytest.raises(ValueError, match=r"cannot be read as GGUF.*truncated"):
            convert.import_(Import(source=tmp_path / "cut.gguf", out=tmp_path / "out"))
    (tmp_path / "magic.gguf").write_bytes(b"GGML" + raw[4:])
    with pytest.raises(ValueError, match=r"begins with the bytes 47 47 4d 4c .*, is in no format that is read here"):
        convert.import_(Import(source=tmp_path / "magic.gguf", out=tmp_path / "out"))
    (tmp_path / "new.gguf").write_bytes(raw[:4] + struct.pack("<I", 99) + raw[8:])
    with pytest.raises(ValueError, match="version 99"):
        convert.import_(Import(source=tmp_path / "new.gguf", out=tmp_path / "out"))
    write_file(tmp_path / "mamba.gguf", "mamba", {"x": Field("uint32", 1)}, {"token_embd.weight": one()})
    with pytest.raises(ValueError, match="of the architecture 'mamba'; of GGUF files, llama, qwen2, qwen3 are read"):
        convert.import_(Import(source=tmp_path / "mamba.gguf", out=tmp_path / "out"))
    write_file(tmp_path / "bare.gguf", "llama", {}, {"token_embd.weight": one()})
    with pytest.raises(ValueError, match=r"lacks llama\.context_length|lacks llama\.attention"):
        convert.import_(Import(source=tmp_path / "bare.gguf", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def one():
    from formats.base import Entry

    return Entry((2, 4), "F32", ("w",), lambda: np.ones((2, 4), np.float32))


def test_a_tensor_that_is_left_over_or_missing_is_named(tmp_path):
    model_folder = tmp_path / "in"
    saved(model_folder, n_layers=1)
    fields, stored = read_file(exported(tmp_path))
    kept = {k: Field("float32" if isinstance(v, float) else "uint32", v) for k, v in fields.items() if "llama." in k}
    from formats.base import Entry

    entries = {n: Entry(each.shape, "F32", (n,), lambda each=each: each.load().numpy()) for n, each in stored.items()}
    write_file(tmp_path / "more.gguf", "llama", kept, entries | {"blk.0.ffn_gate_inp.weight": one()})
    with pytest.raises(ValueError, match=r"no place in a model of the LLaMA family: blk\.0\.ffn_gate_inp\.weight"):
        convert.import_(Import(source=tmp_path / "more.gguf", out=tmp_path / "out"))
    del entries["blk.0.ffn_up.weight"]
    write_file(tmp_path / "less.gguf", "llama", kept, entries)
    with pytest.raises(ValueError, match=r"is not a whole model: it lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        convert.import_(Import(source=tmp_path / "less.gguf", out=tmp_path / "out"))


def test_an_adapter_that_gguf_does_not_hold_is_refused(tmp_path):
    saved(tmp_path / "in")
    refused = {"lora_magnitude": LoraArgs("dora", r=2), "norm": LoraArgs("lora", r=2, train_embed_norm=True)}
    for what, args in refused.items():
        model = load_model(tmp_path / "in")
        adapters.apply(model, args)
        peft.save(tmp_path / "adapter", model, base=str(tmp_path / "in"))
        with pytest.raises(ValueError, match=f"trains .*{what}.*, which adapters of llama.cpp do not hold: merge it"):
            convert.export(Export(model=tmp_path / "adapter", format="gguf", out=tmp_path / "x.gguf"))
    with pytest.raises(FileNotFoundError, match="holds an adapter, not a model: put it into its model with"):
        convert.export(Export(model=tmp_path / "adapter", format="llama2c", out=tmp_path / "x.bin"))
    with pytest.raises(ValueError, match="--base is for an adapter"):
        convert.export(Export(model=tmp_path / "in", format="gguf", out=tmp_path / "x.gguf", base=tmp_path))


def test_the_dtype_has_to_be_one_of_the_format(tmp_path):
    with pytest.raises(ValueError, match="--dtype q4_k is not one of the format huggingface, which has auto or fp32"):
        Export(model=tmp_path, format="huggingface", out=tmp_path / "x", dtype="q4_k")
    with pytest.raises(ValueError, match="--dtype q4_k is not one of the format huggingface"):
        Import(source=tmp_path, out=tmp_path / "x", dtype="q4_k")
    with pytest.raises(ValueError, match="--dtype fp16 is not one of the format llama2c, which has auto"):
        Export(model=tmp_path, format="llama2c", out=tmp_path / "x", dtype="fp16")

"""Checkpoints of Megatron-LM, against a writer and a reader in this file that go head by head through its layout."""

import argparse
import enum
import importlib
import json
import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.small_checkpoints import KINDS, TOKENS, saved
from helpers.tiny_chat_model import chat_tokenizer

import convert
from checkpoint.directory import load_model
from convert import Export, Import
from tokenizer import load_tokenizer

FILE = "model_optim_rng.pt"


class Backend(enum.Enum):  # as the settings of newer versions of Megatron hold
    FUSED = 1


def settings(model, **changes) -> argparse.Namespace:
    args = model.args
    own = {
        "num_layers": args.n_layers,
        "hidden_size": args.dim,
        "ffn_hidden_size": args.hidden_dim,
        "num_attention_heads": args.n_heads,
        "num_query_groups": args.n_kv_heads,
        "group_query_attention": True,
        "kv_channels": args.head_dim,
        "max_position_embeddings": args.max_seq_len,
        "norm_epsilon": args.norm_eps,
        "rotary_base": 10000,
        "swiglu": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": args.attention_bias,
        "qk_layernorm": args.qk_norm,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not args.tie_embeddings,
        "vocab_size": args.vocab_size,
        "attention_backend": Backend.FUSED,
        "params_dtype": torch.float32,
    }
    return argparse.Namespace(**own | changes)


def grouped(model, layer: int, kind: str, groups: range) -> torch.Tensor:
    """The rows of linear_qkv of some groups, one head after the other."""
    args, own = model.args, dict(model.named_parameters())
    q, k, v = (own[f"model.layers.{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv")
    d, share, rows = args.head_dim, args.n_heads // args.n_kv_heads, []
    for group in groups:
        for head in range(group * share, (group + 1) * share):
            rows += [q[head * d + i] for i in range(d)]
        rows += [k[group * d + i] for i in range(d)]
        rows += [v[group * d + i] for i in range(d)]
    return torch.stack(rows)


def rank_of(model, tp: int, pp: int, rank: int, stage: int, fused: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of one rank, by Megatron core's names (with Transformer Engine where fused)."""
    args, own = model.args, dict(model.named_parameters())
    state, per_stage = {}, args.n_layers // pp
    rows = -(-args.vocab_size // (128 * tp)) * 128  # of a table on each rank

    def table(name: str) -> torch.Tensor:
        whole = torch.zeros(rows * tp, args.dim)
        whole[: args.vocab_size] = own[name]
        return whole[rank * rows : (rank + 1) * rows].clone()

    if stage == 0:
        state["embedding.word_embeddings.weight"] = table("model.embed_tokens.weight")
    kv, f = args.n_kv_heads // tp, args.hidden_dim // tp
    q = args.n_heads * args.head_dim // tp
    for i in range(per_stage):
        layer, ours = stage * per_stage + i, f"model.layers.{stage * per_stage + i}."
        name = f"decoder.layers.{i}."
        norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        norms = norms if fused else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        state[name + norms[0]] = own[ours + "input_layernorm.weight"]
        state[name + norms[1]] = own[ours + "post_attention_layernorm.weight"]
        groups = range(rank * kv, (rank + 1) * kv)
        state[name + "self_attention.linear_qkv.weight"] = grouped(model, layer, "weight", groups)
        if args.attention_bias:
            state[name + "self_attention.linear_qkv.bias"] = grouped(model, layer, "bias", groups)
        if args.qk_norm:
            for x in "qk":
                state[f"{name}self_attention.{x}_layernorm.weight"] = own[f"{ours}self_attn.{x}_norm.weight"]
        mine = slice(rank * q, (rank + 1) * q)
        state[name + "self_attention.linear_proj.weight"] = own[ours + "self_attn.o_proj.weight"][:, mine].clone()
        part = slice(rank * f, (rank + 1) * f)
        gate, up = (own[f"{ours}mlp.{x}_proj.weight"][part] for x in ("gate", "up"))
        state[name + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        state[name + "mlp.linear_fc2.weight"] = own[ours + "mlp.down_proj.weight"][:, part].clone()
    if stage == pp - 1:
        state["decoder.final_layernorm.weight"] = own["model.norm.weight"]
        if not args.tie_embeddings:
            state["output_layer.weight"] = table("lm_head.weight")
        elif pp > 1:
            state["output_layer.weight"] = table("model.embed_tokens.weight")
    return {name: tensor.detach() for name, tensor in state.items()}


def write(folder: Path, model, tp: int, pp: int, fused: bool = True, name=lambda state: state, **changes) -> None:
    for stage in range(pp):
        for rank in range(tp):
            place = folder / "iter_0000100" / (f"mp_rank_{rank:02d}" + f"_{stage:03d}" * (pp > 1))
            place.mkdir(parents=True)
            state = name(rank_of(model, tp, pp, rank, stage, fused))
            whole = {"args": settings(model, **changes), "checkpoint_version": 3.0, "iteration": 100, "model": state}
            torch.save(whole | {"rng_state": [{"random": Backend.FUSED}]}, place / FILE)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def imported(source: Path, out: Path):
    convert.import_(Import(source=source, out=out))
    return load_model(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_what_megatron_wrote_is_the_same_model(kind, tp, pp, tmp_path):
    if KINDS[kind].get("n_kv_heads", 4) % tp:
        pytest.skip("one key head is not divided")
    model = saved(tmp_path / "ours", **KINDS[kind])
    write(tmp_path / "theirs", model, tp, pp, fused=tp == 1)
    found = imported(tmp_path / "theirs", tmp_path / "back")
    assert found.args == model.args
    assert torch.equal(found(TOKENS), model(TOKENS))


def old_names(state: dict) -> dict:
    """The names of `language_model`, nested as it nested them."""
    encoder, out = {}, {"language_model": {"encoder": {}}}
    for name, tensor in state.items():
        name = name.replace("linear_qkv.layer_norm_weight", "?").replace("self_attention.?", "input_norm.weight")
        name = name.replace("mlp.linear_fc1.layer_norm_weight", "post_attention_norm.weight")
        name = name.replace("linear_qkv", "query_key_value").replace("linear_proj", "dense")
        name = name.replace("linear_fc1", "dense_h_to_4h").replace("linear_fc2", "dense_4h_to_h")
        name = name.replace("final_layernorm", "final_norm")
        if name.startswith("decoder."):
            encoder[name.removeprefix("decoder.")] = tensor
        elif name.startswith("embedding."):
            out["language_model"]["embedding"] = {"word_embeddings": {"weight": tensor}}
        else:
            out["language_model"]["output_layer"] = {"weight": tensor}
    out["language_model"]["encoder"] = encoder
    return out


def test_the_names_of_older_versions_are_known(tmp_path):
    model = saved(tmp_path / "ours", **KINDS["untied"])
    write(tmp_path / "theirs", model, 2, 1, name=old_names)
    assert torch.equal(imported(tmp_path / "theirs", tmp_path / "back")(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 3), (1, 3)])
def test_what_is_written_is_what_megatron_would_hold_bit_for_bit(kind, tp, pp, tmp_path):
    if KINDS[kind].get("n_kv_heads", 4) % tp:
        pytest.skip("one key head is not divided")
    model = saved(tmp_path / "ours", **KINDS[kind])
    out = tmp_path / "theirs"
    parallel = {"tensor_parallel": tp, "pipeline_parallel": pp}
    convert.export(Export(model=tmp_path / "ours", format="megatron", out=out, **parallel))
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
    for stage in range(pp):
        for rank in range(tp):
            place = out / "release" / (f"mp_rank_{rank:02d}" + f"_{stage:03d}" * (pp > 1)) / FILE
            whole = torch.load(place, weights_only=False)
            expected = rank_of(model, tp, pp, rank, stage)
            assert whole["model"].keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in whole["model"].items())
            stated = vars(whole["args"])
            wanted = vars(settings(model)) | {"group_query_attention": model.args.n_kv_heads != model.args.n_heads}
            assert {name: stated[name] for name in wanted if name in stated} == {
                n: wanted[n] for n in wanted if n in stated
            }
            # no tensor drags the storage of a larger one into the file
            assert place.stat().st_size < sum(4 * t.numel() for t in expected.values()) + 40_000
    assert torch.equal(imported(out, tmp_path / "back")(TOKENS), model(TOKENS))


def test_another_dtype_and_a_map(tmp_path, capsys):
    saved(tmp_path / "ours")
    convert.export(Export(model=tmp_path / "ours", format="megatron", out=tmp_path / "a", dtype="bf16"))
    state = torch.load(tmp_path / "a/release/mp_rank_00" / FILE, weights_only=False)
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.bfloat16} and state["args"].bf16
    convert.export(
        Export(model=tmp_path / "ours", format="megatron", out=tmp_path / "b", tensor_parallel=2, dry_run=True)
    )
    assert (
        "mp_rank_01/decoder.layers.2.mlp.linear_fc2.weight" in capsys.readouterr().out and not (tmp_path / "b").exists()
    )


@pytest.mark.parametrize("named", ["", "release"])
def test_the_tokenizer_comes_back(named, tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    saved(tmp_path / "ours", vocab_size=tokenizer.vocab_size)
    tokenizer.save(tmp_path / "ours")
    convert.export(Export(model=tmp_path / "ours", format="megatron", out=tmp_path / "theirs"))
    imported(tmp_path / "theirs" / named, tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").encode("江上 a") == tokenizer.encode("江上 a")


class Evil:
    """Calls a function when its pickle is loaded."""

    def __init__(self, function, *arguments) -> None:
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("place", ["args", "model", "more"])
@pytest.mark.parametrize(
    "function", [os.mkdir, subprocess.call, eval, exec, runpy.run_path, shutil.rmtree, importlib.import_module]
)
def test_a_pickle_that_wants_to_execute_is_refused_for_that_and_not_run(function, place, tmp_path):
    """Wherever it stands, also where the settings or the weights should be."""
    write(tmp_path / "theirs", saved(tmp_path / "ours"), 1, 1)
    file = tmp_path / "theirs/iter_0000100/mp_rank_00" / FILE
    whole = torch.load(file, weights_only=False)
    torch.save(whole | {place: Evil(function, str(tmp_path / "evil"))}, file)
    with pytest.raises(
        ValueError, match=r"is refused: it is a pickle that asks for \S+, and nothing of it was run"
    ) as e:
        imported(tmp_path / "theirs", tmp_path / "back")
    assert function.__name__ in str(e.value) and not (tmp_path / "evil").exists()


def test_what_would_run_does_run_where_nothing_refuses_it(tmp_path):
    """The pickle of the test above is a real one."""
    torch.save(Evil(os.mkdir, str(tmp_path / "evil")), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "evil").is_dir()


def test_classes_of_megatron_need_not_be_here(tmp_path, monkeypatch):
    model = saved(tmp_path / "ours")
    write(tmp_path / "theirs", model, 1, 1)
    monkeypatch.delattr("test_formats_megatron.Backend")  # its settings name it
    assert torch.equal(imported(tmp_path / "theirs", tmp_path / "back")(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"normalization": "LayerNorm"}, "has normalization RMSNorm, found LayerNorm"),
        ({"num_experts": 8}, "has num_experts None, found 8"),
        ({"hidden_size": 64}, "is not a whole model"),
    ],
)
def test_a_model_of_another_kind_is_refused(changes, sentence, tmp_path):
    write(tmp_path / "theirs", saved(tmp_path / "ours"), 1, 1, **changes)
    with pytest.raises(ValueError, match=sentence):
        imported(tmp_path / "theirs", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("damage", [b"", b"<html>404", bytes(2000), b"XXXXXXXX"])
def test_what_is_no_file_of_torch_is_called_so(damage, tmp_path):
    """And no advice of PyTorch comes along, which would have the file executed."""
    write(tmp_path / "theirs", saved(tmp_path / "ours"), 1, 1)
    convert.export(Export(model=tmp_path / "ours", format="meta", out=tmp_path / "meta"))
    files = {
        "theirs": tmp_path / "theirs/iter_0000100/mp_rank_00" / FILE,
        "meta": tmp_path / "meta/consolidated.00.pth",
    }
    for name, file in files.items():
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"is no file of torch\.save: it begins|is an empty file") as error:
            imported(tmp_path / name, tmp_path / "back")
        assert "weights_only" not in str(error.value)


def test_files_that_are_missing_or_truncated_are_named(tmp_path):
    model = saved(tmp_path / "ours")
    write(tmp_path / "theirs", model, 2, 3)
    place = tmp_path / "theirs/iter_0000100"
    damaged = place / "mp_rank_01_001" / FILE
    damaged.write_bytes(damaged.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"mp_rank_01_001.* cannot be read as a PyTorch checkpoint"):
        imported(tmp_path / "theirs", tmp_path / "back")
    damaged.unlink()
    with pytest.raises(ValueError, match="lacks the file of TP rank 1 and PP stage 1; copy the whole checkpoint"):
        imported(tmp_path / "theirs", tmp_path / "back")


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    saved(tmp_path / "ours", n_kv_heads=2)
    options = {"model": tmp_path / "ours", "format": "megatron", "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="--tensor_parallel 4 does not divide the 2 key and value heads"):
        convert.export(Export(**options, tensor_parallel=4))
    with pytest.raises(ValueError, match="--pipeline_parallel 2 does not divide the 3 layers"):
        convert.export(Export(**options, pipeline_parallel=2))
    with pytest.raises(ValueError, match="--tensor_parallel 2 needs --format megatron"):
        Export(**options | {"format": "meta"}, tensor_parallel=2)
    config = json.loads((tmp_path / "ours/config.json").read_text())
    (tmp_path / "ours/config.json").write_text(json.dumps(config | {"sliding_window": 8, "model_type": "mistral"}))
    with pytest.raises(ValueError, match="stretches positions or has a window"):
        convert.export(Export(**options))

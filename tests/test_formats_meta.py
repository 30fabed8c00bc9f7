"""Meta's checkpoints: an independent model in Meta's manner computes the same, any number of ranks, odd widths."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from helpers.small_checkpoints import TOKENS, saved

import convert
from checkpoint.directory import load_model
from convert import Export, Import
from formats.meta import hidden_width, width_settings

KINDS = {
    "tied": {"vocab_size": 40},
    "untied": {"tie_embeddings": False, "n_kv_heads": 2},
    "llama3": {"rope_theta": 500000.0, "n_kv_heads": 2, "tie_embeddings": False},
}


def export(folder: Path, shards: int = 1, **options) -> Path:
    convert.export(Export(model=folder / "in", format="meta", out=folder / f"meta{shards}", shards=shards, **options))
    return folder / f"meta{shards}"


def back(meta: Path) -> torch.nn.Module:
    convert.import_(Import(source=meta, out=meta.with_name(f"{meta.name}-back")))
    return load_model(meta.with_name(f"{meta.name}-back"))


def meta_logits(state: dict, params: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Compute logits (T, V) as Meta's code does: pairs of neighbours turn as complex numbers (llama/model.py)."""

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * weight

    H, K = params["n_heads"], params["n_kv_heads"]
    x = state["tok_embeddings.weight"][tokens]
    T, dim = x.shape
    D = dim // H
    turns = torch.outer(torch.arange(T), params["rope_theta"] ** (-torch.arange(0, D, 2) / D))
    turns = torch.polar(torch.ones_like(turns), turns)[:, None]  # (T, 1, D/2)

    def turned(z):
        pairs = torch.view_as_complex(z.float().reshape(T, -1, D // 2, 2))
        return torch.view_as_real(pairs * turns).reshape(T, -1, D)

    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(params["n_layers"]):
        w = {name.removeprefix(f"layers.{i}."): each for name, each in state.items() if name.startswith(f"layers.{i}.")}
        y = norm(x, w["attention_norm.weight"])
        q, k, v = (y @ w[f"attention.{each}.weight"].T for each in ("wq", "wk", "wv"))
        q, k, v = turned(q.view(T, H, D)), turned(k.view(T, K, D)), v.view(T, K, D)
        k, v = (each.repeat_interleave(H // K, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(D)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -1e30).softmax(-1), v)
        x = x + mixed.reshape(T, dim) @ w["attention.wo.weight"].T
        y = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(y @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (y @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_model_in_metas_manner_computes_the_same(changes, tmp_path):
    model = saved(tmp_path / "in", **changes)
    folder = export(tmp_path)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    params = json.loads((folder / "params.json").read_text())
    # two programs in float32, three layers
    torch.testing.assert_close(meta_logits(state, params, TOKENS[0]), model(TOKENS[:1])[0], rtol=0, atol=5e-5)
    assert hidden_width(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")) == model.args.hidden_dim


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_with_any_number_of_ranks(changes, shards, dtype, tmp_path):
    if model_kv := changes.get("n_kv_heads"):
        assert model_kv % shards == 0
    model = saved(tmp_path / "in", dtype, **changes)
    folder = export(tmp_path, shards)
    assert len(list(folder.glob("consolidated.*.pth"))) == shards
    again = back(folder)
    assert again.args == model.args
    assert all(torch.equal(a, b) for a, b in zip(again.to(dtype).state_dict().values(), model.state_dict().values()))


def test_the_parts_of_a_rank_are_those_of_metas_layers(tmp_path):
    saved(tmp_path / "in", tie_embeddings=False)
    whole = torch.load(export(tmp_path) / "consolidated.00.pth", weights_only=True)
    parts = [torch.load(path, weights_only=True) for path in sorted(export(tmp_path, 2).glob("*.pth"))]
    for name, tensor in whole.items():
        if "norm" in name:
            assert torch.equal(parts[1][name], tensor)
            continue
        # VocabParallelEmbedding and RowParallelLinear split the columns, ColumnParallelLinear the rows
        axis = 1 if any(each in name for each in ("tok_embeddings", "attention.wo", "feed_forward.w2")) else 0
        assert torch.equal(torch.cat([part[name] for part in parts], axis), tensor)


@pytest.mark.parametrize(
    ("dim", "hidden", "known"),
    [(4096, 11008, (256, None)), (5120, 13824, (256, None)), (8192, 28672, (4096, 1.3)), (4096, 14336, (1024, 1.3))],
)
def test_the_published_widths(dim, hidden, known):
    multiple, factor = known
    assert hidden_width(dim, multiple, factor) == hidden  # 7B, 13B, 70B, Llama 3 8B


@pytest.mark.parametrize("dim", [32, 64, 160, 768, 4096])
def test_any_width_can_be_said(dim):
    for hidden in {1, 7, 40, 172, 1000, 1001, 2048, 14336, 3 * dim, 4 * dim + 1}:
        assert hidden_width(dim, *width_settings(dim, hidden)) == hidden


def test_what_a_params_json_leaves_out(tmp_path):
    saved(tmp_path / "in", tie_embeddings=False)
    folder = export(tmp_path)
    params = json.loads((folder / "params.json").read_text())
    old = {
        key: params[key] for key in ("dim", "n_layers", "n_heads", "multiple_of", "ffn_dim_multiplier") if key in params
    }
    for eps, theta, length in ((1e-6, None, 2048), (1e-5, None, 4096), (1e-5, 500000.0, 8192)):
        more = {"norm_eps": eps, "vocab_size": -1} | ({"rope_theta": theta} if theta else {})
        (folder / "params.json").write_text(json.dumps(old | more))
        convert.import_(Import(source=folder, out=tmp_path / f"out{length}"))
        args = load_model(tmp_path / f"out{length}").args
        assert (args.max_seq_len, args.rope_theta, args.vocab_size) == (length, theta or 10000.0, 40)
    (folder / "params.json").write_text(
        json.dumps(old | {"norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True})
    )
    convert.import_(Import(source=folder, out=tmp_path / "scaled"))
    assert load_model(tmp_path / "scaled").args.rope_scaling["rope_type"] == "llama3"


def test_what_is_wrong_is_one_sentence(tmp_path):
    saved(tmp_path / "in", tie_embeddings=False)
    with pytest.raises(ValueError, match="--shards 3 does not divide dim 32 and n_kv_heads 4"):
        export(tmp_path, 3)
    folder = export(tmp_path, 2)
    part = torch.load(folder / "consolidated.01.pth", weights_only=True)
    del part["norm.weight"]
    torch.save(part, folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"01\.pth does not belong to .*: one has norm\.weight and the other"):
        convert.import_(Import(source=folder, out=tmp_path / "out"))
    raw = (folder / "consolidated.00.pth").read_bytes()
    (folder / "consolidated.01.pth").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth cannot be read as PyTorch weights \(truncated"):
        convert.import_(Import(source=folder, out=tmp_path / "out"))

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it_ran",)

    (folder / "consolidated.01.pth").write_bytes(pickle.dumps({"norm.weight": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="is refused: it is a pickle that asks for"):
        convert.import_(Import(source=folder, out=tmp_path / "out"))
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="is not a whole model: it has other shapes"):
        convert.import_(Import(source=folder, out=tmp_path / "out"))
    (folder / "consolidated.02.pth").write_bytes(raw)
    with pytest.raises(FileNotFoundError, match=r"has consolidated\.02\.pth but not consolidated\.01\.pth: copy all"):
        convert.import_(Import(source=folder, out=tmp_path / "out"))
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"attention_bias": True}, "biases on q, k, v"),
        ({"qk_norm": True}, "qk_norm"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "stretched positions other than"),
    ],
)
def test_what_metas_code_does_not_compute_is_refused_by_name(changes, what, tmp_path):
    saved(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=f"has {what}.*, which Meta's code does not compute"):
        export(tmp_path)

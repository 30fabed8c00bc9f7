"""Files of torch.save from lit-gpt, llama2.c, baby-llama2 and minimind come in; nanoGPT's cannot, and says why."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from helpers.small_checkpoints import TOKENS, saved
from safetensors.torch import load_file

import convert
from checkpoint.directory import load_model
from convert import Import


def imported(source: Path, **flags):
    out = source.with_name(f"{source.name}-out")
    convert.import_(Import(source=source, out=out, **flags))
    return load_model(out)


def in_metas_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: neighbours turn together there, and halves of a head here."""
    D = weight.shape[0] // heads
    rows = [h * D + i + half * D // 2 for h in range(heads) for i in range(D // 2) for half in (0, 1)]
    return weight[rows]


META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def meta_state(model) -> dict[str, torch.Tensor]:
    own = model.state_dict()
    state = {"tok_embeddings.weight": own["model.embed_tokens.weight"], "norm.weight": own["model.norm.weight"]}
    state["output.weight"] = own["lm_head.weight"]
    for i in range(model.args.n_layers):
        for ours, theirs in META.items():
            weight = own[f"model.layers.{i}.{ours}.weight"]
            heads = {"attention.wq": model.args.n_heads, "attention.wk": model.args.n_kv_heads}.get(theirs)
            state[f"layers.{i}.{theirs}.weight"] = weight if heads is None else in_metas_order(weight, heads)
    return state


def lit_state(model, grouped: bool) -> dict[str, torch.Tensor]:
    names = {"self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2"}
    names |= {"mlp.down_proj": "mlp.proj", "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
    own, args = model.state_dict(), model.args
    state = {"transformer.wte.weight": own["model.embed_tokens.weight"], "lm_head.weight": own["lm_head.weight"]}
    state["transformer.ln_f.weight"] = own["model.norm.weight"]
    D, per = args.head_dim, args.n_heads // args.n_kv_heads
    for i in range(args.n_layers):
        for ours, theirs in names.items():
            state[f"transformer.h.{i}.{theirs}.weight"] = own[f"model.layers.{i}.{ours}.weight"]
        q, k, v = (own[f"model.layers.{i}.self_attn.{x}_proj.weight"].split(D) for x in "qkv")  # one matrix a head
        if grouped:
            order = [each for g in range(args.n_kv_heads) for each in (*q[g * per : (g + 1) * per], k[g], v[g])]
            state[f"transformer.h.{i}.attn.attn.weight"] = torch.cat(order)
        else:
            state[f"transformer.h.{i}.attn.qkv.weight"] = torch.cat([*q, *k, *v])
    return state


SHAPES = {"tied": {}, "grouped": {"n_kv_heads": 2, "tie_embeddings": False}, "one": {"n_kv_heads": 1}}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_baby_llama2_needs_the_number_of_heads(changes, tmp_path):
    model = saved(tmp_path / "in", **changes)
    torch.save({f"_orig_mod.{k}": v for k, v in meta_state(model).items()}, tmp_path / "epoch_0.pth")
    with pytest.raises(ValueError, match=r"does not say everything about its model: add --max_seq_len and --n_heads"):
        imported(tmp_path / "epoch_0.pth")
    got = imported(tmp_path / "epoch_0.pth", n_heads=4, max_seq_len=64)
    assert got.args == model.args and torch.equal(got(TOKENS), model(TOKENS))


def test_llama2_c_says_it_in_the_file(tmp_path, capsys):
    model = saved(tmp_path / "in", n_kv_heads=2)
    own = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "max_seq_len": 64}
    momenta = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
    content = {"model": meta_state(model), "optimizer": momenta, "model_args": own, "iter_num": 7}
    torch.save(content, tmp_path / "ckpt.pt")
    got = imported(tmp_path / "ckpt.pt")
    assert got.args == model.args and torch.equal(got(TOKENS), model(TOKENS))
    assert "with norm_eps 1e-05 and rope_theta 10000, which it does not say" in capsys.readouterr().err


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("grouped", [True, False], ids=["before 2025", "today"])
def test_lit_gpt(changes, grouped, tmp_path):
    model = saved(tmp_path / "in", **changes)
    folder = tmp_path / "lit"
    folder.mkdir()
    config = {"n_head": 4, "norm_eps": 1e-5, "rope_base": 10000, "block_size": 64, "rotary_percentage": 1.0}
    if grouped:
        (folder / "lit_config.json").write_text(json.dumps(config))
        torch.save({"model": lit_state(model, True)}, folder / "lit_model.pth")
    else:
        (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
        torch.save(lit_state(model, False), folder / "lit_model.pth")
    got = imported(folder)
    assert got.args == model.args and torch.equal(got(TOKENS), model(TOKENS))
    (folder / "model_config.yaml").write_text("n_head: 4\nrotary_percentage: 0.25\n")
    (folder / "lit_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"its settings have rotary_percentage 0\.25, which ours does not compute"):
        convert.import_(Import(source=folder, out=tmp_path / "never"))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "n_kv_heads": 2}], ids=["minimind 2", "minimind 3"])
def test_minimind(changes, tmp_path):
    model = saved(tmp_path / "in", torch.float16, norm_eps=1e-6, rope_theta=1e6, **changes)
    state = load_file(tmp_path / "in/model.safetensors")
    torch.save(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "full_sft_512.pth")
    flags = {} if changes else {"n_heads": 4}
    got = imported(tmp_path / "full_sft_512.pth", max_seq_len=64, **flags)
    assert got.args == model.args
    assert all(torch.equal(a.half(), b) for a, b in zip(got.state_dict().values(), model.state_dict().values()))


def test_what_is_no_llama_says_why(tmp_path):
    one = torch.ones(2, 2)
    torch.save({"model": {"transformer.wte.weight": one, "transformer.wpe.weight": one}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"is a GPT-2 of nanoGPT, with learnt absolute positions \(transformer\.wpe\)"):
        imported(tmp_path / "a.pt")
    torch.save({"bert.embeddings": one}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"no program that is known here \(lit-gpt, .*\): it has bert\.embeddings"):
        imported(tmp_path / "b.pt")
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        imported(tmp_path / "c.pt")


def test_a_pickle_that_wants_to_execute_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it_ran",)

    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="is refused: it is a pickle that asks for"):
        imported(tmp_path / "x.pth")
    assert not (tmp_path / "it_ran").exists()


def test_tensors_that_are_left_over_or_do_not_fit_are_named(tmp_path):
    model = saved(tmp_path / "in")
    state = meta_state(model)
    torch.save(state | {"layers.0.attention.extra.weight": torch.ones(3)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"no place in a model of the LLaMA family: layers\.0\.attention\.extra"):
        imported(tmp_path / "more.pth", n_heads=4, max_seq_len=64)
    del state["layers.2.feed_forward.w2.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"it lacks model\.layers\.2\.mlp\.down_proj\.weight"):
        imported(tmp_path / "less.pth", n_heads=4, max_seq_len=64)
    with pytest.raises(ValueError, match="q has 32 rows and k 32, and 3 heads do not fit: see --n_heads"):
        imported(tmp_path / "less.pth", n_heads=3, max_seq_len=64)
    with pytest.raises(ValueError, match="--n_heads has no effect with a Hugging Face directory, which says so itself"):
        imported(tmp_path / "in", n_heads=4)

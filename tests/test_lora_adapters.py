"""What adapters do to a model: where it starts, what trains, switching, merging; and what is refused.

PEFT is the oracle of the formulas (test_lora_peft.py); here they are written out once more, the dumbest way.
"""

import copy
import re

import pytest
import torch
from helpers.lora_models import our_model, shake, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from checkpoint import peft
from lora import adapters
from lora.adapters import LoraArgs, LoraSpec

LAYERS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


def adapted(method: str = "lora", tied: bool = False, **args):
    model = our_model(tied)
    adapters.apply(model, LoraArgs(method, **{"r": 3} | args))
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- the frozen base


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_base_in_the_dtype_of_the_products_changes_no_bit(method, tied):
    base, tokens, found = our_model(tied).float(), some_tokens(), []
    for layer in (m for m in base.modules() if isinstance(m, nn.Linear)):
        layer.weight.data = layer.weight.bfloat16().float()  # DoRA's lengths are of what is kept
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(base)
        torch.manual_seed(1)
        adapters.apply(model, LoraArgs(method, r=3, train_embed_norm=True), dtype)
        shake(model)
        model.compute_dtype = torch.bfloat16
        loss, _ = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
        kept = {m.weight.dtype for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"}
        assert kept == {dtype} and model.lm_head.weight.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_base_is_never_kept_wider_nor_that_of_pissa_narrower():
    for method, kept, dtype in [("lora", torch.bfloat16, torch.float32), ("pissa", torch.float32, torch.bfloat16)]:
        model = our_model().to(kept)
        adapters.apply(model, LoraArgs(method, r=3), dtype)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == kept


# ---- formulas


def by_hand(method: str, weight: torch.Tensor, adapter: nn.Module, r: int, alpha: float) -> torch.Tensor:
    """The weight (out, in) that an adapted linear layer stands for, entry by entry."""
    gamma = alpha / (r**0.5 if method == "rslora" else r)
    A, B = adapter.lora_A, adapter.lora_B
    out = torch.empty_like(weight)
    for i in range(weight.shape[0]):
        row = [weight[i, j] + gamma * sum(B[i, k] * A[k, j] for k in range(r)) for j in range(weight.shape[1])]
        length = sum(x * x for x in row) ** 0.5
        out[i] = torch.stack(row) * (adapter.lora_magnitude_vector[i] / length if method == "dora" else 1)
    return out


@settings(max_examples=20, deadline=None)
@given(
    method=st.sampled_from(["lora", "rslora", "dora"]),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    r=st.integers(1, 4),
    alpha=st.floats(0.5, 32),
    bias=st.booleans(),
)
@torch.no_grad()
def test_against_every_entry_written_out(method, sizes, r, alpha, bias):
    layer = nn.Linear(*sizes, bias=bias).double()
    model = nn.ModuleDict({"layer": layer})
    r = min(r, *sizes)
    adapters.inject(model, LoraSpec(r, alpha, targets=("layer",), **adapters.METHODS[method]))
    shake(model)
    x = torch.randn(5, sizes[0], dtype=torch.float64)
    wanted = by_hand(method, layer.weight, layer.lora["default"], r, alpha)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, wanted, layer.bias), rtol=1e-10, atol=1e-10)
    adapters.merge(model)  # with the scaling, and B before A
    torch.testing.assert_close(model["layer"].weight, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_training_starts_at_the_model_itself(method, dtype):
    model = our_model(attention_bias=True).to(dtype)
    tokens = some_tokens()
    before = model(tokens)
    adapters.apply(model, LoraArgs(method, r=3, targets="attention,mlp,head"))
    assert torch.equal(model(tokens), before)


def test_pissa_starts_at_the_model_but_for_rounding_and_holds_its_main_directions():
    model = our_model()
    tokens = some_tokens()
    before, weight = model(tokens), model.model.layers[0].self_attn.q_proj.weight.clone()
    adapters.apply(model, LoraArgs("pissa", r=3))
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-10)
    layer = model.model.layers[0].self_attn.q_proj
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(layer.lora["default"].delta())[:3], singular[:3])
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight)[0], singular[3])
    shake(model)
    with adapters.disabled(model):  # the model that it was, not what the adapter left of it
        torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-10)


def test_dropout_acts_on_the_low_rank_path_in_training_alone():
    for method in ("lora", "dora"):
        model = adapted(method, dropout=0.5, targets="attention,mlp")
        tokens = some_tokens()
        untrained = model.train()(tokens)
        assert torch.equal(untrained, model.eval()(tokens))  # B is 0: what is dropped counts for nothing
        shake(model)
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        assert not torch.equal(model(tokens), model(tokens))


def test_the_loss_sees_an_adapted_head():
    """It is made from the weight of the head, without calling it."""
    model = adapted(targets="head", r=4)
    shake(model)
    tokens = some_tokens()
    loss, _ = model(tokens, tokens)
    wanted = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(loss, wanted)
    with adapters.disabled(model):
        assert abs(model(tokens, tokens)[0] - loss) > 1e-3


# ---- what trains


@pytest.mark.parametrize("base", ["full", "int8"])
def test_exactly_the_expected_parameters_train(base):
    blocks = [f"model.layers.{i}." for i in range(2)]
    attention = [f"{block}self_attn.{name}" for block in blocks for name in LAYERS[:4]]
    both = {f"{path}.lora.default.lora_{ab}" for path in attention for ab in "AB"}
    model = adapted(targets="attention", base=base)
    assert trainable(model) == both
    magnitudes = {f"{path}.lora.default.lora_magnitude_vector" for path in attention}
    assert trainable(adapted("dora", targets="attention", base=base)) == both | magnitudes
    norms = {f"{block}{name}layernorm.weight" for block in blocks for name in ("input_", "post_attention_")}
    extra = norms | {"model.norm.weight", "model.embed_tokens.weight"}
    assert trainable(adapted(targets="attention", base=base, train_embed_norm=True)) == both | extra
    tied = adapted(targets="attention", base=base, train_embed_norm=True, tied=True)
    assert trainable(tied) == both | extra and tied.lm_head.weight is tied.model.embed_tokens.weight
    tokens = some_tokens()
    loss, _ = tied(tokens, tokens)
    loss.backward()
    assert {name for name, p in tied.named_parameters() if p.grad is not None} == trainable(tied)


@pytest.mark.parametrize(
    "targets, layers",
    [
        ("mlp", LAYERS[4:]),
        ("linear", LAYERS),
        ("q_proj, up_proj", ("q_proj", "up_proj")),
        ("linear,head", (*LAYERS, "lm_head")),
        (r".*\.1\..*(k|gate)_proj", ("k_proj", "gate_proj")),
        ("embedding", ("embed_tokens",)),
    ],
)
def test_targets(targets, layers):
    model = adapted(targets=targets)
    found = {path for path, module in model.named_modules() if isinstance(getattr(module, "lora", None), nn.Module)}
    assert {path.rpartition(".")[2] for path in found} == set(layers)
    per_block = 1 if ".1" in targets else 2
    assert len(found) == sum(1 if name in ("lm_head", "embed_tokens") else per_block for name in layers)


def test_the_share_that_trains_counts_the_model_without_its_adapters():
    total = our_model().n_parameters()
    for args in ({}, {"train_embed_norm": True}, {"base": "int8"}):
        model = adapted(targets="q_proj", **args)
        own = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert adapters.describe(model) == f"{own:,} parameters train, {own / total:.2%} of the model's {total:,}"


# ---- several adapters


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_loaded_switched_and_switched_off(tied, tmp_path):
    base = our_model(tied)
    tokens = some_tokens()
    wanted = {None: base(tokens)}
    kinds = {"a": LoraArgs("lora", r=2), "b": LoraArgs("dora", r=3, targets="mlp", train_embed_norm=True)}
    for name, args in kinds.items():
        model = copy.deepcopy(base)
        adapters.apply(model, args)
        shake(model)
        wanted[name] = model(tokens)
        peft.save(tmp_path / name, model)
    model = copy.deepcopy(base)
    for name in kinds:
        peft.load(model, tmp_path / name, name)
        assert adapters.active(model) == name and torch.equal(model(tokens), wanted[name])
    for name in ("a", None, "b", "a"):
        adapters.set_active(model, name)
        assert torch.equal(model(tokens), wanted[name])
        with adapters.disabled(model):
            assert torch.equal(model(tokens), wanted[None])
            loss = model(tokens, tokens)[0]
        assert torch.equal(model(tokens), wanted[name]) and adapters.active(model) == name
        assert torch.equal(base(tokens, tokens)[0], loss)
    assert not any("lora" in name for name in trainable(model))  # what is loaded is to be used
    peft.load(model, tmp_path / "b", "c", trainable=True)
    assert all(".c." in name or "lora" not in name for name in trainable(model)) and torch.equal(
        model(tokens), wanted["b"]
    )


# ---- merging


@pytest.mark.parametrize(
    "args", [{}, {"method": "dora", "train_embed_norm": True}, {"method": "pissa"}, {"base": "int8"}]
)
def test_merging_and_back(args):
    model = adapted(**{"targets": "attention,mlp,head"} | args if args.get("method") != "pissa" else args)
    shake(model)
    tokens = some_tokens()
    before, state = model(tokens), copy.deepcopy(model.state_dict())
    adapters.merge(model)
    # what was quantized becomes float32, and the rest is float64
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-5 if "base" in args else 1e-10)
    for again in (
        adapters.merge,
        lambda m: adapters.set_active(m, None),
        lambda m: adapters.inject(m, LoraSpec(), "b"),
    ):
        with pytest.raises(ValueError, match="merged"):
            again(model)
    adapters.unmerge(model)
    assert torch.equal(model(tokens), before)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="no adapter is merged"):
        adapters.unmerge(model)
    adapters.set_active(model, None)
    with pytest.raises(ValueError, match="nothing to merge"):
        adapters.merge(model)


def test_in_bfloat16_the_sum_is_made_in_float32_and_unmerging_is_exact():
    model = our_model().bfloat16()
    adapters.apply(model, LoraArgs("lora", r=3))
    shake(model)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.clone()
    exact = (before.float() + 16 / 3 * layer.lora["default"].lora_B @ layer.lora["default"].lora_A).bfloat16()
    adapters.merge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact)
    adapters.unmerge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model = adapted("pissa")
    shake(model)
    before = copy.deepcopy(model.state_dict())
    peft.save(tmp_path, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    other = copy.deepcopy(model)
    shake(other)
    peft.restore(other, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_gradient_checkpointing_reaches_the_first_layer():
    tokens = some_tokens()
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted("dora")
        shake(model)
        model.gradient_checkpointing = checkpointing
        model(tokens, tokens)[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


# ---- NEFTune


def test_neftune_in_training_alone():
    embedding = nn.Embedding(50, 16)
    ids = torch.randint(0, 50, (4, 32))
    plain = embedding(ids)
    adapters.neftune(embedding, 5.0)
    assert torch.equal(embedding.eval()(ids), plain)
    noise = embedding.train()(ids) - plain
    limit = 5 / (32 * 16) ** 0.5
    assert 0.98 * limit < noise.abs().max() <= limit * 1.001 and abs(noise.mean()) < 0.05 * limit
    with pytest.raises(ValueError, match="neftune_alpha should be 0 or more, and finite, found -1"):
        adapters.neftune(embedding, -1.0)


# ---- what is refused, before anything is changed


@pytest.mark.parametrize(
    "args, message",
    [
        ({"targets": "c_attn"}, r"no layer matches the target 'c_attn'.* called .*, q_proj, up_proj"),
        ({"targets": r".*\.9\..*"}, r"no layer matches the target '\.\*"),
        ({"targets": "(q_proj"}, r"neither names nor a regular expression"),
        ({"targets": ""}, r"--lora.targets should name layers, such as attention,mlp, found none"),
        (
            {"r": 17, "targets": "mlp,k_proj"},
            r"--lora.r 17 is larger than the smaller side of model.*k_proj, which is \(16, 24\)",
        ),
        ({"targets": "embedding", "tied": True}, r"model\.embed_tokens and lm_head are one tied matrix"),
        ({"targets": "embedding,head", "tied": True}, r"are one tied matrix.*train_embed_norm"),
        ({"targets": "embedding", "method": "dora"}, r"model\.embed_tokens is an embedding: leave it out"),
        ({"targets": "head", "dropout": 0.1}, r"the loss reads the weight of lm_head: .* cannot have dropout"),
    ],
)
def test_refused(args, message):
    args = {"method": "lora", "r": 2, **args}
    model = our_model(args.pop("tied", False))
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        adapters.apply(model, LoraArgs(**args))
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "args, message",
    [
        ({"method": "vera"}, "--lora.method should be one of none, lora, rslora, dora, pissa, found 'vera'"),
        ({"method": "lora", "r": 0}, "--lora.r should be at least 1, found 0"),
        ({"method": "lora", "alpha": 0}, "--lora.alpha should be above 0 and finite, found 0"),
        ({"method": "lora", "dropout": 1.0}, r"--lora.dropout should lie in [0, 1), found 1.0"),
    ],
)
def test_arguments_that_make_no_sense(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LoraArgs(**args)


def test_names_of_adapters():
    model = adapted()
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        adapters.inject(model, LoraSpec(2))
    for name in ("base", "a.b", ""):
        with pytest.raises(ValueError, match="an adapter's name should be a word other than 'base'"):
            adapters.inject(model, LoraSpec(2), name)
    with pytest.raises(ValueError, match="no adapter 'poet'; it has default"):
        adapters.set_active(model, "poet")
    with pytest.raises(ValueError, match="a pissa adapter changes the base weights: no other can be used with it"):
        adapters.inject(model, LoraSpec(2, pissa=True), "b")


def test_attention_and_mlp_mean_the_layers_that_a_model_has():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**shape, intermediate_size=32, max_position_embeddings=32)
    model = transformers.GPTNeoXForCausalLM(config)
    adapters.apply(model, LoraArgs("lora", r=2, targets="attention,mlp"))
    ends = {name.rpartition(".lora.")[0].rpartition(".")[2] for name in trainable(model)}
    assert ends == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_a_matrix_that_is_no_linear_layer_is_refused_by_name():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 40, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D; adapters are made for Linear"):
        adapters.apply(model, LoraArgs("lora", targets="c_attn"))
    with pytest.raises(ValueError, match="no layer matches the target 'linear'"):
        adapters.apply(model, LoraArgs("lora", targets="linear"))

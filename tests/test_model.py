"""The LLaMA module against transformers on copied weights, and against a float64 brute force."""

import json

import pytest
import torch
from helpers import llama_reference as reference

import rope
from checkpoint import config_json
from checkpoint.directory import load_model
from dataset import IGNORE
from model import Transformer
from model_args import ModelArgs

transformers = pytest.importorskip("transformers")

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 53, "multiple_of": 8, "max_seq_len": 64}
VARIANTS = {
    "mha tied": {},
    "mha untied": {"tie_embeddings": False},
    "gqa tied": {"n_kv_heads": 2},
    "gqa untied": {"n_kv_heads": 2, "tie_embeddings": False},
    "mqa": {"n_kv_heads": 1},
    "wide heads": {"n_kv_heads": 2, "head_dim": 14, "tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-6},
    "qwen2 bias": {"n_kv_heads": 2, "attention_bias": True},
    "qwen3 qk_norm": {"n_kv_heads": 2, "qk_norm": True, "head_dim": 12},
    "mistral window": {"n_kv_heads": 2, "sliding_window": 3, "tie_embeddings": False},
}


def lively(model: Transformer, std: float = 0.2) -> Transformer:
    """Weights large enough for attention, norms and biases all to matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(std * noise + (parameter.dim() == 1))
    return model


def small(**changes) -> Transformer:
    return lively(Transformer(ModelArgs(**SHAPE | changes)))


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def peer_of(model: Transformer) -> torch.nn.Module:
    """transformers' model of the same `config.json`, with the same weights under the same names."""
    config = transformers.AutoConfig.for_model(**config_json.write(model.args), attn_implementation="eager")
    peer = transformers.AutoModelForCausalLM.from_config(config)
    assert type(peer).__name__ == config_json.write(model.args)["architectures"][0]
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer


# ---- against transformers


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("B, T", [(3, 8), (1, 13), (2, 1)])
def test_logits_and_gradients_equal_transformers(changes, B, T):
    model = small(**changes)
    peer = peer_of(model)
    tokens, targets = random_tokens(B, T), random_tokens(B, T, seed=1)
    theirs = peer(tokens).logits
    # float32 with another order of sums and angles rounded elsewhere; logits are of size 10, gradients up to 5
    torch.testing.assert_close(model(tokens), theirs, atol=1e-5, rtol=1e-5)
    loss, count = model(tokens, targets)
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="sum")
    assert count.item() == B * T
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (loss / count).backward()
    (expected / count).backward()
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_state_dict_goes_both_ways_without_renaming(changes):
    model = small(**changes)
    peer = peer_of(model)
    again = Transformer(model.args)
    again.load_state_dict(peer.state_dict(), strict=True)
    assert torch.equal(again(random_tokens(1, 5)), model(random_tokens(1, 5)))


def test_real_model(shared):
    model = load_model(shared / "models" / "stories260K_hf")
    expected = json.loads((shared / "models" / "stories260K_expected.json").read_text())
    with torch.no_grad():
        for case in expected["logits"]:
            logits = model(torch.tensor([case["prompt_ids"]]))[0, -1]
            # the file keeps five decimals
            torch.testing.assert_close(logits[case["top10_ids"]], torch.tensor(case["top10_logits"]), atol=5e-5, rtol=0)
            assert logits.sum().item() == pytest.approx(case["logit_sum"], abs=1e-2)
        for case in expected["greedy"]:
            ids = torch.tensor([case["ids"]])
            n = len(case["prompt_ids"])
            assert ids[0, :n].tolist() == case["prompt_ids"]
            # the argmax after each prefix is the next id: greedy decoding, in one forward pass
            assert model(ids)[0, n - 1 : -1].argmax(-1).tolist() == case["ids"][n:]


# ---- against the brute force in float64


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_equal_brute_force(changes, monkeypatch):
    monkeypatch.setattr(rope, "cos_sin", reference.exact_cos_sin)
    model = small(**changes).double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    tokens, targets = random_tokens(2, 7), random_tokens(2, 7, seed=1)
    expected = torch.stack([reference.logits(model.args, weights, row.tolist()) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, atol=1e-10, rtol=0)
    model(tokens, targets)[0].backward()
    (expected.logsumexp(-1) - expected.gather(-1, targets[..., None])[..., 0]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-10, rtol=0)


def packed(lengths: list[list[int]], T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """doc_ids int32 and positions int64, (rows, T), of documents of these lengths; padding is document -1."""
    doc_ids, positions = torch.full((len(lengths), T), -1, dtype=torch.int32), torch.zeros(len(lengths), T).long()
    for row, sizes in enumerate(lengths):
        at = 0
        for i, n in enumerate(sizes):
            doc_ids[row, at : at + n], positions[row, at : at + n] = i, torch.arange(n)
            at += n
    return doc_ids, positions


LENGTHS = [[4, 1, 6], [11], [1, 1, 8]]  # the last row has one token of padding


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_packed_documents_equal_separate_ones(changes):
    model = small(**changes).double()
    tokens, targets = random_tokens(3, 11), random_tokens(3, 11, seed=1)
    weights = torch.rand(3, 11, generator=torch.Generator().manual_seed(2))
    doc_ids, positions = packed(LENGTHS, 11)
    targets[doc_ids < 0] = IGNORE
    names = [name for name, _ in model.named_parameters()]
    loss, count = model(tokens, targets, positions=positions, doc_ids=doc_ids, loss_weights=weights)
    together = torch.autograd.grad(loss, list(model.parameters()))
    apart, total = [torch.zeros_like(p) for p in model.parameters()], 0.0
    logits = model(tokens, positions=positions, doc_ids=doc_ids)
    for row in range(3):
        for i in range(len(LENGTHS[row])):
            mine = doc_ids[row] == i
            torch.testing.assert_close(logits[row, mine], model(tokens[row, mine][None])[0], atol=1e-12, rtol=0)
            alone = model(tokens[row, mine][None], targets[row, mine][None], loss_weights=weights[row, mine][None])[0]
            total += alone.item()
            apart = [a + g for a, g in zip(apart, torch.autograd.grad(alone, list(model.parameters())))]
    assert count.item() == sum(map(sum, LENGTHS))
    assert loss.item() == pytest.approx(total, rel=1e-12)
    for name, a, b in zip(names, together, apart):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_leaks_between_documents(dtype):
    model = small(n_kv_heads=2)
    model.compute_dtype = dtype  # bfloat16 takes the other attention back-end
    seen = {}

    def keep(module, inputs, output):
        seen["embeddings"] = output
        output.retain_grad()

    model.model.embed_tokens.register_forward_hook(keep)
    doc_ids, positions = packed([[4, 7]], 11)
    targets = random_tokens(1, 11)
    targets[doc_ids == 0] = IGNORE  # the loss of the second document alone
    model(random_tokens(1, 11), targets, positions=positions, doc_ids=doc_ids)[0].backward()
    grad = seen["embeddings"].grad[0]
    assert (grad[:4] == 0).all()
    assert (grad[4:].abs().amax(-1) > 0).all()


def test_the_future_is_hidden():
    model = small(n_kv_heads=2)
    tokens = random_tokens(1, 9)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 53
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] != b[:, 5:]).any(-1).all()


def test_positions_shift_without_effect_and_matter_when_they_spread():
    model = small().double()
    tokens = random_tokens(2, 6)
    plain = model(tokens)
    shifted = model(tokens, positions=torch.arange(100, 106)[None])
    torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=0)  # float32 angles
    assert (model(tokens, positions=3 * torch.arange(6)[None]) - plain).abs().max() > 0.1
    by_row = torch.stack((torch.arange(6), 3 * torch.arange(6)))
    torch.testing.assert_close(model(tokens, positions=by_row)[0], plain[0], atol=1e-12, rtol=0)


# ---- precision


def test_bfloat16_model_keeps_exact_angles():
    """Rounded to bfloat16 (8 bits), frequencies turn position 4000 by radians. Attention to a far token shows it."""
    model = lively(Transformer(ModelArgs(**SHAPE | {"n_layers": 1, "head_dim": 16})), std=0.4).bfloat16()
    tokens = random_tokens(4, 8)
    positions = torch.tensor([[0, 801, 1603, 2400, 3200, 3601, 4001, 4095]])
    exact = Transformer(model.args)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})

    def error() -> float:
        expected = exact(tokens, positions=positions)
        return ((model(tokens, positions=positions) - expected).norm() / expected.norm()).item()

    assert error() < 0.02  # the rounding of activations
    inv_freq, _ = model.rope.frequencies(0)
    model.rope = rope.fixed(torch.tensor(inv_freq).bfloat16().tolist())  # as a castable buffer would be
    assert error() > 0.1


def test_bfloat16_activations_over_float32_parameters():
    model = small(n_kv_heads=2)
    tokens, targets = random_tokens(4, 16), random_tokens(4, 16, seed=1)
    exact, _ = model(tokens, targets)
    exact.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.compute_dtype = torch.bfloat16
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert model(tokens).dtype == torch.float32
    loss, _ = model(tokens, targets)
    loss.backward()
    assert seen == [torch.bfloat16] * 2
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        # eight bits a number, over two layers
        assert (p.grad - expected[name]).norm() < 0.05 * expected[name].norm(), name


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(compute_dtype):
    model = small(n_kv_heads=2)
    model.compute_dtype = compute_dtype
    doc_ids, positions = packed(LENGTHS, 11)
    calls, grads = [], []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.gradient_checkpointing in (False, True):
        loss, _ = model(random_tokens(3, 11), random_tokens(3, 11, seed=1), positions=positions, doc_ids=doc_ids)
        grads.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(calls) == 3  # the second time once more, on the way back
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- initialisation and size


@pytest.mark.parametrize("tie", [True, False])
def test_initialisation(tie):
    torch.manual_seed(0)
    shape = {"dim": 256, "n_layers": 8, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1000, "tie_embeddings": tie}
    model = Transformer(ModelArgs(**shape, attention_bias=True))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            writes_to_the_stream = "o_proj" in name or "down_proj" in name
            expected = 0.02 / 4 if writes_to_the_stream else 0.02  # sqrt(2 * 8) = 4
            assert p.std().item() == pytest.approx(expected, rel=0.03), name  # at least 32 k samples: 0.4 % each
            assert abs(p.mean().item()) < expected * 0.03
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    tokens = torch.randint(1000, (4, 32))
    loss, count = model(tokens, torch.randint(1000, (4, 32)))
    assert (loss / count).item() == pytest.approx(torch.tensor(1000.0).log().item(), abs=0.15)


@pytest.mark.parametrize(
    "shape, expected",  # published sizes
    [
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "multiple_of": 256}, 6_738_415_616),
        (
            {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "vocab_size": 32000}
            | {"multiple_of": 4096, "ffn_dim_multiplier": 1.3},
            68_976_648_192,
        ),
        (
            {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": 32000, "hidden_dim": 5632},
            1_100_048_384,
        ),
    ],
    ids=["7B", "70B", "TinyLlama"],
)
def test_number_of_parameters(shape, expected):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**shape, tie_embeddings=False))
    assert model.n_parameters() == expected


def test_tied_parameters_count_once():
    model = small()
    distinct = {p.data_ptr(): p.numel() for p in model.state_dict(keep_vars=True).values()}
    assert model.n_parameters() == sum(distinct.values())

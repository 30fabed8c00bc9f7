"""Parameters, saved tensors, states, caches and quantized weights: the formulas against what is really there."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attention import backends
from lora import adapters
from lora.adapters import LoraArgs
from model import Transformer
from model_args import ModelArgs
from optim.args import OPTIMIZERS, OptimArgs
from optim.optimizers import build_optimizer
from planning import memory
from planning.memory import Adapter, Step
from planning.shapes import PUBLISHED
from quant.replace import quantize_base
from training.flops import train_flops_per_token

SHAPES = {
    "grouped, tied": ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=500, hidden_dim=176),
    "wide heads, biases, untied": ModelArgs(
        dim=48, n_layers=2, n_heads=2, head_dim=32, vocab_size=300, tie_embeddings=False, attention_bias=True
    ),
    "one key head, qk_norm": ModelArgs(dim=64, n_layers=1, n_heads=8, n_kv_heads=1, vocab_size=300, qk_norm=True),
}
ROWS, LENGTH = 3, 40


@pytest.mark.parametrize(
    "name, total",
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("tinyllama", 1_100_048_384),
        ("llama3-8b", 8_030_261_248),
        ("llama3-405b", 405_853_388_800),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-8b", 8_190_735_360),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_models_have_their_published_number_of_parameters(name, total):
    """Those on the cards of the models (numel() of their weights)."""
    assert sum(memory.parameters(PUBLISHED[name]).values()) == PUBLISHED[name].n_parameters() == total


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_parts_are_those_of_the_model(shape):
    model = Transformer(shape)
    counted = dict.fromkeys(memory.parameters(shape), 0)
    for name, p in model.named_parameters():
        kinds = {"norm": "norms", "attn": "attention", "mlp": "feed-forward", "embed": "embedding", "head": "head"}
        counted[next(part for key, part in kinds.items() if key in name)] += p.numel()
    assert counted == memory.parameters(shape)


def saved_by_autograd(model: Transformer) -> int:
    """The bytes of all storages that a forward pass with its loss keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held: its address is not used again
        return tensor

    tokens = torch.randint(0, model.args.vocab_size, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("adapter", [None, Adapter(r=4)], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_what_autograd_saves_is_predicted_to_the_byte(shape, adapter):
    for dtype, fused, again in itertools.product(("fp32", "bf16"), (True, False), (True, False)):
        model, wanted = Transformer(shape), torch.bfloat16 if dtype == "bf16" else torch.float32
        if adapter is not None:
            adapters.apply(model.to(wanted), LoraArgs("lora", r=adapter.r))
        model.compute_dtype, model.gradient_checkpointing = wanted, again
        step = Step(ROWS, LENGTH, dtype, checkpointing=again, fused=fused, adapter=adapter)
        with backends.use("sdpa" if fused else "reference"):
            assert saved_by_autograd(model) == memory.saved_bytes(shape, step), step


def tensors(state: dict) -> list[torch.Tensor]:
    """The tensors of a state, at any depth, without counters of steps and the shared tables of 8-bit numbers."""
    inside = [each for value in state.values() if isinstance(value, dict) for each in tensors(value)]
    own = {name: value for name, value in state.items() if torch.is_tensor(value) and value.dim()}
    return inside + [value for name, value in own.items() if not name.startswith("qmap")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_states_of_a_step_have_the_predicted_size(shape, optimizer):
    model = Transformer(shape)
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    states = build_optimizer(model, OptimArgs(optimizer, galore_rank=24))
    tokens = torch.randint(0, shape.vocab_size, (1, 8))
    model(tokens, tokens)[0].backward()
    states.step()
    kept = [x for part in states.parts for state in part.state.values() for x in tensors(state)]
    parts = memory.training(shape, Step(optimizer=optimizer, galore_rank=24))
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert parts["optimizer"] == sum(x.nbytes for x in kept)  # without AdamW's counters of steps, 4 bytes each


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_adapters_and_their_base_have_the_predicted_size(shape):
    model = Transformer(shape).bfloat16()
    adapters.apply(model, LoraArgs("lora", r=5))
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.trained(shape, Adapter(r=5)) == found
    parts = memory.training(shape, Step(adapter=Adapter(r=5)))
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("kind, within", [("int8", 0.0), ("nf4", 0.02)])
def test_quantized_weights_have_the_predicted_size(kind, within):
    """nf4: the scales of a layer are quantized in blocks of 256, of which the last is rarely full."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    shape = ModelArgs(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=300, hidden_dim=512)
    model = Transformer(shape).bfloat16()
    quantize_base(model, kind)
    found = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    assert memory.stored(shape, kind) == pytest.approx(found, rel=within)


@pytest.mark.parametrize("kind, cache", [("fp32", "static"), ("int8", "int8")])
def test_a_cache_has_the_predicted_size(kind, cache):
    shape = SHAPES["grouped, tied"]
    made = Transformer(shape).make_cache(2, 256, cache)
    made.reserve(256)
    found = sum(getattr(made, name).nbytes for name in made.stored)
    assert 2 * 256 * memory.cache_per_token(shape, kind) == found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_operations_of_training_are_those_that_torch_counts(shape):
    model = Transformer(shape)
    with backends.use("reference"), FlopCounterMode(display=False) as counter:
        model.logits(model.hidden(torch.zeros(2, 16, dtype=torch.int64))).sum().backward()
    assert counter.get_total_flops() == 32 * train_flops_per_token(shape, 16)


def test_the_most_rows_that_fit_are_the_most():
    shape, step = PUBLISHED["tinyllama"], Step(seq_len=512)
    most = memory.largest_rows(shape, step, 60e9)
    sizes = [sum(memory.training(shape, Step(rows, 512)).values()) for rows in (most, most + 1)]
    assert sizes[0] <= 60e9 < sizes[1]
    assert memory.largest_rows(shape, step, 1e9) == 0 and memory.largest_rows(shape, step, 1e15, 100) == 100


def test_decoding_reads_all_weights_once_for_all_rows():
    shape = PUBLISHED["llama2-7b"]
    weights = memory.stored(shape, "bf16")
    assert weights == 2 * 6_738_415_616
    read = weights - 2 * 32000 * 4096  # the embedding is looked up
    assert memory.decoding_rate(shape, weights, 0, 1e12, 1e18) == pytest.approx(1e12 / read)
    cache = 2**31  # 4096 tokens of 2 x 32 layers x 4096 numbers of 2 bytes
    assert memory.cache_per_token(shape) * 4096 == cache
    assert memory.decoding_rate(shape, weights, cache, 1e12, 1e18, rows=8) == pytest.approx(8e12 / (read + 8 * cache))
    few = memory.decoding_rate(shape, weights, 0, 1e12, 1e12, rows=1000)  # then the products take the time
    assert few == pytest.approx(1e12 / (2 * (6_738_415_616 - 32000 * 4096 - 65 * 4096)))

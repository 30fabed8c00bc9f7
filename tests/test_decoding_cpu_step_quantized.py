"""The compiled decoding step on quantized weights, against the forward pass in float64 of what the codes stand for."""

import copy
import random

import pytest
import torch
from torch import nn

from decoding import cpu_step, cpu_weights
from model import Transformer
from quant.bitnet import PackedBitLinear
from quant.four_bit import FourBitLinear
from quant.gptq import solve_nearest
from quant.grid import GridOptions
from quant.grouped import GroupedLinear
from quant.int8 import W8A8Linear
from quant.llm_int8 import LLMInt8Linear
from quant.replace import base_layers, replace
from tests.test_decoding_cpu_step import make, plain_step, stepper

WIDE = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "hidden_dim": 384}


def quantized(model: Transformer, bits: int, group_size: int) -> tuple[Transformer, Transformer]:
    """Return a quantized copy, and a model in float64 with the weights that its codes, and its head in 8 bits, stand
    for."""
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for path, layer in base_layers(model):
        grid = solve_nearest(layer.weight.detach().float(), GridOptions(bits, group_size, search=False))
        replace(ours, path, GroupedLinear(ours.get_submodule(path), grid, bits))
        exact.get_submodule(path).weight.data = grid.dequantize().double()
    weight = cpu_weights.in_8_bits(model.lm_head).dequantize().double()
    exact.lm_head.weight = nn.Parameter(weight)  # its own, where the model's is the embedding
    return ours.eval(), exact.eval()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 4e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_a_step_is_the_forward_pass_of_what_the_codes_stand_for(bits, group_size, dtype, most):
    """The inputs of products are rounded to 16 bits, 1.5e-5 of the largest of a block; bfloat16 has 8 bits in keys and
    values."""
    ours, exact = quantized(make(dtype, attention_bias=True, qk_norm=True, **WIDE), bits, group_size)
    cache, exact_cache = ours.make_cache(3), exact.make_cache(3)
    step, draw = stepper(ours, cache), random.Random(0)
    for position in range(6):
        ids = draw.choices(range(101), k=3)
        truth = plain_step(exact, exact_cache, ids, [position] * 3)
        found = step([[i] for i in ids], [position] * 3)[:, 0]
        assert found.dtype == torch.float32
        assert float((found - truth).abs().max() / truth.abs().max()) < most


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(
    "group_size, shape",
    [(-1, {"dim": 75, "n_heads": 3, "n_kv_heads": 1, "head_dim": 26, "hidden_dim": 101}), (96, {}), (64, {})],
    ids=["odd widths", "a last group that is shorter", "inputs that are no multiple"],
)
def test_rows_that_end_inside_of_a_group(bits, group_size, shape):
    wide = WIDE | {"hidden_dim": 200} | shape
    ours, exact = quantized(make(torch.float32, **wide), bits, group_size)
    step, cache = stepper(ours, ours.make_cache(2)), exact.make_cache(2)
    for position in range(3):
        truth = plain_step(exact, cache, [position, 7], [position] * 2)
        found = step([[position], [7]], [position] * 2)[:, 0]
        assert float((found - truth).abs().max() / truth.abs().max()) < 4e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_the_same_bits_beside_any_others_and_for_any_number_of_threads(bits):
    ours, _ = quantized(make(torch.float32, **WIDE), bits, 32)
    runs, alone = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 12]], []
    for run in runs:
        step = stepper(ours, ours.make_cache(1))
        alone.append(step([run], [0])[0])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(stepper(ours, ours.make_cache(5))(runs, [0] * 5), torch.stack(alone))
    finally:
        torch.set_num_threads(before)


MAKERS = {
    "nf4": lambda layer: FourBitLinear(layer, "nf4", double=False),
    "nf4, double": lambda layer: FourBitLinear(layer, "nf4", double=True),
    "fp4": lambda layer: FourBitLinear(layer, "fp4", double=False),
    "w8a8": W8A8Linear,
    "b158": lambda layer: PackedBitLinear(layer, "b158"),
    "b1": lambda layer: PackedBitLinear(layer, "b1"),
}


def of_kind(model: Transformer, kind: str) -> tuple[Transformer, Transformer]:
    """Return copies with all layers quantized: one to decode with, and one in float64 that PyTorch computes."""
    if kind in ("nf4", "nf4, double", "fp4"):
        pytest.importorskip("bitsandbytes")
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for path, layer in base_layers(model):
        quantized = MAKERS[kind](layer)
        replace(ours, path, quantized)
        if isinstance(quantized, FourBitLinear):
            exact.get_submodule(path).weight.data = quantized.dequantize().double()
        else:  # these round their inputs, too, which the layer itself does in float64
            replace(exact, path, copy.deepcopy(quantized))
            if layer.bias is not None:
                exact.get_submodule(path).bias = nn.Parameter(layer.bias.detach().double())
    exact.lm_head.weight = nn.Parameter(cpu_weights.in_8_bits(model.lm_head).dequantize().double())
    return ours.eval(), exact.eval()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("odd", [False, True], ids=["", "odd widths"])
def test_layers_of_other_kinds(kind, odd):
    """Levels are rounded to 1 / 8064 of a block's largest weight. Where inputs are rounded to 8 bits, one that lies
    between two codes may fall to either: 1 / 127 of the largest input."""
    levels = kind in ("nf4", "nf4, double", "fp4")
    shape = WIDE if not odd else WIDE | ({"hidden_dim": 192} if levels else {"hidden_dim": 75, "head_dim": 26})
    ours, exact = of_kind(make(torch.float32, attention_bias=True, **shape), kind)
    cache, exact_cache = ours.make_cache(3), exact.make_cache(3)
    assert cpu_step.supports(ours, cache)
    step, draw = stepper(ours, cache), random.Random(0)
    errors = []
    for position in range(6):
        ids = draw.choices(range(101), k=3)
        truth = plain_step(exact, exact_cache, ids, [position] * 3)
        found = step([[i] for i in ids], [position] * 3)[:, 0]
        errors.append(float((found - truth).abs().max() / truth.abs().max()))
    assert max(errors) < (6e-4 if levels else 0.1), errors  # three layers: such a fall grows


@pytest.mark.parametrize("kind", ["w8a8", "b158", "b1"])
def test_inputs_of_8_bits_are_rounded_as_the_layer_rounds_them(kind):
    """One layer alone: where no input lies between two codes, all that is left are the roundings of sums."""
    ours, exact = of_kind(make(torch.float32, n_layers=1, **WIDE), kind)
    differences = []
    for token in range(12):
        truth = plain_step(exact, exact.make_cache(1), [token], [0])
        found = stepper(ours, ours.make_cache(1))([[token]], [0])[:, 0]
        differences.append(float((found - truth).abs().max() / truth.abs().max()))
    assert sorted(differences)[len(differences) // 2] < 4e-4, differences


@pytest.mark.parametrize("kind", ["nf4", "w8a8", "b158"])
def test_a_row_of_another_kind_is_the_same_bits_beside_any_others(kind):
    ours, _ = of_kind(make(torch.float32, **WIDE), kind)
    runs = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 12]]
    alone = [stepper(ours, ours.make_cache(1))([run], [0])[0] for run in runs]
    assert torch.equal(stepper(ours, ours.make_cache(5))(runs, [0] * 5), torch.stack(alone))


@pytest.mark.parametrize("kind", ["nf4", "w8a8", "b158"])
def test_inputs_of_other_kinds_that_are_zero_or_not_finite(kind):
    ours, _ = of_kind(make(torch.float32, tie_embeddings=False, **WIDE), kind)
    with torch.no_grad():
        ours.embedding.weight[3] = 0
        ours.embedding.weight[5] = float("nan")
    step = stepper(ours, ours.make_cache(1))
    assert step([[3]], [0]).isfinite().all() and not step([[5]], [0]).isfinite().any()


def test_groups_that_the_step_does_not_know_leave_it_to_the_model():
    def supported(bits=4, group_size=32, dtype=torch.float32, **shape):
        ours, _ = quantized(make(dtype, **WIDE | shape), bits, group_size)
        return cpu_step.supports(ours, ours.make_cache(1))

    assert supported()
    assert not supported(group_size=16)
    assert supported(hidden_dim=100, group_size=-1)
    assert not supported(dtype=torch.float64)
    outliers = copy.deepcopy(make(torch.float32, **WIDE))  # LLM.int8(): a token's outliers depend on the others
    for path, layer in base_layers(outliers):
        replace(outliers, path, LLMInt8Linear(layer))
    assert not cpu_step.supports(outliers, outliers.make_cache(1))
    ours, _ = quantized(make(torch.float32, tie_embeddings=False, **WIDE), 4, 32)
    ours.model.layers[0].mlp.up_proj.group = ours.model.layers[0].mlp.up_proj.group.flip(0)  # another order of inputs
    assert not cpu_step.supports(ours, ours.make_cache(1))


def test_inputs_that_are_zero_or_not_finite():
    ours, exact = quantized(make(torch.float32, tie_embeddings=False, **WIDE), 4, 32)
    with torch.no_grad():
        for model in (ours, exact):
            model.embedding.weight[3] = 0
            model.embedding.weight[4] = 1e-36
            model.embedding.weight[5] = float("nan")
    step = stepper(ours, ours.make_cache(1))
    assert step([[3]], [0]).isfinite().all() and step([[4]], [0]).isfinite().all()
    assert not step([[5]], [0]).isfinite().any()

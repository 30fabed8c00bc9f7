"""Quantized bases: NF4 and FP4 bit for bit as written out in nf4_reference.py, int8 by its error, gradients through."""

import sys
from typing import get_args, get_type_hints

import pytest
import torch
from helpers import nf4_reference as reference
from helpers.lora_models import our_model, shake, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora import adapters
from lora.adapters import LoraArgs
from quant.int8 import Int8Linear
from quant.kinds import KINDS
from quant.linear import QuantizedLinear
from quant.replace import QUANTIZERS


def quantized(layer: nn.Linear, kind: str, double: bool = True) -> QuantizedLinear:
    if KINDS[kind].package:
        pytest.importorskip("bitsandbytes")
    return QUANTIZERS[kind](layer, **{"double": double} if KINDS[kind].double_quant else {})


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    shape=st.tuples(st.integers(1, 150), st.integers(1, 60)),
    size=st.sampled_from([1e-6, 0.02, 3.0]),
    seed=st.integers(0, 99),
)
def test_four_bits_equal_the_reference_bit_for_bit(kind, double, shape, size, seed):
    layer = nn.Linear(*shape, bias=False)
    nn.init.normal_(layer.weight, std=size, generator=torch.Generator().manual_seed(seed))
    ours = quantized(layer, kind, double)
    levels = reference.LEVELS[kind]
    codes, scales = reference.blockwise(layer.weight.detach(), levels, 64)
    assert torch.equal(ours.packed.flatten(), reference.packed(codes, levels))
    if double:
        mean, fine = scales.mean(), reference.dynamic_levels()
        wanted, largest = reference.blockwise(scales - mean, fine, 256)
        kept = ours.absmax.long()
        # The CPU kernel of bitsandbytes looks levels up in a table of steps of 2^-15 or so, and takes the second
        # nearest of two that are equally near but for that.
        unit = largest.repeat_interleave(256)[: len(scales)]
        theirs, nearest = ((scales - mean - fine[each] * unit).abs() for each in (kept, wanted))
        assert (theirs <= nearest + 2**-14 * unit).all()
        scales = reference.undo(kept, largest, fine, 256) + mean
    assert torch.equal(ours.dequantize(), reference.undo(codes, scales, levels, 64).view_as(layer.weight))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_linear_makes_the_same_product(kind):
    bnb = pytest.importorskip("bitsandbytes")
    layer = nn.Linear(128, 80)  # whole blocks a row, which its CPU kernel takes for granted
    theirs = bnb.nn.Linear4bit(128, 80, quant_type=kind, compute_dtype=torch.float32)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to("cpu")
    x = torch.randn(4, 5, 128, requires_grad=True)
    ours = quantized(layer, kind)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_and_of_one_large_value():
    layer = nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[1, 7] = 1e4
    for kind in KINDS:
        torch.testing.assert_close(quantized(layer, kind, double=False).dequantize(), layer.weight.detach())


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), seed=st.integers(0, 99))
def test_int8_errs_by_half_a_step_of_its_row(shape, seed):
    layer = nn.Linear(*shape)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    weight = layer.weight.detach()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((Int8Linear(layer).dequantize() - weight).abs() <= step * 0.501).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_go_through_even_after_an_evaluation(kind, dtype):
    layer = quantized(nn.Linear(64, 48), kind)
    x = torch.randn(7, 64, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        layer.eval()(x)
    out = layer.train()(x)
    assert out.dtype == dtype
    out.backward(grad := torch.randn_like(out))
    torch.testing.assert_close(x.grad, grad @ layer.dequantize(dtype))
    assert not any(p.requires_grad for p in layer.parameters() if p is not layer.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_quantized_model_is_the_adapted_dense_one(kind):
    """That is: quantized, made dense, adapted."""
    if KINDS[kind].package:
        pytest.importorskip("bitsandbytes")
    model = our_model(attention_bias=True).float()
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    adapters.apply(model, LoraArgs("dora", r=3, base=kind))
    assert model.model.embed_tokens.weight is embedding and model.lm_head.weight is head
    shake(model)
    dense, tokens = our_model(attention_bias=True).float(), some_tokens()
    dense.load_state_dict(
        {name: p for name, p in model.state_dict().items() if name in dense.state_dict()}, strict=False
    )
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(path).weight.data = module.dequantize()
    adapters.apply(dense, LoraArgs("dora", r=3))
    own = dict(dense.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            own[name].copy_(p)
    for each in (model, dense):
        each(tokens, tokens)[0].backward()
    torch.testing.assert_close(model(tokens), dense(tokens), rtol=0, atol=1e-6)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, own[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, bits", [("nf4", 4.127), ("fp4", 4.127), ("int8", 8.0)])
def test_bytes_that_are_kept(kind, bits):
    layer = quantized(nn.Linear(4096, 512, bias=False), kind)
    kept = sum(buffer.nbytes for buffer in layer.buffers()) + sum(p.nbytes for p in layer.parameters())
    assert kept * 8 / (4096 * 512) == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_leaves_scales_alone(kind):
    layer = quantized(nn.Linear(64, 48), kind)
    before = layer.dequantize()
    assert torch.equal(layer.to(torch.bfloat16).dequantize(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_for_good_everything_is_dense(kind):
    if KINDS[kind].package:
        pytest.importorskip("bitsandbytes")
    model, tokens = our_model().float(), some_tokens()
    names = model.state_dict().keys()
    adapters.apply(model, LoraArgs("lora", r=3, targets="mlp", base=kind))
    shake(model)
    before = model(tokens)
    adapters.merge_for_good(model)
    assert model.state_dict().keys() == names and type(model.model.layers[0].mlp.up_proj).__module__ == "model"
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-5)


def test_refused(monkeypatch):
    model = our_model()
    with pytest.raises(ValueError, match=r"--lora\.base should be one of full, .*, found 'int3'"):
        adapters.quantize_base(model, "int3")
    adapters.apply(model, LoraArgs("lora", r=2, base="int8"))
    with pytest.raises(ValueError, match="has adapters already: quantize its base before"):
        adapters.quantize_base(model, "int8")
    with pytest.raises(ValueError, match=r"pissa changes the base weights, and model\..* is quantized"):
        quantized_model = our_model()
        adapters.quantize_base(quantized_model, "int8")
        adapters.inject(quantized_model, adapters.LoraSpec(2, pissa=True))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--lora\.base nf4 needs bitsandbytes, .*: bash setup\.sh --extra bnb"):
        adapters.quantize_base(our_model(), "nf4")


def test_the_flag_offers_what_is_registered():
    assert get_args(get_type_hints(LoraArgs)["base"]) == ("full", *QUANTIZERS)
    assert get_args(get_type_hints(LoraArgs)["method"]) == ("none", *adapters.METHODS)

"""Quantized layers on disk: each layout against its definition, and against the readers that are installed here."""

import pytest
import torch
from torch import nn

from quant.gptq import solve_nearest
from quant.grid import GridOptions, Quantized
from quant.grouped import GroupedLinear
from quant.layouts import LAYOUTS

SHAPES = [(32, 64), (64, 32), (96, 160)]


def some_layer(shape: tuple[int, int], bits: int, group_size: int = 32, symmetric: bool = False) -> Quantized:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(bits + shape[0]))
    weight[0] = weight[0].abs()  # a row whose best zero point is 0
    quantized = solve_nearest(weight, GridOptions(bits, group_size, symmetric, least_zero=1))
    return quantized._replace(scales=quantized.scales.half().float())  # what float16 files can keep


def equal(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_what_is_written_is_read_again(name, bits, symmetric, group_size):
    for shape in SHAPES:
        quantized = some_layer(shape, bits, group_size, symmetric)
        if name == "awq" and bits != 4:
            with pytest.raises(ValueError, match="keeps 4 bits"):
                LAYOUTS[name].write(quantized, bits)
            continue
        tensors = LAYOUTS[name].write(quantized, bits)
        assert LAYOUTS[name].names <= tensors.keys()
        assert equal(LAYOUTS[name].read(tensors, bits, group_size), quantized)


def test_gptq_by_its_definition():
    quantized = some_layer((32, 64), 4)
    tensors = LAYOUTS["gptq"].write(quantized, 4)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "qweight": (8, 32),
        "qzeros": (2, 4),
        "scales": (2, 32),
        "g_idx": (64,),
    }
    for i in (0, 9, 63):  # input i of output o: nibble i % 8 of word i // 8
        for o in (0, 31):
            word = int(tensors["qweight"][i // 8, o]) % 2**32
            assert word >> 4 * (i % 8) & 15 == quantized.codes[o, i]
    for o in (0, 8, 31):  # the zero point, less one
        word = int(tensors["qzeros"][1, o // 8]) % 2**32
        assert (word >> 4 * (o % 8) & 15) + 1 == quantized.zeros[o, 1]


def test_a_zero_point_that_version_1_cannot_keep_is_refused():
    weight = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) + 0.1
    quantized = solve_nearest(weight, GridOptions(4, -1))
    assert not quantized.zeros.any()
    with pytest.raises(ValueError, match="zero point of 0"):
        LAYOUTS["gptq"].write(quantized, 4)
    second = LAYOUTS["gptq_v2"]
    kept = quantized._replace(scales=quantized.scales.half().float())
    assert equal(second.read(second.write(quantized, 4), 4, -1), kept)


@pytest.mark.parametrize("shape, side", [((40, 64), "outputs"), ((64, 43), "inputs")])
def test_shapes_that_gptq_readers_cut_are_refused(shape, side):
    with pytest.raises(ValueError, match=f"whose {side} are a multiple of 32"):
        LAYOUTS["gptq"].write(some_layer(shape, 4, -1), 4)


@pytest.mark.parametrize("shape", [(5, 43), (3, 7), (33, 64)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_keeps_any_shape(shape, bits):
    quantized = some_layer(shape, bits, -1)
    tensors = LAYOUTS["compressed-tensors"].write(quantized, bits)
    assert equal(LAYOUTS["compressed-tensors"].read(tensors, bits, -1), quantized)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape, group_size", [((32, 64), 32), ((40, 96), 32), ((5, 43), -1)])
def test_compressed_tensors_own_reader(bits, symmetric, shape, group_size):
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    assert package
    strategy = "channel" if group_size == -1 else "group"
    size = {} if group_size == -1 else {"group_size": group_size}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **size)
    quantized = some_layer(shape, bits, group_size, symmetric)
    tensors = LAYOUTS["compressed-tensors"].write(quantized, bits)
    if symmetric:
        del tensors["weight_zero_point"]
    theirs = PackedQuantizationCompressor.decompress(tensors, QuantizationScheme(targets=["Linear"], weights=args))
    assert torch.equal(theirs["weight"].float(), quantized.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(8, 43), (32, 64)])
def test_the_layer_computes_with_the_weight_that_the_codes_stand_for(bits, shape):
    quantized = some_layer(shape, bits, 16)
    layer = GroupedLinear(nn.Linear(shape[1], shape[0]), quantized, bits)
    assert torch.equal(layer.dequantize(), quantized.dequantize()) and equal(layer.quantized(), quantized)
    x = torch.randn(3, shape[1], requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, x @ quantized.dequantize().T + layer.bias)
    out.sum().backward()
    torch.testing.assert_close(x.grad, quantized.dequantize().sum(0).expand(3, -1))
    assert torch.equal(layer.to(torch.bfloat16).dequantize(), quantized.dequantize())

"""SmoothQuant: the scale by its formula, folds that change nothing, a search that never loses, products in float64."""

import pytest
import torch
from helpers.small_model import small_model
from test_quant_awq import folds, outliers
from torch import nn

from quant.awq import apply_scale, to_inputs
from quant.int8 import W8A8Linear, round_inputs
from quant.smooth import search_scale, smoothing


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"attention_bias": True, "head_dim": 6}])
@pytest.mark.parametrize("name", ["attention", "values", "mlp", "down"])
def test_scales_by_the_formula_leave_the_logits_as_they_are(shape, name):
    model, tokens = small_model(**shape), torch.randint(61, (2, 11))
    before, fold = model(tokens), folds(model)[name]
    x = outliers(30, fold.after[0].in_features)
    scale, alpha = search_scale(fold, x, lambda: None, alpha=0.6)
    wide = to_inputs(scale, fold)
    assert alpha == 0.6
    if fold.repeats == 1:
        largest = torch.cat([layer.weight for layer in fold.after]).abs().amax(0)
        torch.testing.assert_close(wide, x.abs().amax(0) ** 0.6 / largest**0.4)
        # Half of the difficulty each: inputs and weights have the same largest magnitude in every channel.
        even = smoothing(fold, x.abs().amax(0), largest, 0.5)
        torch.testing.assert_close(x.abs().amax(0) / even, largest * even)
    apply_scale(fold, scale)
    torch.testing.assert_close(model(tokens), before, atol=1e-12, rtol=1e-9)


def test_channels_that_are_always_zero_keep_their_scale():
    fold = folds(small_model())["mlp"]
    fold.after[0].weight.data[:, 3] = fold.after[1].weight.data[:, 3] = 0
    x = outliers(30, fold.after[0].in_features)
    x[:, 5] = 0
    scale, _ = search_scale(fold, x, lambda: None, alpha=0.5)
    assert scale[3] == scale[5] == 1 and scale.isfinite().all()


@pytest.mark.parametrize("name", ["attention", "values", "mlp", "down"])
def test_the_search_lowers_the_error_and_leaves_no_trace(name):
    model = small_model()
    fold = folds(model)[name]
    x = outliers(64, fold.after[0].in_features)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def run() -> torch.Tensor:
        return torch.cat([layer(x) for layer in fold.after], dim=-1)

    wanted = run()
    scale, alpha = search_scale(fold, x, run)
    assert torch.equal(run(), wanted)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    def error(wide: torch.Tensor) -> float:
        parts = []
        for layer in fold.after:
            smooth = nn.Linear(*layer.weight.T.shape, bias=False)
            smooth.weight.data = layer.weight.detach() * wide
            parts.append(W8A8Linear(smooth)(x / wide))
        return float((torch.cat(parts, -1) - wanted).square().mean().detach())

    ones = torch.ones(x.shape[1], dtype=x.dtype)
    assert alpha is not None and error(to_inputs(scale, fold)) < error(ones)


def test_where_no_scale_helps_there_is_none():
    fold = folds(small_model())["values"]
    for layer in fold.after:  # weights and inputs that 8 bits hold exactly
        layer.weight.data = torch.randint(-127, 128, layer.weight.shape).double()
        layer.weight.data[:, 0] = 127
    x = torch.randint(-127, 127, (20, fold.after[0].in_features)).double()
    x[:, 0] = 127.5
    scale, alpha = search_scale(fold, x, lambda: torch.cat([layer(x) for layer in fold.after], -1))
    assert alpha is None and torch.equal(scale, torch.ones(len(fold.before.weight), dtype=scale.dtype))


@pytest.mark.parametrize("shape", [(5, 64, 48), (1, 3, 1), (7, 1500, 5)])
def test_products_are_those_of_the_rounded_numbers_in_float64(shape):
    tokens, n_inputs, n_outputs = shape
    layer, x = nn.Linear(n_inputs, n_outputs), torch.randn(tokens, n_inputs) * torch.logspace(-3, 2, tokens)[:, None]
    layer.weight.data[0] = 0
    ours = W8A8Linear(layer)
    scale = x.double().abs().amax(1, keepdim=True) / 127.5
    rounded = (x.double() / scale).round().clamp(-128, 127) * scale
    step = layer.weight.detach().double().abs().amax(1, keepdim=True) / 127
    weight = ((layer.weight.detach().double() / step.clamp(min=1e-30)).round() * step).float().double()
    expected = rounded @ weight.T + layer.bias.detach().double()
    torch.testing.assert_close(ours(x).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(ours(torch.zeros(2, n_inputs)), layer.bias.expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_have_the_codes_of_compressed_tensors(dtype):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = (torch.randn(4, 9, 40) * 5).to(dtype).float()
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    codes, ours = round_inputs(x.view(36, 40))
    assert torch.equal(codes.view_as(x), quantize(x, scale, zero, args).to(torch.int8))
    assert torch.equal(ours.view(4, 9, 1), scale)

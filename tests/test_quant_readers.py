"""Whole quantized directories in the programs that their formats are of: theirs read here, ours read by them."""

import copy
import json

import pytest
import torch
from helpers.tiny_chat_model import TEXT, save_chat_model
from safetensors.torch import load_file, save_file
from torch import nn

import quantize
from checkpoint.directory import load_model
from hardware import has_bfloat16
from quant.four_bit import FourBitLinear
from quant.int8 import whole_product
from quant.linear import QuantizedLinear
from quant.llm_int8 import LLMInt8Linear

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(10, 58).view(2, 24)
SHAPE = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers") / "model"
    save_chat_model(folder, **SHAPE)
    path = folder / "model.safetensors"
    tensors = {name: t * (0.3 if ".layers." in name and t.dim() == 2 else 1) for name, t in load_file(path).items()}
    tensors["model.layers.1.input_layernorm.weight"][7] = 20.0  # an outlier column
    save_file(tensors, path, {"format": "pt"})
    return folder


def quantized(model, out, method: str, **settings):
    quantize.main(quantize.Args(model=model, out=out, method=method, device="cpu", **settings))
    return out


def theirs(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


def layers(model) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


# ---- bitsandbytes


@pytest.mark.parametrize("shape", [(9, 64, 48), (1, 40, 7), (33, 1000, 24)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_llm_int8_is_bitsandbytes_bit_for_bit(shape, threshold):
    bnb = pytest.importorskip("bitsandbytes")
    tokens, n_inputs, n_outputs = shape
    layer, x = nn.Linear(n_inputs, n_outputs, bias=False), torch.randn(tokens, n_inputs)
    x[:, 5] *= 20
    x[0, 11] = 100000.0 if threshold else 30.0  # beyond float16
    peer = bnb.nn.Linear8bitLt(n_inputs, n_outputs, bias=False, has_fp16_weights=False, threshold=threshold)
    peer.load_state_dict(layer.state_dict())
    peer = peer.to("cpu").eval()  # in training it multiplies the dequantized weight
    ours = LLMInt8Linear(layer, threshold)
    with torch.no_grad():
        assert torch.equal(ours(x), peer(x))
    assert torch.equal(ours.codes, peer.state.CB) and torch.equal(ours.absmax.view(torch.float32)[:, 0], peer.state.SCB)


def test_outliers_are_not_rounded():
    layer, x = nn.Linear(32, 16), torch.randn(20, 32)
    x[3, 4] = 5000.0
    ours, exact = LLMInt8Linear(layer), layer(x).detach()
    assert (ours(x) - exact).abs().max() < 5000 * layer.weight.abs().max() / 250 + 0.1  # the weight's rounding is left
    without = LLMInt8Linear(layer, threshold=0.0)
    others = torch.arange(20) != 3
    assert (ours(x) - exact)[others].abs().max() < 0.05 < (without(x) - exact)[3].abs().max()


def test_products_of_whole_numbers_are_exact_for_any_length():
    codes = torch.randint(-128, 128, (3, 5000), dtype=torch.int8)
    weight = torch.randint(-127, 128, (4, 5000), dtype=torch.int8)
    codes[0], weight[0] = -128, 127  # the largest sum
    assert torch.equal(whole_product(codes, weight).long(), codes.long() @ weight.long().T)


def test_tokens_of_zeros_and_gradients():
    layer = nn.Linear(24, 8)
    ours, x = LLMInt8Linear(layer), torch.zeros(2, 3, 24, requires_grad=True)
    out = ours(x)
    assert torch.equal(out, layer.bias.expand(2, 3, 8))
    out.sum().backward()
    torch.testing.assert_close(x.grad, ours.dequantize().sum(0).expand(2, 3, 24))


def in_full(model):
    """The same model with the weights that bitsandbytes unpacks: on some processors its product rounds to bfloat16."""
    from bitsandbytes.functional import dequantize_4bit

    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer).__name__ == "Linear4bit":
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight = torch.nn.Parameter(dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())
                plain.bias = layer.bias
                setattr(module, name, plain)
    return model


@pytest.mark.parametrize("method", ["llm_int8", "nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_and_we_read_each_others_directories(model, tmp_path, method, double_quant):
    pytest.importorskip("bitsandbytes")
    settings = {}
    if method == "llm_int8":
        if not double_quant:
            pytest.skip("a setting of nf4 and fp4")
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = {"double_quant": double_quant}
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_use_double_quant=double_quant
        )
    ours = quantized(model, tmp_path / "ours", method, **settings)
    peer = theirs(ours)
    kinds = {type(module).__name__ for module in peer.modules()}
    assert ("Linear8bitLt" if method == "llm_int8" else "Linear4bit") in kinds
    # Rows of other shapes are added in another order; a rounding of inputs to 8 bits may then fall the other way.
    atol = 0.05 if method == "llm_int8" else 1e-4
    torch.testing.assert_close(logits(load_model(ours)), logits(in_full(peer)), atol=atol, rtol=0)
    # What bitsandbytes makes of the same model has the same codes, bit for bit.
    made = theirs(model, quantization_config=config)
    made.save_pretrained(tmp_path / "theirs")
    first, second = layers(load_model(ours)), layers(load_model(tmp_path / "theirs"))
    assert len(first) == len(second) == 14
    for name, layer in first.items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, second[name].state_dict()[key]), (name, key)
    torch.testing.assert_close(logits(load_model(tmp_path / "theirs")), logits(load_model(ours)), atol=1e-5, rtol=0)


def test_rows_that_its_cpu_kernel_would_misread_are_padded(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    save_chat_model(tmp_path / "odd", **SHAPE | {"hidden_dim": 75})
    ours = quantized(tmp_path / "odd", tmp_path / "ours", "nf4")
    assert json.loads((ours / "config.json").read_text())["intermediate_size"] == 128
    found, expected = logits(theirs(ours)), logits(load_model(ours))
    torch.testing.assert_close(logits(in_full(theirs(ours))), expected, atol=1e-3, rtol=1e-3)
    if has_bfloat16(torch.device("cpu")):  # the kernel rounds to that; misread rows would have nothing in common
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
    else:
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert "75 is padded with zeros to 128" in capsys.readouterr().err


def test_a_layer_that_was_left_out_stays_in_full(model, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    theirs(model, quantization_config=config).save_pretrained(tmp_path / "theirs")
    found = layers(load_model(tmp_path / "theirs"))
    assert len(found) == 12 and not any("down_proj" in name for name in found)


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("llm_int8", lambda t, p: t.pop(f"{p}.SCB"), "lacks .*SCB"),
        ("llm_int8", lambda t, p: t.update({f"{p}.SCB": torch.ones(5)}), r"SCB is float32 of shape \(5,\)"),
        ("llm_int8", lambda t, p: t.update({f"{p}.weight": torch.ones(128, 9).to(torch.int8)}), "weight is int8"),
        ("llm_int8", lambda t, p: t.update({f"{p}.weight_format": torch.tensor(2).to(torch.uint8)}), "tiles"),
        ("nf4", lambda t, p: t.pop(f"{p}.weight.absmax"), "lacks .*absmax"),
        ("nf4", lambda t, p: t.update({f"{p}.weight.absmax": torch.ones(5).to(torch.uint8)}), "weight.absmax is"),
        ("nf4", lambda t, p: t[f"{p}.weight.quant_state.bitsandbytes__nf4"].zero_(), "quant_state is damaged"),
        ("nf4", lambda t, p: t.pop(f"{p}.weight.quant_state.bitsandbytes__nf4"), "quant_state"),
        ("nf4", lambda t, p: t.update({f"{p}.weight": torch.ones(7, 1).to(torch.uint8)}), "weight is uint8"),
    ],
)
def test_damaged_tensors_of_bitsandbytes_are_named(model, tmp_path, method, change, message):
    pytest.importorskip("bitsandbytes")
    ours = quantized(model, tmp_path / "ours", method)
    path = ours / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message) as caught:
        load_model(ours)
    assert "model.layers.0.mlp.up_proj" in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "one of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({"load_in_8bit": True, "llm_int8_threshold": "six"}, "llm_int8_threshold should be a number"),
    ],
)
def test_settings_of_bitsandbytes_that_cannot_be_are_named(model, tmp_path, settings, message):
    ours = quantized(model, tmp_path / "ours", "llm_int8")
    path = ours / "config.json"
    settings = {"quantization_config": {"quant_method": "bitsandbytes"} | settings}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        load_model(ours)


def test_a_base_that_is_in_four_bits_on_disk_is_not_quantized_again(model, tmp_path):
    pytest.importorskip("bitsandbytes")
    from quant.replace import kind_of_base, quantize_base

    ours = load_model(quantized(model, tmp_path / "ours", "nf4"))
    assert kind_of_base(ours) == ("full", False)
    before = copy.deepcopy(ours)
    quantize_base(ours, "nf4")
    assert torch.equal(logits(ours), logits(before))
    assert all(isinstance(layer, FourBitLinear) for layer in layers(ours).values())


# ---- int8


def test_compressed_tensors_computes_smoothquant_as_we_do(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40, encoding="utf8")
    ours = quantized(model, tmp_path / "ours", "smoothquant", calib=(text,), calib_tokens=500, seq_len=50)
    found, peer = load_model(ours), theirs(ours)
    assert {layer.kind for layer in layers(found).values()} == {"w8a8"}
    dense = logits(load_model(model))
    # An input that lies between two codes falls to either side by the order of a sum. These steps are far smaller than
    # what the rounding to 8 bits itself changes.
    apart, rounding = ((logits(found) - other).square().mean().sqrt() for other in (logits(peer), dense))
    assert apart < 0.2 * rounding
    torch.testing.assert_close(logits(found), logits(peer), atol=0.1, rtol=0)
    without = quantized(model, tmp_path / "without", "smoothquant", calib=(text,), calib_tokens=500, alpha=0.0)
    assert (logits(found) - dense).square().mean() < (logits(load_model(without)) - dense).square().mean()


def test_int8_weights_alone_are_read_as_groups(model, tmp_path):
    ours = quantized(model, tmp_path / "ours", "int8", format="compressed-tensors")
    path, name = ours / "config.json", "model.layers.0.mlp.up_proj"
    tensors, config = load_file(ours / "model.safetensors"), json.loads(path.read_text())
    layer = load_model(ours).get_submodule(name)
    whole = {key: t for key, t in tensors.items() if ".layers." not in key or "norm" in key}
    for path_, each in layers(load_model(ours)).items():
        codes = each.quantized().codes.to(torch.int16) - 128
        whole |= {f"{path_}.weight": codes.to(torch.int8), f"{path_}.weight_scale": each.quantized().scales}
    save_file(whole, ours / "model.safetensors", {"format": "pt"})
    config["quantization_config"]["format"] = "int-quantized"
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "int-quantized"
    path.write_text(json.dumps(config))
    again = load_model(ours).get_submodule(name)
    assert torch.equal(again.dequantize(), layer.dequantize()) and again.kind == "grouped"
    torch.testing.assert_close(logits(load_model(ours)), logits(theirs(ours)), atol=1e-4, rtol=0)
    inputs = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = inputs
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"input_activations are read here beside int-quantized weights with .*'num_bits': 8"
    ):
        load_model(ours)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_int8_is_absmax_of_each_row(model, tmp_path, form):
    dense, found = load_model(model), layers(load_model(quantized(model, tmp_path / "ours", "int8", format=form)))
    for name, layer in found.items():
        weight = dense.get_submodule(name).weight.detach()
        step = weight.abs().amax(1, keepdim=True) / 127
        expected = (weight / step).round() * step
        # the scales of GPTQ files are float16
        torch.testing.assert_close(layer.dequantize(), expected, rtol=2**-10 if form == "gptq" else 0, atol=1e-7)


def test_compressed_tensors_reads_int8(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    ours = quantized(model, tmp_path / "ours", "int8", format="compressed-tensors")
    torch.testing.assert_close(logits(load_model(ours)), logits(theirs(ours)), atol=1e-4, rtol=0)

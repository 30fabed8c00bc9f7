"""BitNet against transformers' functions; trained through the ordinary loop, packed, loaded: equal bit for bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.few_steps import few_steps
from helpers.small_model import small_model
from safetensors.torch import load_file, save_file
from torch import nn

import fine_tuning
import pretrain
import quantize
from checkpoint.directory import load_model, save_model
from lora import adapters
from lora.spec import LoraArgs
from quant import bitnet
from quant.bitnet import BitLinear, PackedBitLinear
from quant.trained import kind_of_bits
from tuning.args import DataArgs

TOKENS = torch.arange(10, 58).view(2, 24)
KINDS = ("b158", "b1")


@pytest.fixture(scope="module")
def theirs():
    integration = pytest.importorskip("transformers.integrations.bitnet")
    with torch.compiler.set_stance("force_eager"):
        yield integration


@pytest.mark.parametrize("shape", [(8, 5), (4, 64), (12, 1)])
def test_roundings_are_those_of_transformers_bit_for_bit(theirs, shape):
    weight, x = torch.randn(shape) * 0.3, torch.randn(3, 7, shape[1]) * torch.logspace(-7, 2, 7)[:, None]
    codes, scale = bitnet.round_weight(weight, "b158")
    assert torch.equal(codes / scale, theirs.WeightQuant.apply(weight))
    assert torch.equal(bitnet.round_inputs(x), theirs.ActQuant.apply(x))
    packed = bitnet.pack_ternary(codes)
    assert torch.equal(packed, theirs.pack_weights(codes.clone()))
    assert torch.equal(bitnet.unpack_ternary(packed, shape[0]), theirs.unpack_weights(packed, torch.int8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 64), (30, 3)])
def test_packing_is_undone_for_every_shape(kind, shape):
    layer = nn.Linear(*reversed(shape), bias=False)
    codes, scale = bitnet.round_weight(layer.weight.detach(), kind)
    packed = PackedBitLinear(layer, kind)
    assert torch.equal(packed.dequantize(), codes / scale)
    assert packed.packed.nbytes <= (4 * -(-shape[1] // 32) * shape[0] if kind == "b1" else -(-shape[0] // 4) * shape[1])


def test_one_bit_is_the_side_of_the_mean():
    weight = torch.tensor([[1.0, 2.0, 6.0], [-1.0, 3.0, 1.0]])  # mean 2, mean magnitude 7/3
    codes, scale = bitnet.round_weight(weight, "b1")
    assert codes.tolist() == [[-1, 1, 1], [-1, 1, -1]] and scale.item() == pytest.approx(3 / 7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_both_roundings_as_if_there_were_none(kind):
    layer = nn.Linear(24, 10).double()
    ours, x = BitLinear(layer, kind), torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, 10, dtype=torch.float64)
    ours(x).backward(grad)
    codes, scale = bitnet.round_weight(layer.weight.detach(), kind)
    rounded = bitnet.round_inputs(x.detach())
    torch.testing.assert_close(x.grad, grad @ (codes / scale))
    torch.testing.assert_close(layer.weight.grad, grad.flatten(0, 1).T @ rounded.flatten(0, 1))
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))
    assert torch.equal(ours(x), F.linear(rounded, codes / scale) + layer.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_gives_the_numbers_of_the_trained_one(kind, dtype):
    layer, x = BitLinear(nn.Linear(50, 12), kind), torch.randn(4, 50, dtype=dtype)
    packed = PackedBitLinear(layer, kind).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), packed(x)) and packed(x).dtype == dtype


# ---- through the scripts


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """A run of a few steps: its settings, its model, its kind."""
    folder = tmp_path_factory.mktemp(request.param)
    args = few_steps(folder, dim=32, hidden_dim=48, bitnet=request.param)
    result = pretrain.main(args)
    return args, result | {"model": Path(result["model"])}, request.param


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model.eval()(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


def test_training_packing_loading_give_equal_logits(trained, tmp_path):
    _, result, kind = trained
    model = load_model(result["model"])
    assert kind_of_bits(model) == kind
    assert sum(isinstance(module, BitLinear) for module in model.modules()) == 14
    assert not isinstance(model.lm_head, BitLinear)
    quantize.main(quantize.Args(model=result["model"], out=tmp_path / "packed", method="bitnet", device="cpu"))
    packed = load_model(tmp_path / "packed")
    assert torch.equal(logits(packed), logits(model))
    full = load_file(tmp_path / "packed/model.safetensors")
    bits = sum(t.nbytes * 8 for name, t in full.items() if name.endswith("_proj.weight"))
    count = sum(m.weight.numel() for m in model.modules() if isinstance(m, BitLinear))
    assert bits / count == 2 if kind == "b158" else 1 <= bits / count <= 1.5  # rows of 48 take two words


def test_transformers_runs_the_trained_and_the_packed_model(trained, theirs, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, result, kind = trained
    if kind != "b158":
        pytest.skip("transformers has no b1: it warns, and computes with the full weights")
    quantize.main(quantize.Args(model=result["model"], out=tmp_path / "packed", method="bitnet", device="cpu"))
    for directory in (result["model"], tmp_path / "packed"):
        peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        name = "AutoBitLinear" if directory == result["model"] else "BitLinear"
        assert sum(type(module).__name__ == name for module in peer.modules()) == 14
        # its packed layer divides after the product, so an input may fall to the other side of a rounding
        torch.testing.assert_close(logits(peer), logits(load_model(result["model"])), atol=2e-2, rtol=0)


def test_a_run_goes_on_and_a_model_is_trained_further(trained, tmp_path):
    args, result, kind = trained
    before = load_model(result["model"])
    assert pretrain.main(args)["steps"] == result["steps"]  # the same command: there is nothing left to do
    more = pretrain.Args(
        data=args.data, optim=args.optim, train=args.train, out=tmp_path / "run", init_from=result["model"]
    )
    again = load_model(pretrain.main(more)["model"])
    assert kind_of_bits(again) == kind and not torch.equal(logits(again), logits(before))
    other = "b1" if kind == "b158" else "b158"
    with pytest.raises(ValueError, match=f"--bitnet {other} does not fit .* trained with {kind}"):
        pretrain.main(dataclasses.replace(more, bitnet=other, out=tmp_path / "other"))


def test_what_needs_full_weights_is_refused(trained, tmp_path):
    _, result, kind = trained
    quantize.main(quantize.Args(model=result["model"], out=tmp_path / "packed", method="bitnet", device="cpu"))
    with pytest.raises(ValueError, match=f"trained in few bits .{kind}.: --method bitnet packs it"):
        quantize.main(quantize.Args(model=result["model"], out=tmp_path / "q", method="rtn", device="cpu"))
    with pytest.raises(ValueError, match="weights of this model are quantized"):
        quantize.main(quantize.Args(model=tmp_path / "packed", out=tmp_path / "q", method="bitnet", device="cpu"))
    for settings in ({}, {"base": "int8"}):
        with pytest.raises(ValueError, match="trained in few bits"):
            adapters.apply(load_model(result["model"]), LoraArgs(method="lora", r=2, **settings))
    tune = {"init_from": tmp_path / "packed", "out": tmp_path / "run", "data": DataArgs(train=(tmp_path,))}
    with pytest.raises(ValueError, match="quantized"):
        fine_tuning.main(fine_tuning.Args(**tune))
    save_model(tmp_path / "full", small_model().float(), None)
    with pytest.raises(ValueError, match=r"--method bitnet packs what .* was trained in full"):
        quantize.main(quantize.Args(model=tmp_path / "full", out=tmp_path / "q", method="bitnet", device="cpu"))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, p: t.pop(f"{p}.weight_scale"), "weight"),
        (lambda t, p: t.update({f"{p}.weight_scale": torch.zeros(1)}), "weight_scale should be above 0"),
        (lambda t, p: t.update({f"{p}.weight": torch.ones(3, 3).to(torch.uint8)}), "weight is uint8"),
    ],
)
def test_damaged_tensors_are_named(trained, tmp_path, change, message):
    _, result, _ = trained
    quantize.main(quantize.Args(model=result["model"], out=tmp_path / "packed", method="bitnet", device="cpu"))
    path = tmp_path / "packed/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, "model.layers.1.mlp.up_proj")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "packed")
    assert "model.layers.1.mlp.up_proj" in str(caught.value)


def test_layers_of_others_that_are_not_read_are_named(trained, tmp_path):
    result = trained[1]
    for settings, message in (
        ({"quantization_mode": "online", "use_rms_norm": True}, "use_rms_norm"),
        ({"linear_class": "autobitlinear"}, "linear_class bitlinear"),
    ):
        quantize.main(quantize.Args(model=result["model"], out=tmp_path / message, method="bitnet", device="cpu"))
        path = tmp_path / message / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= settings
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / message)

"""Quantization-aware training: the rounding against a loop, its gradients, and a run that is packed bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.few_steps import few_steps
from safetensors.torch import load_file
from torch import nn

import pretrain
import quantize
from checkpoint.directory import load_model
from lora import adapters
from lora.spec import LoraArgs
from quant import qat
from quant.grouped import GroupedLinear
from quant.kinds import PACKED
from quant.qat import QATLinear
from quant.trained import kind_of_bits

TOKENS = torch.arange(10, 58).view(2, 24)


def by_hand(weight: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """The rounded weight, number by number."""
    out, most = torch.empty_like(weight), 2**bits - 1
    for row in range(len(weight)):
        for at in range(0, weight.shape[1], size):
            group = [float(w) for w in weight[row, at : at + size]]
            low, high = min(0.0, *group), max(0.0, *group)
            if low == high == 0:
                low, high = -1.0, 1.0
            scale = max((high - low) / most, 2**-14)
            scale16 = float(torch.tensor(scale, dtype=torch.float64).float().half())
            zero = min(most, max(1, round(-low / ((high - low) / most))))
            for i, w in enumerate(group):
                code = min(most, max(0, round(w / scale16) + zero))
                out[row, at + i] = scale16 * (code - zero)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape, group", [((3, 8), 4), ((2, 11), 4), ((4, 7), -1), ((1, 1), 128)])
def test_the_rounding_is_that_of_a_loop(bits, shape, group):
    torch.manual_seed(bits)
    weight = (torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]).double()
    weight[0, : max(1, shape[1] // 2)] = 0
    found = qat.solve(weight, qat.grid_of(qat.kind_of(bits, group))).dequantize()
    torch.testing.assert_close(found, by_hand(weight, bits, group if group > 0 else shape[1]), atol=0, rtol=1e-12)


def test_gradients_pass_the_rounding_as_if_there_were_none():
    layer = nn.Linear(24, 10).double()
    ours, x = QATLinear(layer, "int4g8"), torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, 10, dtype=torch.float64)
    ours(x).backward(grad)
    rounded = by_hand(layer.weight.detach(), 4, 8)
    torch.testing.assert_close(x.grad, grad @ rounded)
    torch.testing.assert_close(layer.weight.grad, grad.flatten(0, 1).T @ x.detach().flatten(0, 1))
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))
    torch.testing.assert_close(ours(x), F.linear(x, rounded, layer.bias))


@pytest.mark.parametrize("kind", ["int5g32", "int4g0", "int4", "b158", "int4g-2"])
def test_a_name_that_is_no_grid(kind):
    with pytest.raises(ValueError, match="name of a grid"):
        qat.grid_of(kind)


# ---- through the scripts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps at 4 bits: its settings and its model."""
    folder = tmp_path_factory.mktemp("qat")
    args = few_steps(folder, dim=64, hidden_dim=96, qat_bits=4, qat_group_size=32)
    return args, Path(pretrain.main(args)["model"])


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    found = load_model(directory).eval()(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


def test_a_checkpoint_says_what_it_is_and_computes_with_rounded_weights(trained):
    _, directory = trained
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["quantization_mode"]) == (4, 32, "online")
    model = load_model(directory)
    assert kind_of_bits(model) == "int4g32" and sum(isinstance(m, QATLinear) for m in model.modules()) == 14
    assert not isinstance(model.lm_head, QATLinear)
    full = load_file(directory / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert len(full.unique()) > 0.9 * full.numel()  # the full weights are kept


@pytest.mark.parametrize("form", PACKED)
def test_packing_changes_no_weight_and_no_logit(trained, tmp_path, form):
    _, directory = trained
    quantize.main(quantize.Args(tmp_path / "packed", directory, "qat", format=form, device="cpu"))
    packed, online = load_model(tmp_path / "packed"), load_model(directory)
    for name, layer in online.named_modules():
        if isinstance(layer, QATLinear):
            ours = packed.get_submodule(name)
            assert isinstance(ours, GroupedLinear) and ours.bits == 4
            assert torch.equal(ours.dequantize(), qat.nearest_grid(layer).dequantize())
    assert torch.equal(logits(tmp_path / "packed"), logits(directory))


def test_a_run_goes_on_and_a_full_model_becomes_one(trained, tmp_path):
    args, directory = trained
    more = pretrain.Args(data=args.data, optim=args.optim, train=args.train, out=tmp_path / "run", init_from=directory)
    again = Path(pretrain.main(more)["model"])
    assert kind_of_bits(load_model(again)) == "int4g32" and not torch.equal(logits(again), logits(directory))
    with pytest.raises(ValueError, match=r"--qat_bits 3 does not fit .* trained with int4g32"):
        pretrain.main(pretrain.with_values(more, qat_bits=3, qat_group_size=32, out=tmp_path / "three"))
    with pytest.raises(ValueError, match=r"--bitnet b158 does not fit .* trained with int4g32"):
        pretrain.main(pretrain.with_values(more, bitnet="b158", out=tmp_path / "ternary"))


def test_a_group_longer_than_a_row_is_the_whole_row_and_takes_no_more_memory():
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    row, long = (qat.solve(weight, qat.grid_of(kind)) for kind in ("int4g-1", "int4g1000000000000"))
    assert all(torch.equal(*pair) for pair in zip(row, long))


def test_what_does_not_go_with_it_is_refused(trained, tmp_path):
    _, directory = trained
    with pytest.raises(ValueError, match=r"trained in few bits .int4g32.: --method qat packs it"):
        quantize.main(quantize.Args(tmp_path / "q", directory, "rtn", device="cpu"))
    with pytest.raises(ValueError, match="--method qat packs the bits that were trained; remove --bits 4"):
        quantize.Args(tmp_path / "q", directory, "qat", bits=4)
    with pytest.raises(ValueError, match="trained in few bits"):
        adapters.apply(load_model(directory), LoraArgs(method="lora", r=2))
    with pytest.raises(ValueError, match="--qat_bits 4 needs --bitnet none, found b158"):
        pretrain.Args(bitnet="b158", qat_bits=4)
    with pytest.raises(ValueError, match="--qat_group_size 32 needs --qat_bits"):
        pretrain.Args(qat_group_size=32)
    with pytest.raises(ValueError, match="--qat_group_size should be"):
        pretrain.Args(qat_bits=4, qat_group_size=0)
    assert not (tmp_path / "q").exists()
    path = tmp_path / "damaged"
    shutil.copytree(directory, path)
    config = json.loads((path / "config.json").read_text())
    for bits, size in ((5, 32), (4, "many"), (4, 0), (None, 32)):
        config["quantization_config"] |= {"bits": bits, "group_size": size}
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json: weights that are rounded as they are used need bits"):
            load_model(path)

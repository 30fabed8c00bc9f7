"""Quantized directories whose tensors are missing, of another shape or dtype, or not finite: each is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantize import folder, logits, run  # noqa: F401  (folder: a fixture)

from checkpoint.directory import load_model

LAYER = "model.layers.0.mlp.up_proj"
WRITERS = {  # format -> method and what run() gives besides
    "gptq": {"method": "rtn"},
    "gptq_v2": {"method": "rtn"},
    "awq": {"method": "rtn"},
    "compressed-tensors": {"method": "rtn", "bits": 3},
    "int-quantized": {"method": "smoothquant", "group_size": 128, "format": "compressed-tensors"},
    "bnb": {"method": "llm_int8", "group_size": 128, "calib": ()},
    "nf4": {"method": "nf4", "format": "bnb", "group_size": 128, "calib": ()},
    "fp4": {"method": "fp4", "format": "bnb", "double_quant": False, "group_size": 128, "calib": ()},
}
OPTIONAL = ("g_idx", "weight_format")
DAMAGE = {
    "missing": lambda t: None,
    "a row less": lambda t: t[:-1],
    "a column less": lambda t: t[:, :-1] if t.dim() > 1 else None,
    "twice as many rows": lambda t: torch.cat([t, t]),
    "twice as many columns": lambda t: torch.cat([t, t], 1) if t.dim() > 1 else t[:, None],
    "on its side": lambda t: t.T if t.dim() > 1 and t.shape[0] != t.shape[1] else t[None],
    "empty": lambda t: t[:0],
    "the other kind of numbers": lambda t: t.to(torch.int8) if t.is_floating_point() else t.float(),
    "yes and no": lambda t: t.bool(),
    "not finite": lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else None,
}


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):  # noqa: F811
    """A function: the directory of a format, made once."""
    made = {}

    def directory(name: str):
        if name in ("nf4", "fp4"):
            pytest.importorskip("bitsandbytes")
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "made"
            run(folder, made[name], **{"format": name} | WRITERS[name])
        return made[name]

    return directory


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_tensor_is_named(written, tmp_path, name):
    whole = load_file(written(name) / "model.safetensors")
    shutil.copytree(written(name), tmp_path / "copy")
    names = [each for each in whole if each.startswith(f"{LAYER}.") and whole[each].dim()]
    assert len(names) >= 2
    for each in names:
        for what, damage in DAMAGE.items():
            changed = damage(whole[each])
            if changed is None and (what != "missing" or each.endswith(OPTIONAL)):
                continue
            tensors = {key: tensor.clone() for key, tensor in whole.items() if key != each}
            tensors |= {} if changed is None else {each: changed.contiguous()}
            save_file(tensors, tmp_path / "copy/model.safetensors", {"format": "pt"})
            with pytest.raises(ValueError, match=LAYER) as caught:
                load_model(tmp_path / "copy")
            assert "\n" not in str(caught.value), (each, what)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocksize": 0}, "blocksize should be one of .*, found 0"),
        ({"blocksize": "64"}, "blocksize should be one of .*, found '64'"),
        ({"blocksize": 64.0}, r"blocksize should be one of .*, found 64\.0"),
        ({"nested_blocksize": 0}, "of a kind that is not read here"),
        ({"nested_offset": float("nan")}, "nested_offset should be finite, found nan"),
        ({"nested_offset": "x"}, "weight.quant_state is damaged"),
        ({"dtype": "foo"}, "weight.quant_state is damaged"),
        ({"quant_type": ["nf4"]}, "of a kind that is not read here"),
        ({"shape": "x"}, "weight.quant_state is damaged"),
    ],
)
def test_a_damaged_state_of_bitsandbytes_is_named(written, tmp_path, changes, message):
    shutil.copytree(written("nf4"), tmp_path / "copy")
    path, key = tmp_path / "copy/model.safetensors", f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    tensors = load_file(path)
    state = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{LAYER} do not fit together: .*{message}"):
        load_model(tmp_path / "copy")


@pytest.mark.parametrize("index", [[-1] * 64, [0] * 63 + [2], [7] * 64])
def test_a_group_that_is_not_there_is_named(written, tmp_path, index):
    shutil.copytree(written("gptq"), tmp_path / "copy")
    tensors = load_file(tmp_path / "copy/model.safetensors")
    tensors[f"{LAYER}.g_idx"] = torch.tensor(index, dtype=torch.int32)
    save_file(tensors, tmp_path / "copy/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{LAYER} do not fit together: g_idx has the groups .* makes them 0 to 1"):
        load_model(tmp_path / "copy")


def test_groups_in_the_order_of_activation_are_read_from_compressed_tensors(written, tmp_path):
    """Another program's order of inputs: the same layer with its inputs swapped between the two groups."""
    shutil.copytree(written("compressed-tensors"), tmp_path / "copy")
    path = tmp_path / "copy/model.safetensors"
    tensors = load_file(path)
    before = load_model(tmp_path / "copy").get_submodule(LAYER).quantized()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tensors[f"{LAYER}.weight_g_idx"] = (order // 32).to(torch.int32)
    save_file(tensors, path, {"format": "pt"})
    layer = load_model(tmp_path / "copy").get_submodule(LAYER)
    scales, zeros = before.scales[:, order // 32], before.zeros[:, order // 32].float()  # (out, in) each
    assert torch.equal(layer.dequantize(), scales * (before.codes.float() - zeros))
    assert logits(load_model(tmp_path / "copy")).isfinite().all()


def test_a_group_index_of_nothing_but_minus_1_is_groups_of_neighbours(written, tmp_path):
    """The value that compressed-tensors gives it first."""
    shutil.copytree(written("compressed-tensors"), tmp_path / "copy")
    path = tmp_path / "copy/model.safetensors"
    before, tensors = logits(load_model(tmp_path / "copy")), load_file(path)
    tensors[f"{LAYER}.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    save_file(tensors, path, {"format": "pt"})
    assert torch.equal(logits(load_model(tmp_path / "copy")), before)
    tensors[f"{LAYER}.weight_g_idx"][5] = 0
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{LAYER} do not fit together: weight_g_idx has the groups -1 to 0"):
        load_model(tmp_path / "copy")

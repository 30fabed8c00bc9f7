"""Files of weights: what does not fit or cannot be read is named; large models are mapped, and written in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import config_json, safetensors_files
from checkpoint.directory import load_model, load_weights, save_model
from model import Transformer
from model_args import ModelArgs

SHAPE = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 37, "multiple_of": 8}
NORM = "model.layers.1.input_layernorm.weight"


def saved(folder: Path, **changes) -> Path:
    save_model(folder / "model", Transformer(ModelArgs(**SHAPE | changes)))
    return folder / "model"


def rewrite(directory: Path, change) -> None:
    """Save the tensors of a model directory again after `change(state)`."""
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


# ---- what does not fit is named


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(NORM), f"model does not fit its config.json: it lacks {NORM}$"),
        (lambda s: s.update(extra=torch.ones(1)), "it holds, without a place for them in the model, extra$"),
        (
            lambda s: s.update({NORM: torch.ones(5)}),
            rf"has other shapes: {NORM} is \(5,\), config.json makes it \(16,\)",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if "layers.1" in name],
            r"lacks model\.layers\.1.*, .*, .* and 6 more",
        ),
        (lambda s: s.update({NORM: torch.ones(16, dtype=torch.int8)}), rf"it is quantized: {NORM} is I8, which needs"),
        (lambda s: s.update({"lm_head.weight": torch.ones(5, 16)}), r"other shapes: lm_head\.weight is \(5, 16\)"),
        (
            lambda s: s.update({"lm_head.weight": 2 * s["model.embed_tokens.weight"]}),
            r"contradicts itself: config\.json makes lm_head\.weight the same as model\.embed_tokens\.weight, and",
        ),
        (lambda s: s.update(extra=s.pop(NORM)), rf"lacks {NORM}; it holds, without a place .*, extra$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    directory = saved(tmp_path)
    rewrite(directory, change)
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path):
    directory, model = saved(tmp_path), Transformer(ModelArgs(**SHAPE))
    rewrite(directory, lambda s: s.update({NORM: torch.ones(5)}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="has other shapes"):
        load_weights(model, directory)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_untied_model_needs_its_head(tmp_path):
    directory = saved(tmp_path, tie_embeddings=False)
    rewrite(directory, lambda s: s.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        load_model(directory)


def test_weights_of_the_angles_in_older_files_are_passed_over(tmp_path):
    directory = saved(tmp_path)
    rewrite(directory, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(directory)


def test_a_tied_models_own_copy_of_the_head_is_passed_over(tmp_path):
    directory = saved(tmp_path)
    rewrite(directory, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    model = load_model(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- what cannot be read


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_truncated_weights(tmp_path, keep):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors \(truncated or damaged\)"):
        load_model(path.parent)


@pytest.mark.parametrize(
    "index, message",
    [
        (
            {"weight_map": {"a": "gone.safetensors", "b": "model.safetensors"}},
            r"names 2 files, and gone\.safetensors, model\.safetensors is",
        ),
        ({}, "has no weight_map"),
        ([], "should hold an object, found list"),
        ({"weight_map": {"a": "../other/model.safetensors"}}, "safetensors files beside it, found '../other/model"),
        ({"weight_map": {"a": "/model.safetensors"}}, "safetensors files beside it, found '/model"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, r"safetensors files beside it, found 'pytorch_model\.bin'"),
        ({"weight_map": {"a": "model.safetensors", "b": 3}}, "safetensors files beside it, found 3"),
        ({"weight_map": {"a": ["model.safetensors"]}}, "safetensors files beside it, found "),
    ],
)
def test_an_index_that_leads_nowhere(tmp_path, index, message):
    directory = saved(tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(directory)


def test_folders_that_are_no_model(tmp_path):
    config = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"is no model directory: .* with a config\.json"):
        load_model(tmp_path)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: config\.json lacks the key 'num_attention_heads'"):
        load_model(tmp_path)
    for content, message in (
        ('{"half', "is not valid JSON"),
        ("[" * 100000, "is not valid JSON"),
        ("3", "should hold an object, found int"),
        ('{"model_type": ["llama"]}', r"model_type should be a name, found \['llama'\]"),
    ):
        config.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    config.write_text(json.dumps(config_json.write(ModelArgs(**SHAPE))))
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model\.safetensors"):
        load_model(tmp_path)


def test_an_index_that_is_left_from_older_shards_is_not_followed(tmp_path):
    """transformers leaves it there when a model of several files is saved again as one, and reads the one."""
    directory = saved(tmp_path)
    expected = load_file(directory / "model.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert_same(load_model(directory), expected)


def assert_same(model: Transformer, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert expected.keys() <= state.keys() and all(torch.equal(state[name], each) for name, each in expected.items())


# ---- PyTorch's pickles


def as_bin(directory: Path, shards: int, **options) -> dict[str, torch.Tensor]:
    """Replace the safetensors of a model directory by `.bin` files; return the tensors."""
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", **options)
        return state
    files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(state)}
    for file in files:
        torch.save({name: state[name] for name in state if weight_map[name] == file}, directory / file, **options)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("old", [False, True])
def test_bin_files_are_read(tmp_path, shards, old):
    directory = saved(tmp_path)
    state = as_bin(directory, shards, _use_new_zipfile_serialization=not old)
    assert_same(load_model(directory), state)
    transformers = pytest.importorskip("transformers")
    tokens = torch.arange(12)[None]
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(load_model(directory)(tokens), peer(tokens).logits, atol=1e-5, rtol=1e-4)


class Program:
    """A pickle that makes a directory when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_pickle_that_would_run_code_is_refused_before_it_runs(tmp_path, kind):
    directory, target = saved(tmp_path), tmp_path / "was_here"
    as_bin(directory, 1)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": kind}))
    torch.save({NORM: Program(target)}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused: it is a pickle that asks for posix\.mkdir"):
        load_model(directory)
    assert not target.exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4 not a zip", b"\x80\x02}q\x00.", b"\x80\x04garbage", [1, 2], {"a": 3}]
)
def test_bin_files_that_are_none_are_named(tmp_path, content):
    directory = saved(tmp_path)
    as_bin(directory, 1)
    path = directory / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin (cannot be read|should hold tensors|is refused|is an empty file)"
    ):
        load_model(directory)


def test_a_truncated_bin_file_is_named(tmp_path):
    directory = saved(tmp_path)
    as_bin(directory, 1)
    path = directory / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin (cannot be read|is refused)"):
        load_model(directory)


def test_pickles_of_another_layout_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json.write(ModelArgs(**SHAPE))))
    torch.save({}, tmp_path / "consolidated.00.pth")
    with pytest.raises(FileNotFoundError, match=r"its consolidated.00.pth is a pickle of another layout"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is a file, not a model directory"):
        load_model(tmp_path / "consolidated.00.pth")


def test_a_config_of_more_layers_than_there_are_tensors_is_refused_before_they_are_made(tmp_path):
    path = saved(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**12}))
    with pytest.raises(ValueError, match="1000000000000 layers, and 20 tensors in all"):
        load_model(path.parent)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gptq"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dim": 2**31}, "head_dim should be at most 65536, found 2147483648"),
        ({"head_dim": 2**31, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "head_dim should be at most"),
        ({"vocab_size": 10**15}, r"config\.json makes a model of [\d,]{19,} numbers, and its files have [\d,]+ bytes"),
        ({"hidden_size": 2**62, "head_dim": 8}, r"config\.json makes a model of"),
        ({"intermediate_size": 10**12}, r"config\.json makes a model of"),
        ({"num_hidden_layers": 100_000}, "100000 layers, and 20 tensors in all"),
    ],
)
def test_sizes_that_no_file_holds_are_refused_before_anything_is_built(tmp_path, kind, changes, message):
    path = saved(tmp_path) / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "llama" if kind == "gptq" else kind} | changes
    if kind == "gptq":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(path.parent)


def test_a_model_that_is_larger_than_memory_is_refused_where_it_is_converted(tmp_path, monkeypatch):
    directory = saved(tmp_path)
    monkeypatch.setattr("cli.memory.memory_bytes", lambda: 10_000)
    load_model(directory)  # float32, as it is stored: mapped, not copied
    with pytest.raises(ValueError, match=r"in float64, needs 58\.6 kB of memory, and there are 10\.0 kB"):
        load_model(directory, dtype=torch.float64)


# ---- shards and memory


def test_split():
    state = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 5}  # bytes
    assert safetensors_files.split(state, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert safetensors_files.split(state, 100) == [list("abcde")]


def test_shards_are_read_by_us_and_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = Transformer(ModelArgs(**SHAPE))
    for limit in (6000, 4000, 10**9):  # into the same folder: nothing of the larger numbers stays
        safetensors_files.write_model(
            tmp_path,
            config_json.write(model.args),
            {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"},
            limit,
        )
        files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert (len(files) > 1) == (limit < 10**9) == (tmp_path / "model.safetensors.index.json").is_file()
        assert all((tmp_path / name).stat().st_size < limit + 4000 for name in files)  # headers
        again = load_model(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
        peer, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        tokens = torch.randint(37, (1, 7))
        torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_over_a_model_that_is_mapped_leaves_it_as_it_is(tmp_path, dtype):
    first, second = Transformer(ModelArgs(**SHAPE)).to(dtype), Transformer(ModelArgs(**SHAPE)).to(dtype)
    save_model(tmp_path, first)
    loaded = load_model(tmp_path, dtype=dtype)
    save_model(tmp_path, second)
    assert torch.equal(loaded.lm_head.weight, first.lm_head.weight)
    save_model(tmp_path, loaded)  # itself, over the file it is mapped from no more
    assert torch.equal(load_model(tmp_path, dtype=dtype).lm_head.weight, first.lm_head.weight)


PEAK = """
import sys, torch
from checkpoint.directory import load_model
def load(directory):
    model = load_model(directory, dtype=getattr(torch, sys.argv[3]))
    [p.sum().item() for p in model.parameters()]  # looked at, every one
    return model, int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
_, before = load(sys.argv[1])  # what is imported and set up on the way
_, after = load(sys.argv[2])
print(after - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("kept, dtype", [("float32", "float32"), ("bfloat16", "float32")])
def test_loading_takes_the_memory_of_the_model_once(tmp_path, environment, kept, dtype):
    model = Transformer(ModelArgs(dim=512, n_layers=8, n_heads=8, vocab_size=3000))  # 26.9 M parameters: 103 MiB
    save_model(tmp_path / "large", model.to(getattr(torch, kept)))
    size = model.n_parameters() * 4 / 2**20
    command = [sys.executable, "-c", PEAK, str(saved(tmp_path)), str(tmp_path / "large"), dtype]
    used = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    file = 0 if kept == dtype else size / 2  # what was converted from stays mapped, and the system may drop it
    assert used < size + file + 30, (used, size)  # a second copy would be 103

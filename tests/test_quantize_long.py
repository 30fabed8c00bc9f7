"""quantize.py: widths of single layers, a report of each, interruptions, unusual weights and files."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantize import apart, folder, logits, run  # noqa: F401  (folder: a fixture)

import quantize
from checkpoint.directory import load_model
from quant.grouped import GroupedLinear
from quant.kinds import METHODS
from quantizing import job

MIXED = ("down_proj=8", r"layers\.0\.=3", "down_proj=2")  # the last one comes too late


def widths(directory) -> dict[str, int]:
    return {
        name: layer.bits for name, layer in load_model(directory).named_modules() if isinstance(layer, GroupedLinear)
    }


def expected(name: str) -> int:
    return 8 if "down_proj" in name else 3 if "layers.0." in name else 4


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_layers_of_different_widths(folder, tmp_path, form, method):  # noqa: F811
    result = run(folder, tmp_path / "out", method=method, format=form, override=MIXED)
    found = widths(tmp_path / "out")
    assert found == {name: expected(name) for name in found} and len(found) == 14
    assert {name: layer["bits"] for name, layer in result["layers"].items()} == found
    run(folder, tmp_path / "plain", method=method, format=form)
    dense, mixed, plain = (load_model(path) for path in (folder / "model", tmp_path / "out", tmp_path / "plain"))
    down = "model.layers.1.mlp.down_proj"

    def error(model) -> float:
        miss = model.get_submodule(down).dequantize() - dense.get_submodule(down).weight.detach()
        return float(miss.square().mean())

    assert error(mixed) < (0.05 if method == "rtn" else 0.5) * error(plain)  # gptq corrects the weight itself, too


def test_compressed_tensors_reads_different_widths(folder, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    run(folder, tmp_path / "out", method="rtn", format="compressed-tensors", override=MIXED, symmetric=True)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(10, 58).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(tokens), peer(tokens).logits, atol=1e-4, rtol=0)
    assert "--symmetric True" not in capsys.readouterr().err
    run(folder, tmp_path / "zeros", method="rtn", format="compressed-tensors")
    assert "opens compressed-tensors files only with --symmetric True" in capsys.readouterr().err


@pytest.mark.parametrize(
    "groups, layer, bits",
    [
        ({"a": (["Linear"], 8), "b": (["re:.*down_proj"], 4)}, "mlp.down_proj", 4),
        ({"a": (["Linear"], 8), "b": (["re:.*down_proj"], 4)}, "mlp.up_proj", 8),
        ({"a": (["re:.*proj"], 8), "b": (["model.layers.0.mlp.up_proj"], 4)}, "mlp.up_proj", 4),
    ],
)
def test_groups_of_others_are_told_apart_as_compressed_tensors_does(groups, layer, bits):
    from checkpoint.quantized import read_scheme

    def group(targets, width):
        weights = {"num_bits": width, "type": "int", "strategy": "group", "group_size": 32}
        return {"targets": targets, "weights": weights}

    settings = {name: group(*each) for name, each in groups.items()}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": settings}
    assert read_scheme({"quantization_config": config}).of(f"model.layers.0.{layer}").bits == bits


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"override": ("down_proj",)}, "--override should be REGEX=BITS"),
        ({"override": ("down_proj=5",)}, "--override should be REGEX=BITS .* found down_proj=5"),
        ({"override": ("=8",)}, "--override should be REGEX=BITS"),
        ({"override": ("(=8",)}, "no regular expression"),
        ({"override": ("nowhere=8",)}, r"--override nowhere=8 fits no layer; a name is, for instance, model\.layers"),
        ({"override": ("down=8",), "format": "awq"}, "--override needs a --format"),
        (
            {"override": ("down=8",), "method": "int8", "group_size": 128, "calib": ()},
            "--override needs --method gptq, awq.*rtn.*, found int8",
        ),
    ],
)
def test_overrides_that_cannot_be_are_refused(folder, tmp_path, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_settings_of_single_layers_that_cannot_be_are_named(folder, tmp_path):  # noqa: F811
    run(folder, tmp_path / "out", method="rtn", override=("down=8",))
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    for dynamic, message in (
        ({"+:(": {"bits": 8}}, "no regular expression"),
        ({"a": {"bits": 5}}, "found 5"),
        ([1], "map"),
    ):
        config["quantization_config"]["dynamic"] = dynamic
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "out")


# ---- the report


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "rtn"])
def test_a_report_of_each_layer_lies_beside_the_model(folder, tmp_path, method, capsys):  # noqa: F811
    changes = {"group_size": 128} if method == "smoothquant" else {}
    run(folder, tmp_path / "out", method=method, **changes)
    report = json.loads((tmp_path / "out" / quantize.REPORT).read_text())
    assert report["settings"]["method"] == method and len(report["layers"]) == 14
    for layer in report["layers"].values():
        assert layer["bits"] == (8 if method == "smoothquant" else 4) and 0 < layer["weight_error"] < 0.1
        if method == "gptq":
            assert {"error_before", "error_after", "damping", "dead"} <= layer.keys()
        if method == "awq":
            assert layer["error_after"] < 1.5 * layer["error_before"]
    out = capsys.readouterr().out
    assert "largest error: model.layers." in out and quantize.REPORT in out


def test_dead_inputs_and_more_damping_are_told():
    layers = {
        "a": {"weight_error": 0.1, "error_after": 0.2, "damping": 0.01, "dead": 3},
        "b": {"weight_error": 0.2, "error_after": 0.1, "damping": 0.1, "dead": 1},
    }
    lines = quantize.notable(layers, quantize.Args(Path("out"), calib=(Path("x"),)))
    assert lines == [
        "largest error: a, 20.00% of its output",
        "more damping than asked for: 1 layers, b the first",
        "inputs that are always 0 in the calibration text: 4",
    ]


# ---- interruptions


def stopped_after(monkeypatch, layers: int) -> None:
    """Let a signal arrive when so many layers are done."""
    add, done = job.Progress.add, []

    def count(self, amount: int = 1) -> None:
        add(self, amount)
        done.append(amount)
        if len(done) == layers:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(job.Progress, "add", count)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_after_a_signal_the_same_command_goes_on_to_the_same_bytes(folder, tmp_path, method, monkeypatch, capsys):  # noqa: F811
    changes = {"method": method} | ({"group_size": 128} if method == "smoothquant" else {"override": ("up_proj=8",)})
    changes |= {"format": "gptq"} if method == "gptq" else {}
    whole = run(folder, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        stopped_after(patch, 9)  # in the second block
        with pytest.raises(SystemExit) as stop:
            run(folder, tmp_path / "out", **changes)
    assert stop.value.code == 143 and "stopped after 1 of 2 blocks; the same command" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.begun").glob("*.safetensors"))) == 1
    again = run(folder, tmp_path / "out", **changes)
    assert "has 1 of 2 blocks already" in capsys.readouterr().err
    assert again["layers"] == whole["layers"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_blocks_of_other_settings_are_not_taken(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    with monkeypatch.context() as patch:
        stopped_after(patch, 9)  # in the second block
        with pytest.raises(SystemExit):
            run(folder, tmp_path / "out")
    assert (tmp_path / "out.begun/block_0000.safetensors").is_file()
    run(folder, tmp_path / "out", seed=1)
    assert "already" not in capsys.readouterr().err
    run(folder, tmp_path / "whole", seed=1)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_block_is_named_and_the_next_run_begins_again(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    with monkeypatch.context() as patch:
        stopped_after(patch, 9)  # in the second block
        with pytest.raises(SystemExit):
            run(folder, tmp_path / "out")
    path = tmp_path / "out.begun/block_0000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"block_0000\.safetensors cannot be read as safetensors .*the same command"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.begun").exists()
    capsys.readouterr()
    run(folder, tmp_path / "out")
    assert "already" not in capsys.readouterr().err


def test_what_else_lies_where_blocks_are_kept_is_left_as_it_is(folder, tmp_path):  # noqa: F811
    (tmp_path / "out.begun").mkdir()
    (tmp_path / "out.begun/description.json.part").write_text("{")  # after a kill: nobody's
    run(folder, tmp_path / "out")
    (tmp_path / "other.begun").mkdir()
    (tmp_path / "other.begun/thesis.txt").write_text("years of work")
    (tmp_path / "third.begun").write_text("years of work")
    for name in ("other", "third"):
        with pytest.raises(ValueError, match=rf"{name}\.begun, where quantized blocks are kept .* is something else"):
            run(folder, tmp_path / name)
    assert (tmp_path / "other.begun/thesis.txt").read_text() == "years of work"
    assert (tmp_path / "third.begun").read_text() == "years of work"


def test_a_signal_from_outside_ends_the_script(folder, tmp_path):  # noqa: F811
    command = [sys.executable, "quantize.py", "--model", folder / "model", "--calib", folder / "text.txt"]
    command += ["--group_size", "32", "--calib_tokens", "40000", "--seq_len", "50", "--out", tmp_path / "out"]
    root = Path(quantize.__file__).parent
    process = subprocess.Popen(list(map(str, command)), cwd=root, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "calibration:" in line:
            break
    process.terminate()
    assert process.wait(60) in (143, -15)
    process.stderr.close()
    assert not (tmp_path / "out").exists()


# ---- bad input


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn", "int8", "smoothquant", "llm_int8", "nf4"])
def test_rows_and_columns_of_zeros_stay_zeros(folder, tmp_path, method):  # noqa: F811
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    shutil.copytree(folder / "model", tmp_path / "model")
    path, name = tmp_path / "model/model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[f"{name}.weight"][3] = 0
    tensors["model.layers.0.mlp.down_proj.weight"][:, 5] = 0
    tensors["model.layers.1.self_attn.q_proj.weight"][:] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0  # so that all inputs of down_proj are 0
    save_file(tensors, path, {"format": "pt"})
    text = METHODS[method].text
    options = {"group_size": 32} if "group_size" in METHODS[method].flags else {}
    if text:
        options |= {"calib": (folder / "text.txt",), "calib_tokens": 500, "seq_len": 50}
    quantize.main(quantize.Args(tmp_path / "out", tmp_path / "model", method, device="cpu", **options))
    model = load_model(tmp_path / "out")
    assert not model.get_submodule(name).dequantize()[3].any()
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        assert not model.get_submodule(f"model.layers.1.{name}").dequantize().any()
    assert logits(model).isfinite().all()


def test_a_truncated_file_of_a_quantized_model_is_named(folder, tmp_path):  # noqa: F811
    run(folder, tmp_path / "out", method="rtn")
    path = tmp_path / "out/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors \(truncated or damaged\)"):
        load_model(tmp_path / "out")


def test_text_without_a_word_is_refused(folder, tmp_path):  # noqa: F811
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"fewer than one row|no text|empty"):
        run(folder, tmp_path / "out", calib=(tmp_path / "empty.txt",))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.begun").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_activations_that_overflow_are_named_by_their_layer(folder, tmp_path, method):  # noqa: F811
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e25  # finite, but their product is not
    save_file(tensors, path, {"format": "pt"})
    options = {"calib": (folder / "text.txt",), "calib_tokens": 500, "seq_len": 50, "device": "cpu"}
    with pytest.raises(
        ValueError, match=r"model\.layers\.1.* not finite on the calibration text: the activations overflow"
    ):
        quantize.main(quantize.Args(tmp_path / "out", tmp_path / "model", method, **options))
    assert not list(tmp_path.glob("*out*"))  # nor the blocks that were done

"""quantize.py on small models: files that are read again as they were computed, and what it refuses."""

import json

import pytest
import torch
from helpers.tiny_chat_model import TEXT, save_chat_model
from safetensors.torch import load_file, save_file

import fine_tuning
import quantize
from bins.token_bin import BinWriter
from checkpoint import peft
from checkpoint.directory import load_model, load_whole_model, save_model
from checkpoint.quantized import read_scheme
from cli.args import parse
from decoding.generate import generate
from decoding.params import SamplingParams
from lora import adapters
from lora.spec import LoraArgs
from model import Transformer
from quant.grouped import GroupedLinear
from quant.kinds import PACKED
from quant.linear import QuantizedLinear
from quantizing import job
from tokenizer import load_tokenizer
from tuning.args import DataArgs

FORMATS = PACKED
SHAPE = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96}


IDS: list[int] = []


def save_calm_model(folder, **shape):
    """A chat model whose weights are small enough for an error in one layer to stay small in the next."""
    save_chat_model(folder, **shape)
    path = folder / "model.safetensors"
    tensors = {name: t * (0.3 if ".layers." in name and t.dim() == 2 else 1) for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model `model`, calibration texts, conversations."""
    folder = tmp_path_factory.mktemp("quantize")
    save_calm_model(folder / "model", **SHAPE)
    IDS[:] = load_tokenizer(folder / "model").encode(TEXT)
    (folder / "text.txt").write_text((TEXT + "\n\n") * 60, encoding="utf8")
    turns = [{"role": "user", "content": "床前明月光"}, {"role": "assistant", "content": TEXT}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    return folder


def run(folder, out, **changes) -> dict:
    settings = {"group_size": 32, "calib": (folder / "text.txt",), "calib_tokens": 1000, "seq_len": 50, "device": "cpu"}
    settings |= {"model": folder / "model", "out": out} | changes
    if not quantize.METHODS[settings.get("method", "gptq")].text:  # what the others would refuse
        unread = ["calib_tokens", "seq_len"] + ["calib"] * ("calib" not in changes)
        settings = {name: value for name, value in settings.items() if name not in unread}
    return quantize.main(quantize.Args(**settings))


def logits(model) -> torch.Tensor:
    """Logits on the text that the models are calibrated on."""
    tokens = torch.tensor([IDS[:60]])
    with torch.no_grad():
        return model(tokens)


def apart(a, b) -> float:
    """Squared distance of two models' logits, as a share of the second's."""
    return float((logits(a) - logits(b)).square().mean() / logits(b).square().mean())


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_computes_what_was_quantized(folder, tmp_path, method, form, monkeypatch):
    kept = {}
    save = job.quantized.save
    monkeypatch.setattr(
        job.quantized, "save", lambda d, model, *a, **k: kept.update(m=model) or save(d, model, *a, **k)
    )
    result = run(folder, tmp_path / "out", method=method, format=form)
    again = load_model(tmp_path / "out")
    layers = [name for name, module in again.named_modules() if isinstance(module, GroupedLinear)]
    assert len(layers) == 14 and set(result["layers"]) == set(layers)
    dense = load_model(folder / "model")
    for name in layers:
        ours, saved = kept["m"].get_submodule(name).quantized(), again.get_submodule(name).quantized()
        assert torch.equal(ours.codes, saved.codes) and torch.equal(ours.zeros, saved.zeros)
        torch.testing.assert_close(ours.scales, saved.scales, rtol=1e-3, atol=0)  # float16 in some formats
    assert apart(again, dense) < 0.05
    assert apart(again, kept["m"]) < 1e-5


def test_more_bits_and_calibration_lose_less(folder, tmp_path):
    dense = load_model(folder / "model")

    def loss(name: str, **changes) -> float:
        run(folder, tmp_path / name, **changes)
        return apart(load_model(tmp_path / name), dense)

    by_bits = [loss(f"b{bits}", bits=bits) for bits in (2, 3, 4, 8)]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[-1] < 0.01 * by_bits[0]
    assert loss("gptq", bits=3) < loss("rtn", bits=3, method="rtn")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_layer_of_awq_loses_more_than_rounding(folder, tmp_path, bits):
    """The whole range is one of those that are tried, on all of the calibration text."""
    layers = run(folder, tmp_path / "awq", method="awq", bits=bits)["layers"]
    assert all(layer["error_after"] <= layer["error_before"] * (1 + 1e-5) for layer in layers.values())
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        found = [layer for full, layer in layers.items() if full.endswith(name)]
        assert any(layer["error_after"] < 0.99 * layer["error_before"] for layer in found), name


@pytest.mark.parametrize("name", ["text.txt", "chats.jsonl", "bins"])
def test_every_kind_of_calibration_text(folder, tmp_path, name):
    path = folder / name
    if name == "bins":
        tokenizer = load_tokenizer(folder / "model")
        with BinWriter(tmp_path / "calib", tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
            writer.add([*tokenizer.encode(TEXT * 20), tokenizer.eos_id])
        path = tmp_path / "calib.bin"
    report = run(folder, tmp_path / "out", calib=(path,))["layers"]
    assert all(layer["error_after"] < layer["error_before"] for layer in report.values())


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        run(folder, tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    run(folder, tmp_path / "c", seed=1)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != first


def test_a_width_that_gptq_cannot_keep_is_padded_and_the_config_says_so(folder, tmp_path, capsys):
    save_calm_model(tmp_path / "odd", **SHAPE | {"hidden_dim": 43})
    run(folder, tmp_path / "out", model=tmp_path / "odd", method="rtn", group_size=-1, bits=8)
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 64
    assert "43 is padded with zeros to 64" in capsys.readouterr().err
    assert apart(load_model(tmp_path / "out"), load_model(tmp_path / "odd")) < 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"calib": ()}, "--method gptq needs calibration text"),
        ({"bits": 3, "format": "awq"}, "--format awq needs --bits 4, found 3"),
        (
            {"bits": 4, "method": "int8", "calib": (), "group_size": 128},
            "--bits should be 8 with --method int8, found 4",
        ),
        (
            {"method": "nf4", "format": "gptq", "calib": (), "group_size": 128},
            "--format should be bnb with --method nf4, found gptq",
        ),
        ({"method": "rtn", "threshold": 5.0}, r"--threshold 5\.0 needs --method llm_int8, found rtn"),
        (
            {"method": "int8", "calib": (), "group_size": 32},
            "--group_size 32 needs --method gptq, awq.*rtn.*, found int8",
        ),
        (
            {"method": "nf4", "group_size": 128, "calib": ("short.txt",)},
            "--calib needs --method gptq, awq.*, found nf4",
        ),
        ({"method": "llm_int8", "calib": (), "group_size": 128, "threshold": -1.0}, "--threshold should be"),
        ({"damping": 0.0}, "--damping should be above 0"),
        ({"group_size": 0}, "--group_size should be -1"),
        ({"group_size": 40, "format": "compressed-tensors"}, "--group_size 40 does not divide the 64 inputs"),
        ({"seq_len": 150, "calib_tokens": 100, "calib": ("short.txt",)}, "are fewer than one row of 150"),
        ({"calib": ("nowhere.txt",)}, r"nowhere\.txt does not exist"),
        ({"model": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(folder, tmp_path, changes, message):
    (tmp_path / "short.txt").write_text("明月")
    for name in ("calib", "model"):
        if value := changes.get(name):
            changes = changes | {
                name: tmp_path / value if name == "model" else tuple(tmp_path / each for each in value)
            }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "flag, value, bounds",
    [
        ("calib_tokens", "0", "1 to 2,147,483,647"),
        ("seq_len", "-1", "0 to"),
        ("seed", "-1", "0 to"),
        ("group_size", "-2", "-1 to 1,048,576"),
        ("group_size", "1" + "0" * 20, "-1 to 1,048,576"),
        ("propagation", "nan", "0 to 1, found nan"),
        ("propagation", "1.5", "0 to 1, found 1.5"),
        ("damping", "nan", "above 0 and below 1"),
        ("damping", "1", "above 0 and below 1"),
        ("alpha", "2", "0 to 1"),
    ],
)
def test_a_number_that_cannot_be_is_refused_with_its_flag(flag, value, bounds):
    method = "smoothquant" if flag == "alpha" else "gptq"
    with pytest.raises(SystemExit) as caught:
        parse(quantize.Args, "quantize", ["--method", method, "--calib", "x", "--out", "y", f"--{flag}", value])
    assert f"--{flag} should be" in str(caught.value) and bounds in str(caught.value)


@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors"])
def test_a_bfloat16_model_keeps_its_dtype_and_has_the_codes_of_its_float32_copy(folder, tmp_path, form):
    model, tokenizer = load_model(folder / "model", dtype=torch.bfloat16), load_tokenizer(folder / "model")
    save_model(tmp_path / "half", model, tokenizer)
    save_model(tmp_path / "full", load_model(tmp_path / "half"), tokenizer)
    for name in ("half", "full"):
        run(folder, tmp_path / f"{name}_4bit", model=tmp_path / name, format=form)
    ours, theirs = (load_file(tmp_path / f"{name}_4bit/model.safetensors") for name in ("half", "full"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.float(), theirs[name].float()), name
    kept = {name for name, tensor in ours.items() if tensor.dtype == torch.bfloat16}
    assert kept == {name for name, _ in model.named_parameters() if "_proj" not in name} | (
        {"lm_head.weight"} if form == "gptq_v2" else set()
    )
    assert json.loads((tmp_path / "half_4bit/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_file_of_the_model_is_not_changed(folder, tmp_path, method):
    before = (folder / "model/model.safetensors").read_bytes()
    run(folder, tmp_path / "out", method=method)
    assert (folder / "model/model.safetensors").read_bytes() == before


def test_a_directory_that_is_there_is_not_replaced(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        run(folder, tmp_path / "out")


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    monkeypatch.setattr(quantize, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(NotADirectoryError, match=r"--out .*file/in/it: .*file is a file, where a folder is expected"):
        run(folder, tmp_path / "file/in/it")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"--out .*new/out: no permission to write to .*; choose another --out"):
        run(folder, tmp_path / "new/out")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_bin_of_another_tokenizer_is_refused(folder, tmp_path):
    with BinWriter(tmp_path / "other", 5000, 2, "another") as writer:
        writer.add([4000] * 500 + [2])
    with pytest.raises(ValueError, match="tokenizer"):
        run(folder, tmp_path / "out", calib=(tmp_path / "other.bin",))


def test_activations_that_are_not_finite_are_refused(folder, tmp_path):
    save_chat_model(tmp_path / "model", **SHAPE)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        run(folder, tmp_path / "out", model=tmp_path / "model")
    assert not (tmp_path / "out").exists()


# ---- reading quantized directories


@pytest.fixture
def made(folder, tmp_path):
    run(folder, tmp_path / "made", method="rtn")
    return tmp_path / "made"


def change_tensors(directory, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.qzeros"), r"lacks model\.layers\.0\.mlp\.up_proj\.qzeros"),
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.scales": torch.ones(2, 5).half()}),
            "scales is float16 of shape",
        ),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(9, 96).int()}), "qweight is int32 of"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}), "has a bias"),
        (lambda t: t.update({"extra.weight": torch.ones(3)}), r"extra\.weight"),
    ],
)
def test_damaged_tensors_are_named(made, change, message):
    change_tensors(made, change)
    with pytest.raises(ValueError, match=message):
        load_model(made)


def compressed(form: str, **changes) -> dict:
    """Settings of compressed-tensors with two groups of 8-bit layers, one of them changed."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    groups = {"whole": group, "changed": group | changes}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "exl3", "bits": 4}, "'exl3' are not read here"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "2, 3, 4 or 8 bits, found 5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "many"}, "group_size"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin' is not read here"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv' is not read here"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": {}}},
            "the formats pack-quantized and int-quantized are read here, found",
        ),
        ("gptq", "should be a mapping"),
        ({"quant_method": ["gptq"], "bits": 4}, r"a text as its quant_method, found \['gptq'\]"),
        ({"quant_method": {}, "quantization_mode": "online"}, "a text as its quant_method, found {}"),
        ({"quant_method": "gptq", "bits": 4.0, "group_size": 32}, r"2, 3, 4 or 8 bits, found 4\.0"),
        ({"quant_method": "awq", "bits": 4, "group_size": 10**30}, "group_size of -1 or more than 0, found 1000"),
        ({"quant_method": "gptq", "bits": 4, "group_size": True}, "group_size of -1 or more than 0, found True"),
        (compressed("pack-quantized", targets=3), "targets of quantization_config should be a list of texts, found 3"),
        (compressed("pack-quantized", targets="Linear"), "should be a list of texts, found 'Linear'"),
        (compressed("pack-quantized", targets=["Linear", None]), "should be a list of texts, found .*None"),
        (compressed("int-quantized", input_activations="x"), "found 'x' beside int-quantized"),
        (compressed("int-quantized", input_activations=[1]), r"found \[1\] beside int-quantized"),
    ],
)
def test_settings_that_are_not_read_are_named(made, settings, message):
    path = made / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    with pytest.raises(ValueError, match=message):
        load_model(made)


def test_a_model_without_settings_has_no_scheme():
    assert read_scheme({"model_type": "llama"}) is None


def test_a_zero_bias_of_other_writers_is_passed_over(made):
    before = logits(load_model(made))
    change_tensors(made, lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(96).half()}))
    assert torch.equal(logits(load_model(made)), before)


def test_dtype_and_layers_of_a_loaded_model(made):
    model = load_model(made, dtype=torch.bfloat16)
    assert isinstance(model, Transformer) and model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(isinstance(block.mlp.up_proj, QuantizedLinear) for block in model.model.layers)
    assert logits(model).isfinite().all()


def test_it_is_neither_trained_in_full_nor_saved_as_dense_nor_quantized_again(folder, made, tmp_path):
    message = "weights of this model are quantized"
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "again", load_model(made))
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "twice", model=made)
    with pytest.raises(ValueError, match=message):
        load_whole_model(made, to_train=True)
    tune = {"init_from": made, "out": tmp_path / "run", "data": DataArgs(train=(folder / "chats.jsonl",))}
    with pytest.raises(ValueError, match=message):
        fine_tuning.main(fine_tuning.Args(**tune))
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_refused_without_text_too(folder, tmp_path):
    save_chat_model(tmp_path / "model", **SHAPE)
    change_tensors(tmp_path / "model", lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj are not finite"):
        run(folder, tmp_path / "out", model=tmp_path / "model", method="rtn")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_on_quantized_weights_is_trained_saved_and_merged(made, tmp_path, method):
    model = load_model(made)
    before = logits(model)
    adapters.apply(model, LoraArgs(method=method, r=2, targets="attention"))
    assert torch.equal(logits(model), before) or method == "dora"
    torch.testing.assert_close(logits(model), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = torch.tensor([IDS[:40]])
    for _ in range(3):
        loss, n = model(tokens[:, :-1], tokens[:, 1:])
        (loss / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    peft.save(tmp_path / "adapter", model, base=str(made))
    again = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), after, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, QuantizedLinear) for module in again.modules())
    save_model(tmp_path / "merged", again, load_tokenizer(made))
    run_again = {"method": "rtn", "calib": (), "bits": 8}
    quantize.main(
        quantize.Args(model=tmp_path / "merged", out=tmp_path / "twice", group_size=32, device="cpu", **run_again)
    )
    assert apart(load_model(tmp_path / "twice"), again) < 1e-3


def test_a_sampled_answer_comes_out_of_a_quantized_model(made):
    model = load_model(made).eval()
    (ids,) = generate(model, [IDS[:10]], SamplingParams(temperature=0, max_new_tokens=5))
    expected = list(IDS[:10])
    for _ in range(5):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(ids) == expected[10:]

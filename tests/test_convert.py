"""convert.py: what it writes says the same as what it was made of, in transformers and here."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.lora_models import our_model, save_as_hf, shake, some_tokens
from helpers.tiny_chat_model import save_chat_model
from transformers import AutoConfig, AutoModelForCausalLM

import convert
from checkpoint import peft
from checkpoint.directory import load_model
from checkpoint.history import made_from
from convert import Merge
from lora import adapters
from lora.adapters import LoraArgs
from quant.kinds import KINDS
from tokenizer import load_tokenizer


@pytest.fixture
def trained(tmp_path: Path):
    """A function that makes tmp_path/base and tmp_path/adapter, and returns the adapted model in float32."""

    def make(args: LoraArgs, tied: bool = False, dtype: torch.dtype = torch.float32):
        model = our_model(tied).to(dtype)
        save_as_hf(model, tmp_path / "base")
        model.float()
        adapters.apply(model, args)
        shake(model)
        peft.save(tmp_path / "adapter", model)
        return model

    return make


def merged(folder: Path, **options) -> Path:
    convert.merge(Merge(folder / "base", folder / "adapter", folder / "out", **options))
    return folder / "out"


@pytest.mark.parametrize("method", list(adapters.METHODS))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_merged_model_says_what_the_adapted_one_says(method, tied, trained, tmp_path):
    model = trained(LoraArgs(method, r=3, train_embed_norm=True), tied)
    tokens = some_tokens()
    out = merged(tmp_path)
    wanted = model(tokens)
    # float32: sums of 40 products, of weights of size 0.2 with norms around 1, through two layers
    torch.testing.assert_close(load_model(out)(tokens), wanted, rtol=0, atol=2e-5)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(theirs(tokens).logits, wanted, rtol=0, atol=2e-5)
    assert "lora" not in "".join(path.name for path in out.iterdir())
    assert made_from(out) == (tmp_path / "adapter", None)  # where a model card finds the run


@pytest.mark.parametrize("base", KINDS)
def test_a_quantized_base_is_made_dense_and_then_added_to(base, trained, tmp_path, capsys):
    if KINDS[base].package:
        pytest.importorskip("bitsandbytes")
    model = trained(LoraArgs("lora", r=3, base=base))
    tokens = some_tokens()
    for how in ("auto", base):
        out = convert.merge(Merge(tmp_path / "base", tmp_path / "adapter", tmp_path / how, base=how))["model"]
        torch.testing.assert_close(load_model(Path(out))(tokens), model(tokens), rtol=0, atol=2e-5)
        assert f"base, its base in {base}: {out}" in capsys.readouterr().out
    convert.merge(Merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "full", base="full"))
    assert f"{tmp_path / 'base'}: {tmp_path / 'full'}" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_the_sum_is_made_in_float32_and_rounded_once(dtype, trained, tmp_path):
    model = trained(LoraArgs("lora", r=3), dtype=torch.bfloat16)
    written = load_model(merged(tmp_path, dtype=dtype)).state_dict()
    kept = torch.bfloat16 if dtype == "auto" else torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(kept).removeprefix("torch.")
    layer = model.model.layers[1].mlp.up_proj
    exact = layer.weight + 16 / 3 * layer.lora["default"].lora_B @ layer.lora["default"].lora_A
    one_ulp = 2**-8 if dtype == "auto" else 2**-22
    torch.testing.assert_close(
        written["model.layers.1.mlp.up_proj.weight"], exact.to(kept).float(), rtol=one_ulp, atol=1e-6
    )


def test_the_tokenizer_comes_along(tmp_path):
    save_chat_model(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapters.apply(model, LoraArgs("lora", r=2))
    peft.save(tmp_path / "adapter", model)
    out = merged(tmp_path)
    assert load_tokenizer(out).sha256() == load_tokenizer(tmp_path / "base").sha256()
    stops = [json.loads((d / "generation_config.json").read_text())["eos_token_id"] for d in (out, tmp_path / "base")]
    assert stops[0] == stops[1]


def test_another_architecture_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    shape = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 32, "max_position_embeddings": 32}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).eval()
    model.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["query_key_value", "dense_4h_to_h"]))
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = some_tokens()
    torch.testing.assert_close(load_model(merged(tmp_path))(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_one_half_of_a_tied_pair_is_no_model(tmp_path):
    peft = pytest.importorskip("peft")
    save_as_hf(our_model(tied=True).float(), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs = peft.get_peft_model(base, config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"trains the embedding apart from the head, and in --model .* they are tied"):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced(trained, tmp_path):
    trained(LoraArgs("lora", r=2))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"--out .*out exists already: choose another"):
        merged(tmp_path)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "convert.py expects a command (merge, tokens, export, import, data"),
        (["shrink"], "convert.py expects a command (merge, tokens"),
        (["merge", "--model", "m", "--adapter", "nowhere", "--out", "o"], "nowhere does not exist; give --adapter"),
    ],
)
def test_from_the_command_line(words, sentence, environment):
    script = Path(__file__).parents[1] / "convert.py"
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help(environment):
    script = Path(__file__).parents[1] / "convert.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and all(f"convert.py {name}" in done.stdout for name in convert.COMMANDS)


def test_more_tokens(tmp_path, capsys):
    """What is written and what is refused; tests/test_checkpoint_extend.py has how the rows are made."""
    base = save_chat_model(tmp_path / "base")
    before, size = load_model(base), load_tokenizer(base).vocab_size
    args = convert.Tokens(base, tmp_path / "more", add_special_tokens=("<|tool|>",), vocab_multiple_of=8)
    convert.tokens(args)
    assert f"rows: {size} -> {-(-(size + 1) // 8) * 8}" in capsys.readouterr().out
    after, tokens = load_model(tmp_path / "more"), torch.arange(9)[None]
    assert load_tokenizer(tmp_path / "more").special["<|tool|>"] == size
    torch.testing.assert_close(after(tokens)[..., :size], before(tokens), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="exists already"):
        convert.tokens(args)
    with pytest.raises(ValueError, match="--add_tokens and --add_special_tokens are both empty"):
        convert.tokens(convert.Tokens(base, tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"--model .* has no tokenizer"):
        convert.tokens(convert.Tokens(save_as_hf(our_model(), tmp_path / "bare"), tmp_path / "none", ("a",)))


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("both", [True, False], ids=["both trained", "one trained"])
def test_a_tied_pair_that_came_apart_gets_two_matrices(kind, both, tmp_path):
    """The error names the flag, and with it both tables are those of the adapter."""
    torch.manual_seed(0)
    if kind == "ours":
        save_as_hf(our_model(tied=True).float(), tmp_path / "base")
    else:
        size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
        config = AutoConfig.for_model("gpt_neox", vocab_size=37, tie_word_embeddings=True, **size)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    names = ["embed_tokens" if kind == "ours" else "embed_in", *["lm_head"] * both]
    target = ["q_proj"] if kind == "ours" else ["query_key_value"]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=target, modules_to_save=names))
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    args = Merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match=r"tied in this model: .* merge --untie True|they are tied: add --untie True"):
        convert.merge(args)
    convert.merge(dataclasses.replace(args, untie=True))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = some_tokens()
    torch.testing.assert_close(found(tokens).logits, theirs.eval()(tokens).logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(load_model(tmp_path / "out")(tokens), found(tokens).logits, rtol=0, atol=2e-5)


def test_another_base_than_the_adapter_names_is_told(trained, tmp_path, capsys):
    trained(LoraArgs("lora", r=3))
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for number, (named, told) in enumerate(
        [(tmp_path / "base", False), (tmp_path / "adapter", True), ("somebody/base", False), ("somebody/other", True)]
    ):
        config.write_text(json.dumps(settings | {"base_model_name_or_path": str(named)}))
        convert.merge(Merge(tmp_path / "base", tmp_path / "adapter", tmp_path / f"out{number}"))
        assert (f"was trained on {named}, and --model is" in capsys.readouterr().err) == told, named

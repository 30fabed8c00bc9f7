"""What changes when training goes on from a checkpoint: how far it reaches, its tokens; and what is refused."""

import math

import pytest
import torch
from helpers.tiny_chat_model import chat_tokenizer

import rope
from checkpoint import extend
from checkpoint.directory import load_model, save_model
from checkpoint.extend import add_tokens, changed_fields, resize, set_length, spellings, stretch_positions
from model import Transformer
from model_args import ModelArgs, RopeArgs
from tokenizer import load_tokenizer

SHAPE = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 37, "multiple_of": 8, "max_seq_len": 32}


# ---- the shape


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dim": 320},
        {"dim": 64, "n_heads": 4, "hidden_dim": 100},
        {"n_kv_heads": 1},
        {"n_kv_heads": 1, "max_seq_len": 9, "head_dim": 6, "tie_embeddings": False},
    ],
)
def test_what_was_set_is_told_from_what_follows_from_it(changes):
    assert changed_fields(ModelArgs(**changes)) == changes


def test_a_flag_that_contradicts_the_checkpoint_is_refused(tmp_path):
    model = ModelArgs(**SHAPE)
    extend.check_shape(model, changed_fields(ModelArgs(**SHAPE | {"max_seq_len": 99})), tmp_path)
    for name, value in {"dim": 32, "n_layers": 5, "tie_embeddings": False, "rope_theta": 5e5, "vocab_size": 9}.items():
        with pytest.raises(
            ValueError, match=rf"--model\.{name} is {value}, and the model in .* has {getattr(model, name)}"
        ):
            extend.check_shape(model, {name: value}, tmp_path)


def small() -> Transformer:
    model = Transformer(ModelArgs(**SHAPE))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize(
    "asked, max_seq_len, kind, factor, reach",
    [
        (RopeArgs(), 128, "yarn", 4.0, 128),  # the factor that the length asks for
        (RopeArgs("yarn", 4.0), None, "yarn", 4.0, 128),  # the length that the factor gives
        (RopeArgs("linear", 4.0), 64, "linear", 4.0, 64),
        (RopeArgs("dynamic"), 64, "dynamic", 2.0, 64),
        (RopeArgs("clex"), 64, "clex", None, 64),
    ],
)
def test_stretching_is_loading_a_model_made_so(tmp_path, asked, max_seq_len, kind, factor, reach):
    model = small()
    said = stretch_positions(model, asked, max_seq_len)
    assert said.startswith(f"positions: {kind} (")
    assert said.endswith(f"from 32 to {reach} tokens")
    assert (model.args.max_seq_len, model.args.rope_scaling["rope_type"]) == (reach, kind)
    assert model.args.rope_scaling.get("factor") == factor
    fresh = Transformer(model.args)
    fresh.load_state_dict(model.state_dict())
    tokens = torch.randint(37, (2, reach))
    assert torch.equal(model.eval()(tokens), fresh.eval()(tokens))
    save_model(tmp_path, model)
    assert torch.equal(load_model(tmp_path).eval()(tokens), fresh(tokens))
    assert stretch_positions(model, RopeArgs(), None) == stretch_positions(model, RopeArgs(), reach) == ""
    trained = [name for name, p in model.named_parameters() if name.startswith("rope.") and p.requires_grad]
    assert bool(trained) == (kind == "clex")


def test_clex_that_goes_on_keeps_what_it_has_learned():
    model = small()
    stretch_positions(model, RopeArgs("clex"), 64)
    torch.nn.init.normal_(model.rope.proj_down)
    learned = model.rope.proj_down.clone()
    stretch_positions(model, RopeArgs(), 128)
    assert isinstance(model.rope, rope.Clex)
    assert torch.equal(model.rope.proj_down, learned)


@pytest.mark.parametrize(
    "asked, max_seq_len, message",
    [
        (RopeArgs(), 16, "--model.max_seq_len 16 is shorter than the checkpoint's 32"),
        (RopeArgs("yarn", 2.0), 128, "factor 2 on a window of 32 covers 64 positions"),
        (RopeArgs("spiral"), 64, "there is no such type"),
        (RopeArgs("yarn"), None, "nothing to extend"),
    ],
)
def test_positions_that_make_no_sense(asked, max_seq_len, message):
    with pytest.raises(ValueError, match=message):
        stretch_positions(small(), asked, max_seq_len)


@pytest.mark.parametrize("factor", [0.0, 0.5, -2.0, math.nan, math.inf])
def test_a_factor_that_stretches_nothing(factor):
    with pytest.raises(ValueError, match=r"rope\.factor should be a finite number, 1 or more, found"):
        RopeArgs("yarn", factor)


# ---- tokens


@pytest.mark.parametrize("kind", ["ours", "llama's, with a space before every text"])
def test_added_tokens_are_the_same_for_us_and_for_transformers(tmp_path, request, kind):
    transformers = pytest.importorskip("transformers")
    if kind == "ours":
        old = chat_tokenizer(tmp_path)
    else:
        old = load_tokenizer(request.getfixturevalue("shared") / "models" / "stories260K_hf")
    new = add_tokens(old, ["butterfly", " 明月", "two words"], special=["<|tool|>"])
    new.save(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    n = old.vocab_size
    assert [again.id_to_bytes(n + i).decode() for i in range(4)] == ["", "butterfly", " 明月", "two words"]
    assert (again.special_id("<|tool|>"), again.vocab_size) == (n, n + 4)
    assert (again.bos_id, again.eos_id, again.pad_id) == (old.bos_id, old.eos_id, old.pad_id)
    for text in (
        "a butterfly, two words",
        "butterfly",
        "x 明月butterflybutterfly y",
        "the moon above 床前",
        "<|tool|>",
    ):
        ids = again.encode(text)
        assert ids == new.encode(text)
        assert again.decode(ids) == text
        if "<|tool|>" not in text:  # which transformers finds in a text, and we do not
            assert peer.encode(text, add_special_tokens=False) == ids
    for text in ("the moon above the river 1984", "床前明月光，疑是地上霜。\n", "two  spaces", ""):
        assert again.encode(text) == old.encode(text) == peer.encode(text, add_special_tokens=False)
    extend.check_tokenizer(old, again, tmp_path, tmp_path)


@pytest.mark.parametrize(
    "tokens, special", [(["x", "x"], []), (["<|user|>"], []), (["y"], ["y"]), ([""], []), ([" the"], [])]
)
def test_tokens_that_are_there_already_are_refused(tmp_path, tokens, special):
    tokenizer = chat_tokenizer(tmp_path)
    if tokens == [" the"]:
        tokens = [next(p.decode() for i in range(300, 330) if len(p := tokenizer.id_to_bytes(i)) > 2)]
    with pytest.raises(ValueError, match="expected texts that the tokenizer does not have as tokens"):
        add_tokens(tokenizer, tokens, special)


def test_tokens_from_a_file(tmp_path):
    (tmp_path / "tokens.txt").write_text("a b\n\n月\n", "utf8")
    assert extend.read_tokens([str(tmp_path / "tokens.txt")]) == ["a b", "月"]
    assert extend.read_tokens(["a", "b"]) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=r"mistyped\.txt does not exist"):
        extend.read_tokens([str(tmp_path / "mistyped.txt")])


@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_are_the_mean_of_the_spelling(tmp_path, tie):
    model = Transformer(ModelArgs(**SHAPE | {"tie_embeddings": tie}))
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = torch.randint(35, (2, 9))
    logits = model(tokens)
    resize(model, 35, [[1, 2, 2], [], [3]], multiple_of=8)  # two of the old rows had no token
    assert model.args.vocab_size == 40
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tie):
        old, new = before[name], model.state_dict()[name]
        assert torch.equal(new[:35], old[:35])
        torch.testing.assert_close(new[35], (old[1] + 2 * old[2]) / 3)
        torch.testing.assert_close(new[37], old[3])
        torch.testing.assert_close(new[38:], old[:35].mean(0).expand(2, -1))
    torch.testing.assert_close(model(tokens)[..., :35], logits[..., :35])
    save_model(tmp_path, model)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


def test_spelling_is_what_the_old_tokenizer_makes_of_it(tmp_path):
    old = chat_tokenizer(tmp_path)
    new = add_tokens(old, ["moonriver"], ["<|tool|>"])
    assert spellings(old, new) == [old.encode("<|tool|>"), old.encode("moonriver")]


def test_a_vocabulary_is_rounded_to_a_multiple_of_something():
    with pytest.raises(ValueError, match="vocab_multiple_of should be at least 1, found 0"):
        resize(small(), 37, [[1]], 0)


def test_a_larger_vocabulary_needs_the_models_own_tokenizer(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has 37 embeddings, the data's tokenizer \d+ ids"):
        extend.fit_vocabulary(small(), None, tokenizer, tmp_path)
    other = add_tokens(tokenizer, ["first"])
    with pytest.raises(
        ValueError, match=r"differs from that of the model in .*: id \d+ is b'second' there and b'first' here"
    ):
        extend.check_tokenizer(other, add_tokens(tokenizer, ["second"]), tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"id \d+ is nothing there and b'first' here"):
        extend.check_tokenizer(other, tokenizer, tmp_path, tmp_path)


@pytest.mark.parametrize(
    "scaling, fits",
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        ({"rope_type": "dynamic by another name", "factor": 2.0}, 4096),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ({"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, 4096),
    ],
)
def test_a_longer_text_has_the_same_frequencies(scaling, fits, monkeypatch):
    monkeypatch.setitem(rope.FAMILIES, "dynamic by another name", rope.FAMILIES["dynamic"])
    if scaling and scaling["rope_type"] == "longrope":
        scaling["original_max_position_embeddings"] = 16
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=16, n_heads=2, n_layers=1, vocab_size=9, max_seq_len=64, rope_scaling=scaling))
    tokens = torch.randint(9, (1, 64))
    expected = model(tokens)
    set_length(model, fits)
    assert model.args.max_seq_len == model.make_cache(1).max_len == fits
    assert torch.equal(model(tokens), expected)
    if fits < 4096:
        with pytest.raises(ValueError, match="covers 128 positions, max_seq_len is 129"):
            set_length(model, fits + 1)

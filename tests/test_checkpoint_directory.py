"""Model directories against transformers' own loader, and what is left on disk when writing goes wrong."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import files
from checkpoint import peft
from checkpoint.directory import load_model, load_weights, load_whole_model, save_model
from files import written_aside
from lora import adapters
from model import Transformer
from model_args import ModelArgs
from training import state
from training.state import load_state, save_state

transformers = pytest.importorskip("transformers")
SHAPE = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 37, "multiple_of": 8}
VARIANTS = {
    "tied": {},
    "untied gqa": {"tie_embeddings": False, "n_heads": 4, "n_kv_heads": 2},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"sliding_window": 4, "tie_embeddings": False},
}


def small(**changes) -> Transformer:
    model = Transformer(ModelArgs(**SHAPE | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def saved(folder: Path, **changes) -> Path:
    save_model(folder / "model", small(**changes))
    return folder / "model"


# ---- model directories


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_round_trip(tmp_path, changes):
    model = small(**changes)
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.args == model.args
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.args.tie_embeddings
    assert [p.requires_grad for p in again.parameters()] == [True] * len(list(model.parameters()))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_it_whole(tmp_path, changes):
    model = small(**changes)
    save_model(tmp_path, model)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(peer).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert not any(info.values())  # nothing missing, unexpected or of another shape
    assert peer.dtype == torch.float32
    tokens = torch.randint(37, (2, 9))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_what_transformers_saves_is_loaded(tmp_path, tie):
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=37
    )
    config.update({"intermediate_size": 40, "tie_word_embeddings": tie})
    peer = transformers.LlamaForCausalLM(config)
    peer.save_pretrained(tmp_path, max_shard_size="6KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()  # in several files
    tokens = torch.randint(37, (2, 9))
    torch.testing.assert_close(load_model(tmp_path)(tokens), peer(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_head_is_stored_once(tmp_path):
    with safe_open(saved(tmp_path) / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}


def test_dtype(tmp_path):
    model = small().bfloat16()
    save_model(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path).model.norm.weight.dtype == torch.float32
    assert torch.equal(load_model(tmp_path, dtype=torch.bfloat16).lm_head.weight, model.lm_head.weight)


def test_special_ids(tmp_path):
    class Tokens:
        bos_id, eos_id, pad_id = 1, 2, None

        def save(self, directory):
            (Path(directory) / "tokenizer.model").write_bytes(b"x")

    save_model(tmp_path / "base", small(), Tokens())
    save_model(tmp_path / "chat", small(), Tokens(), stop_ids=[7, 2])
    assert (tmp_path / "base" / "tokenizer.model").is_file()
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    ends = [json.loads((tmp_path / d / "generation_config.json").read_text())["eos_token_id"] for d in ("base", "chat")]
    assert ends == [2, [7, 2]]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "chat").eos_token_id == [7, 2]


def test_loading_into_a_model_changes_nothing_else(tmp_path):
    directory, model = saved(tmp_path), small()
    parameters = list(model.parameters())
    load_weights(model, directory)
    assert all(p is q for p, q in zip(model.parameters(), parameters))  # an optimizer still holds the very same
    tokens = torch.randint(37, (1, 5))
    assert torch.equal(model(tokens), load_model(directory)(tokens))


# ---- adapter directories


@pytest.fixture
def adapted(tmp_path):
    """tmp_path/adapter, which names tmp_path/model as its base; the model with the adapter beside its weights."""
    model = load_model(saved(tmp_path))
    adapters.apply(model, adapters.LoraArgs("lora", r=2, train_embed_norm=True))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    peft.save(tmp_path / "adapter", model, base=str(tmp_path / "model"))
    return model


def test_an_adapter_is_loaded_into_the_base_that_it_names_or_another(tmp_path, adapted):
    tokens = torch.randint(37, (2, 9))
    merged = load_model(tmp_path / "adapter")
    torch.testing.assert_close(merged(tokens), adapted(tokens), rtol=0, atol=1e-5)
    assert not any(hasattr(module, "lora") for module in merged.modules())
    half = load_model(tmp_path / "adapter", dtype=torch.bfloat16)
    assert torch.equal(half.lm_head.weight, merged.lm_head.weight.bfloat16())  # the sum is made in float32
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="which is no model directory here"):
        load_model(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter", base=tmp_path / "moved")
    assert torch.equal(again(tokens), merged(tokens))


def test_what_is_no_adapter_or_has_to_be_a_whole_model_is_refused(tmp_path, adapted):
    with pytest.raises(FileNotFoundError, match="holds an adapter, not a model"):
        load_whole_model(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"--base is for an adapter, and .* is a whole model: leave it out"):
        load_model(tmp_path / "model", base=tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_both_classes_of_models_answer_by_the_same_names(tmp_path, family):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.AutoConfig.for_model(family, vocab_size=37, max_position_embeddings=32, **shape)
    peer = transformers.AutoModelForCausalLM.from_config(config)
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, "cpu", torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert model.embedding.weight.shape == (37, 16)
    names = {name for name, _ in model.module_tree.named_parameters()}
    assert names == {name for name, _ in peer.named_parameters()}


# ---- training state


def test_training_state_round_trip(tmp_path):
    optimizer = torch.optim.AdamW(small().parameters())
    state = {"optimizer": optimizer.state_dict(), "progress": {"best": float("inf"), "step": 3}, "rng": [torch.ones(2)]}
    save_state(tmp_path, state)
    again = load_state(tmp_path)
    assert again["progress"] == state["progress"]
    assert again["optimizer"] == state["optimizer"]
    assert torch.equal(again["rng"][0], state["rng"][0])


def test_random_state_round_trip(tmp_path):
    save_state(tmp_path, state.rng_state(torch.device("cpu")))
    expected = random.random(), torch.rand(3)
    state.set_rng_state(load_state(tmp_path), torch.device("cpu"))
    assert random.random() == expected[0]
    assert torch.equal(torch.rand(3), expected[1])


@pytest.mark.parametrize("keep", [0, 10, 200, -50])
def test_truncated_state(tmp_path, keep):
    save_state(tmp_path, {"x": torch.ones(100)})
    path = tmp_path / "training_state" / "state.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state\.pt cannot be read: it is truncated, damaged"):
        load_state(tmp_path)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("i_was_here"),)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))])
def test_code_in_a_state_is_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training_state").mkdir()
    write({"optimizer": Malicious()}, tmp_path / "training_state" / "state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(tmp_path)
    assert not Path("i_was_here").exists()


def test_a_model_without_state_cannot_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="can start a run, but not resume one"):
        load_state(saved(tmp_path))


# ---- complete or not at all


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, RuntimeError])
def test_a_failure_leaves_the_old_directory(tmp_path, error):
    target = tmp_path / "step_00000001"
    with written_aside(target) as aside:
        (aside / "file").write_text("old")
    with pytest.raises(OSError if error is RuntimeError else error), written_aside(target) as aside:
        (aside / "file").write_text("new")
        raise error("in the middle")
    assert names(tmp_path) == {target.name}
    assert (target / "file").read_text() == "old"


@pytest.mark.parametrize("how", [OSError, KeyboardInterrupt])
def test_stopped_between_the_two_renames_the_old_directory_comes_back(tmp_path, monkeypatch, how):
    target = tmp_path / "step_00000001"
    with written_aside(target) as aside:
        (aside / "file").write_text("old")
    rename = Path.rename

    def stopped(path, to):
        if path.name.endswith(".writing"):
            raise how("between")
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(how), written_aside(target) as aside:
            (aside / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    target.rename(tmp_path / f".{target.name}.replaced")  # as a kill leaves it
    with pytest.raises(ValueError), written_aside(target):
        raise ValueError("the next attempt fails")
    assert names(tmp_path) == {target.name}
    assert (target / "file").read_text() == "old"


@pytest.fixture
def no_half(monkeypatch):
    """Nothing that bears the name of a checkpoint is taken apart: a kill in between would leave half of it."""
    rmtree = shutil.rmtree

    def careful(path, **options):
        assert not path.name.startswith("step_")
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", careful)


def test_a_directory_is_replaced_whole(tmp_path, no_half):
    target = tmp_path / "step_00000001"
    for content in ("old", "new"):
        with written_aside(target) as aside:
            assert not (aside / "file").exists()
            (aside / "sub").mkdir()
            (aside / "sub" / content).write_text(content)
            if content == "new":
                assert names(target / "sub") == {"old"}  # until the end
    assert names(tmp_path) == {target.name}
    assert names(target / "sub") == {"new"}


def test_leftovers_of_a_kill_are_swept_and_never_taken_for_checkpoints(tmp_path):
    for role in ("writing", "replaced"):
        (tmp_path / f".step_00000001.{role}").mkdir()
        (tmp_path / f".step_00000001.{role}" / "half").write_text("")
    assert state.checkpoints(tmp_path) == []
    with written_aside(tmp_path / "step_00000001"):
        pass
    assert names(tmp_path) == {"step_00000001"}
    assert names(tmp_path / "step_00000001") == set()


def test_links_move_in_one_step_and_survive_moving_the_run(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        (run / f"step_{step}").mkdir(parents=True)
        files.point(run / "last", run / f"step_{step}")
        assert (run / "last").resolve() == (run / f"step_{step}").resolve()
    shutil.move(run, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "last").resolve().name == "step_2"


def test_prune_keeps_the_newest_and_what_is_linked(tmp_path, no_half):
    for step in range(1, 7):
        (tmp_path / f"step_{step:08d}").mkdir()
    for other in ("step_1", "notes", "step_00000009.txt", ".step_00000008.writing"):
        (tmp_path / other).mkdir()
    files.point(tmp_path / "best", tmp_path / "step_00000002")
    files.point(tmp_path / "last", tmp_path / "step_00000006")
    state.prune(tmp_path, keep=3)
    assert [path.name for path in state.checkpoints(tmp_path)] == [f"step_{n:08d}" for n in (2, 5, 6)]
    state.prune(tmp_path, keep=0)
    assert [path.name for path in state.checkpoints(tmp_path)] == [f"step_{n:08d}" for n in (2, 6)]
    kept = {"step_00000002", "step_00000006", "best", "last"}
    assert names(tmp_path) == kept | {"step_1", "notes", "step_00000009.txt"}  # and no leftover of a kill


def test_what_a_run_goes_on_from(tmp_path):
    assert state.newest(tmp_path / "nowhere") is None
    for step in (1, 2, 3):
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / ".step_00000004.writing").mkdir()
    assert state.newest(tmp_path).name == "step_00000003"
    files.point(tmp_path / "last", tmp_path / "step_00000002")
    assert state.newest(tmp_path) == tmp_path / "last"
    (tmp_path / "last").unlink()
    (tmp_path / "last").mkdir()
    with pytest.raises(ValueError, match=r"last should be a link to a checkpoint, found a folder .*: remove"):
        state.newest(tmp_path)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_others_may_read_weights_as_they_may_read_other_files(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with written_aside(tmp_path / "model") as aside:
            save_model(aside, Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=37)))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert set(modes) == {"config.json", "generation_config.json", "model.safetensors"} and set(modes.values()) == {
        mode
    }

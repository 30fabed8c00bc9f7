"""A model directory that brings code of its own: the code is never run, and nothing is asked on the terminal."""

import builtins
import json

import pytest

from checkpoint.directory import load_model

transformers = pytest.importorskip("transformers")

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


def write(folder, model_type: str | None, kind: str = "gpt_neox"):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model(kind, **shape, vocab_size=40, max_position_embeddings=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    said["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    said["model_type"] = model_type or kind
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "own.py").write_text(f"{CODE}Config = Model = object\n")
    return folder


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """A terminal where whoever asks gets y."""

    def answer(*_):
        raise AssertionError("it asked on the terminal")

    monkeypatch.setattr(builtins, "input", answer)


def test_code_in_a_directory_is_refused(tmp_path):
    folder = write(tmp_path, "ownkind")
    with pytest.raises(ValueError, match=r"needs code of its own .*never run here.* found model_type 'ownkind'"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_type_that_is_known_is_read_without_the_code(tmp_path, kind):
    assert load_model(write(tmp_path, None, kind)).args.dim == 32
    assert not (tmp_path / "ran").exists()

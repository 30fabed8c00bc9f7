"""Tokenizers, chat templates and Modelfiles of GGUF files: what is written is read back, other kinds are named."""

import json
from pathlib import Path

import pytest
from helpers.small_checkpoints import saved
from helpers.tiny_chat_model import save_chat_model
from helpers.varied_lines import varied
from helpers.vocabularies import (  # noqa: F401
    byte_level,
    chatglm2,
    llama,
    ours,
    sp_model,
    stories,
    write_byte_level,
    write_metaspace,
)

import convert
from chat.template import load_template
from checkpoint.directory import load_model, save_model
from convert import Export, Import
from formats import gguf_tokenizer, modelfile
from tokenizer import SentencePieceTokenizer, load_tokenizer

pytest.importorskip("gguf")


def contents(fields):
    return {key: field.value for key, field in fields.items()}


@pytest.mark.parametrize("name", ["ours", "byte_level", "llama", "chatglm2", "stories"])
def test_a_tokenizer_is_read_back(name, request):
    tokenizer = request.getfixturevalue(name)
    size = tokenizer.vocab_size + 2
    fields = contents(gguf_tokenizer.write(tokenizer, size, [tokenizer.eos_id or 0, 5], Path("x")))
    back, stop_ids = gguf_tokenizer.read(fields, Path("x"))
    texts = varied(150)
    assert [back.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert back.special.items() >= {k: v for k, v in tokenizer.special.items() if v is not None}.items()
    assert back.begins == tokenizer.begins and stop_ids[-1] == 5
    assert (back.bos_id, back.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_a_unigram_model_is_read_back(capsys):
    own = SentencePieceTokenizer(sp_model(model_type="unigram", vocab_size=90))
    back, _ = gguf_tokenizer.read(contents(gguf_tokenizer.write(own, 90, None, Path("x"))), Path("x"))
    texts = varied(150)
    assert [back.encode(text) for text in texts] == [own.encode(text) for text in texts]


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path):
    metaspace = load_tokenizer(write_metaspace(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"x: its tokenizer\.json is no byte-level BPE and has no tokenizer\.model"):
        gguf_tokenizer.write(metaspace, 100, None, Path("x"))
    folder = write_byte_level(tmp_path / "b")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\\w+"
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"cuts texts in a way that has no name in llama.cpp here \(known: gpt-2, llama-bpe"
    ):
        gguf_tokenizer.write(load_tokenizer(folder), 500, None, Path("x"))
    with pytest.raises(ValueError, match="x: the tokenizer has 404 ids, and the model 7"):
        gguf_tokenizer.write(load_tokenizer(folder), 7, None, Path("x"))


def test_a_model_to_chat_with_comes_back_whole(tmp_path):
    folder = save_chat_model(tmp_path / "in")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = load_template(tokenizer).saved
    save_model(folder, load_model(folder), tokenizer, stop_ids=load_template(tokenizer).stop_ids)
    convert.export(Export(model=folder, format="gguf", out=tmp_path / "x.gguf"))
    convert.import_(Import(source=tmp_path / "x.gguf", out=tmp_path / "out"))
    back = load_tokenizer(tmp_path / "out")
    assert back.sha256() == tokenizer.sha256() and back.special == tokenizer.special
    assert "generation" not in back.chat_template.replace("add_generation_prompt", "")
    talk = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    prompts = [load_template(each).encode(talk, add_generation_prompt=True)[0] for each in (tokenizer, back)]
    assert prompts[0] == prompts[1]
    stops = [json.loads((d / "generation_config.json").read_text())["eos_token_id"] for d in (folder, tmp_path / "out")]
    assert set(stops[0]) == set(stops[1])
    text = (tmp_path / "x.Modelfile").read_text()
    assert text.startswith('FROM ./x.gguf\nTEMPLATE """<s>{{ range .Messages }}{{ if eq .Role "system" }}<|system|>')
    assert text.endswith('<|end|>{{ end }}{{ end }}<|assistant|>"""\nPARAMETER stop "<|end|>"\n')


def test_a_template_of_another_form_has_no_modelfile(tmp_path, capsys):
    tokenizer = load_tokenizer(save_chat_model(tmp_path / "in"))
    tokenizer.chat_template = load_template(tokenizer, "llama2").saved
    assert modelfile.write(tokenizer, "x.gguf") is None
    assert "no Modelfile for Ollama is written: its chat template" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_says_so(tmp_path, capsys):
    saved(tmp_path / "in")
    convert.export(Export(model=tmp_path / "in", format="gguf", out=tmp_path / "x.gguf"))
    assert "has no tokenizer: the file is written without one" in capsys.readouterr().err

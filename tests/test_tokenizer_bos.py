"""Texts begin as the model's tokenizer begins them: against transformers, in data, prompts and templates."""

import json

import numpy as np
import pytest
from helpers.vocabularies import write_byte_level
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from bins.token_bin import BinWriter, TokenBin
from bins.tokenize import encode
from chat.template import load_template
from dataset import IGNORE, PretrainData
from serving.assistant import Assistant
from tokenizer import load_tokenizer

BOS, EOS = "<|im_start|>", "<|eot|>"


def write(folder, template: str | None = None, **config):
    """A byte-level tokenizer whose post-processor writes `template`, with these keys in tokenizer_config.json."""
    path = write_byte_level(folder)
    if template:
        backend = Tokenizer.from_file(str(path / "tokenizer.json"))
        special = [(name, backend.token_to_id(name)) for name in (BOS, EOS)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        backend.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS} | config
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


LAYOUTS = {
    "neither says anything": (None, {}),
    "the flag says yes": (None, {"add_bos_token": True}),
    "the flag says no": (None, {"add_bos_token": False}),
    "the post-processor writes bos": (f"{BOS} $A", {}),
    "the post-processor writes bos, the flag says no": (f"{BOS} $A", {"add_bos_token": False}),
    "only add_eos_token is there": (f"{BOS} $A", {"add_eos_token": False}),
    "bos is wanted and there is none": (None, {"add_bos_token": True, "bos_token": None}),
}


@pytest.mark.parametrize("template, config", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_beginning_is_that_of_transformers_before_and_after_saving(tmp_path, template, config):
    path = write(tmp_path / "read", template, **config)
    tokenizer = load_tokenizer(path)
    expected = AutoTokenizer.from_pretrained(path)("a river").input_ids
    assert [*tokenizer.begins, *tokenizer.encode("a river")] == expected
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.begins == tokenizer.begins
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a river").input_ids == expected


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
def test_a_sentencepiece_model_with_a_config_begins_as_in_transformers(tmp_path, llama, config):
    llama.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"} | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    # LLaMA's class writes bos unless it is told not to, up to transformers 4; version 5 writes none without the flag
    expected = AutoTokenizer.from_pretrained(tmp_path)("a").input_ids if config else [1, *llama.encode("a")]
    assert [*tokenizer.begins, *tokenizer.encode("a")] == expected


def test_eos_of_the_post_processor_is_not_a_beginning(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, f"{BOS} $A {EOS}"))
    assert tokenizer.begins == [tokenizer.bos_id]  # eos is put behind each document by the data, once


def test_a_bare_model_of_llama_begins_with_bos_and_ours_and_chatglm2_do_not(llama, stories, chatglm2, ours):
    assert llama.begins == [llama.bos_id] == [1] and stories.begins == [1]
    assert chatglm2.begins == [] and ours.begins == [] and ours.bos_id is not None


def test_documents_prompts_and_texts_begin_alike(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, f"{BOS} $A"))
    ids, ends, *_ = encode(tokenizer, ["rain", ""])
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert ids.tolist() == [bos, *tokenizer.encode("rain"), eos, bos, eos] and ends.tolist()[-1] == len(ids)
    assistant = Assistant(model=None, tokenizer=tokenizer, template=None, decoder=object())
    assert assistant.encode([{"role": "user", "content": "rain"}]) == [bos, *tokenizer.encode("rain")]


def test_a_prompt_of_nothing_is_one_id(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, add_bos_token=False))
    assistant = Assistant(model=None, tokenizer=tokenizer, template=None, decoder=object())
    assert assistant.encode([{"role": "user", "content": "rain"}]) == tokenizer.encode("rain")
    assert assistant.encode([{"role": "user", "content": ""}]) == [tokenizer.bos_id]


def test_our_template_begins_with_bos_where_the_tokenizer_does(tmp_path):
    chat = [{"role": "user", "content": "rain"}]
    for name, begins in (("with", True), ("without", False)):
        path = write(tmp_path / name, f"{EOS} $A" if begins else None, bos_token=EOS)
        tokenizer = load_tokenizer(path)
        template = load_template(tokenizer, "chatml")
        ids = template.encode(chat, add_generation_prompt=True)[0]
        theirs = AutoTokenizer.from_pretrained(path)
        rendered = theirs.apply_chat_template(
            chat, chat_template=template.jinja, add_generation_prompt=True, return_dict=True
        )
        assert ids == rendered["input_ids"]
        assert (ids[0] == tokenizer.bos_id) is begins and ids.count(tokenizer.bos_id) == begins


@pytest.mark.parametrize("isolate", [False, True])
def test_bos_is_an_input_and_no_target(tmp_path, isolate):
    documents = [[1, 5, 6, 2], [1, 7, 2], [1, 2], [1, 8, 9, 10, 2]]
    with BinWriter(tmp_path / "b", 20, 2, "sha", bos=[1]) as writer:
        for document in documents:
            writer.add(document)
    assert TokenBin(tmp_path / "b.bin").bos == [1]
    data = PretrainData([TokenBin(tmp_path / "b.bin")], 4, 2, 0, shuffle=False, isolate_documents=isolate)
    batches = [data.batch(step) for step in range(data.steps_per_epoch)]
    tokens = np.concatenate([batch.tokens.numpy().ravel() for batch in batches])
    targets = np.concatenate([batch.targets.numpy().ravel() for batch in batches])
    stream = [id for document in documents for id in document]
    assert tokens[1 : len(stream)].tolist() == stream[:-1]
    assert targets[: len(stream)].tolist() == [IGNORE if id == 1 else id for id in stream]
    assert (targets[len(stream) :] == IGNORE).all()
    if isolate:
        positions = np.concatenate([batch.positions.numpy().ravel() for batch in batches])
        starts = [i for i in range(1, len(stream)) if tokens[i] == 1]
        assert positions[starts].tolist() == [0] * len(starts)  # bos is the first position of its document


def test_a_bin_that_begins_otherwise_is_told(tmp_path, capsys):
    with BinWriter(tmp_path / "b", 20, 2, "sha") as writer:
        writer.add([5, 2])
    TokenBin(tmp_path / "b.bin").check("sha", 20, [])
    assert capsys.readouterr().err == ""
    TokenBin(tmp_path / "b.bin").check("sha", 20, [1])
    assert "make it again" in capsys.readouterr().err

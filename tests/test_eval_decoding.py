"""The script's ways to decode: stop strings, log-probabilities, beams, drafts and caches, against the plain way."""

import dataclasses
import importlib
import inspect
import io
import json
import math
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny_chat_model import save_chat_model

import evaluation
from attention import CACHES
from attention.cache import cache_class
from chat.template import load_template
from checkpoint.directory import load_model, save_model
from cli.args import parse
from decoding.beam import BeamParams, beam_search
from decoding.generate import generate
from decoding.params import SamplingParams, Stop
from decoding.rows import Token
from eval import BENCHMARKS, Args, forgets, main
from evaluation.registry import make_task
from evaluation.task import Task
from serving.single import token_table
from tokenizer import load_tokenizer

GREEDY = SamplingParams(temperature=0, max_new_tokens=30)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("run") / "step_00000007")


@pytest.fixture
def args(directory) -> Args:
    return Args(model=directory, sampling=GREEDY, device="cpu", prompt="江上")


def prompt_of(directory: Path, text: str = "江上") -> list[int]:
    return load_template(load_tokenizer(directory)).encode([{"role": "user", "content": text}], True)[0]


# ---- a real model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache": "sinks"},
        {"attention": "reference"},
        {"attention": "sdpa"},
        {"attention": "flex"},
        {"draft": "lookup"},
        {"draft": "itself"},
        {"draft": "itself", "draft_tokens": 1},
    ],
    ids=str,
)
def test_greedy_text_of_a_trained_model_in_every_way(shared, capsys, changes):
    model = shared / "models" / "stories260K_hf"
    if changes.get("draft") == "itself":
        changes = changes | {"draft": str(model)}
    params = SamplingParams(temperature=0, max_new_tokens=200)
    for entry in json.loads((shared / "models" / "stories260K_expected.json").read_text())["greedy"][1:]:
        result = main(Args(model=model, prompt=entry["prompt"], sampling=params, device="cpu", **changes))
        assert entry["prompt"] + result["answer"] == entry["text"]
        told = capsys.readouterr()
        assert told.out == result["answer"] + "\n"
        assert ("drafted tokens accepted" in told.err) == ("draft" in changes)


def test_greedy_text_after_a_journey_through_transformers(shared, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = shared / "models" / "stories260K_hf"
    save_model(tmp_path / "ours", load_model(model), load_tokenizer(model))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    load_tokenizer(tmp_path / "ours").save(tmp_path / "theirs")
    entry = json.loads((shared / "models" / "stories260K_expected.json").read_text())["greedy"][1]
    params = SamplingParams(temperature=0, max_new_tokens=200)
    answer = main(Args(model=tmp_path / "theirs", prompt=entry["prompt"], sampling=params, device="cpu"))["answer"]
    assert entry["prompt"] + answer == entry["text"]


def test_eight_bits_say_the_same_for_a_while(shared):
    model = shared / "models" / "stories260K_hf"
    params = SamplingParams(temperature=0, max_new_tokens=60)  # they part after 71 tokens at the earliest
    for entry in json.loads((shared / "models" / "stories260K_expected.json").read_text())["greedy"][1:]:
        args = Args(model=model, prompt=entry["prompt"], sampling=params, device="cpu", cache="int8")
        answer = main(args)["answer"]
        assert len(answer) > 100 and entry["text"].startswith(entry["prompt"] + answer)
        assert main(dataclasses.replace(args, draft="lookup"))["answer"] == answer


def test_a_text_longer_than_the_context(shared, capsys):
    model, long = shared / "models" / "stories260K_hf", "Once upon a time there was a cat. " * 60
    params = SamplingParams(temperature=0, max_new_tokens=540)
    args = Args(model=model, prompt=long, sampling=params, device="cpu")
    with pytest.raises(ValueError, match=r"the prompt is \d+ tokens long, the model takes 512; shorten it"):
        main(args)
    short = dataclasses.replace(args, prompt="Once upon a time")
    assert 0 < len(main(short)["answer"]) < len(main(dataclasses.replace(short, cache="sinks"))["answer"])
    assert len(main(dataclasses.replace(args, cache="sinks"))["answer"]) > 100


# ---- stop strings


def test_a_stop_string_ends_one_answer_a_file_of_them_and_a_turn(args, directory, tmp_path, monkeypatch, capsys):
    whole = main(args)["answer"]
    stop = (whole[4:6], "never said")
    expected = whole[: whole.index(stop[0])]
    stopped = dataclasses.replace(args, stop=stop)
    capsys.readouterr()
    assert main(stopped)["answer"] == expected != whole
    assert capsys.readouterr().out == expected + "\n"
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "江上"}\n' * 2, encoding="utf8")
    main(dataclasses.replace(stopped, prompt=None, input=questions))
    answers = [json.loads(line)["answer"] for line in (tmp_path / "questions.answers.jsonl").read_text().splitlines()]
    assert answers == [expected] * 2
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("江上\n明月\n"))
    main(dataclasses.replace(stopped, prompt=None, stop=(stop[0],)))
    history = [{"role": "user", "content": "江上"}, {"role": "assistant", "content": expected}]
    tokenizer = load_tokenizer(directory)
    template = load_template(tokenizer)
    prompt, _ = template.encode([*history, {"role": "user", "content": "明月"}], True)
    second = tokenizer.decode(generate(load_model(directory), [prompt], GREEDY, Stop(template.stop_ids))[0])
    assert capsys.readouterr().out == f"{expected}\n{second.split(stop[0])[0]}\n"


# ---- log-probabilities


def test_the_table_of_log_probabilities(args, directory, capsys):
    sampled = dataclasses.replace(args, sampling=SamplingParams(temperature=1.5, max_new_tokens=8), logprobs=2)
    result = main(sampled)
    plain = main(dataclasses.replace(sampled, logprobs=None))["answer"]
    lines = capsys.readouterr().out.splitlines()
    assert result["answer"] == plain
    tokens, tokenizer = result["tokens"], load_tokenizer(directory)
    assert tokenizer.decode([token.id for token in tokens]) == plain
    table = lines[lines.index("    log p  token") + 1 :][: len(tokens) + 1]
    assert [float(line.split()[0]) for line in table[:-1]] == pytest.approx([t.logprob for t in tokens], abs=1e-4)
    assert table[-1].split() == [f"{sum(t.logprob for t in tokens):.4f}", "together"]
    best, logprob = tokens[0].top[0]
    assert f"{tokenizer.id_to_bytes(best).decode()!r} {math.exp(logprob):.1%}" in table[0]


def test_names_of_tokens(directory):
    tokenizer = load_tokenizer(directory)
    byte, letter = (next(i for i in range(330) if tokenizer.id_to_bytes(i) == piece) for piece in (b"\xb5", b"w"))
    table = token_table([Token(i, 0.0) for i in (byte, letter, tokenizer.eos_id)], tokenizer).splitlines()[1:-1]
    assert [line.split(maxsplit=1)[1] for line in table] == [r"b'\xb5' 100.0%", "'w' 100.0%", "'</s>' 100.0%"]


# ---- beams


def test_beams_answer_one_question_and_a_file_of_them(args, directory, tmp_path, capsys):
    tokenizer, model = load_tokenizer(directory), load_model(directory)
    stop_ids = load_template(tokenizer).stop_ids
    for penalty in (1.0, -2.0):
        search = dataclasses.replace(args, num_beams=3, length_penalty=penalty)
        params = BeamParams(3, penalty, max_new_tokens=30)
        expected = tokenizer.decode(beam_search(model, prompt_of(directory), params, Stop(stop_ids))[0].ids)
        assert main(search)["answer"] == expected
        questions = tmp_path / "questions.jsonl"
        questions.write_text('{"prompt": "江上"}\n', encoding="utf8")
        main(dataclasses.replace(search, prompt=None, input=questions))
        assert json.loads((tmp_path / "questions.answers.jsonl").read_text())["answer"] == expected


# ---- the chat


@pytest.mark.parametrize("changes", [{"draft": "lookup"}, {"cache": "int8"}, {"cache": "sinks"}], ids=str)
def test_a_chat_in_every_way(args, monkeypatch, capsys, changes):
    said = []
    for way in ({}, changes):
        monkeypatch.setattr(sys, "stdin", io.StringIO("江上\n明月\n/reset\n江上\n"))
        assert main(dataclasses.replace(args, prompt=None, **way))["answered"] == 3
        said.append(capsys.readouterr().out)
    if changes == {"cache": "int8"}:  # a random model's likeliest tokens lie close together
        assert said[0].splitlines()[0] == said[1].splitlines()[0]
    else:
        assert said[0] == said[1]


def test_a_chat_with_sinks_forgets_no_turn(tmp_path, monkeypatch, capsys):
    model = save_chat_model(tmp_path / "model", max_seq_len=64)
    monkeypatch.setattr(sys, "stdin", io.StringIO("江上\n" * 6 + "江" * 70 + "\n江上\n"))
    params = SamplingParams(temperature=0, max_new_tokens=20)
    assert main(Args(model=model, sampling=params, device="cpu", cache="sinks"))["answered"] == 8
    assert capsys.readouterr().err == ""


# ---- what makes no sense


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_beams": 2, "draft": "lookup"}, "--num_beams 2 does not go with --draft lookup: each is a way"),
        ({"draft": "lookup", "logprobs": 1}, "--logprobs 1 does not go with --draft lookup: it needs one pass"),
        ({"prompt": None, "logprobs": 1}, "--logprobs 1 needs --prompt: it prints the tokens of one answer"),
        (
            {"prompt": None, "input": Path("q.jsonl"), "draft": "lookup"},
            "--draft lookup does not go with --input q.jsonl: it speeds up single answers",
        ),
        ({"prompt": None, "num_beams": 2}, "--num_beams 2 needs --prompt or --input: a chat shows"),
        ({"num_beams": 0}, "num_beams should be at least 1, found 0"),
        (
            {"num_beams": 2, "sampling": SamplingParams()},
            "--num_beams 2 needs --sampling.temperature 0, found 0.7: beam search looks for the likeliest answer",
        ),
        (
            {"num_beams": 2, "sampling": dataclasses.replace(GREEDY, repetition_penalty=1.1)},
            "--num_beams 2 needs --sampling.repetition_penalty 1, found 1.1",
        ),
        ({"cache": "sinks", "draft": "lookup"}, "--cache sinks does not go with --draft lookup: it forgets"),
        ({"draft": "lookup", "draft_tokens": 0}, "--draft_tokens should be at least 1, found 0"),
        ({"draft": "/nowhere"}, "/nowhere does not exist"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"attention": "flash"}, "attention by flash needs a CUDA GPU"),
        ({"logprobs": -1}, "--logprobs should be 0 or more, found -1"),
        ({"task": "loss"}, "needs --task chat, found loss"),
        ({"batch_size": 0}, "--batch_size should be at least 1, found 0"),
        ({"length_penalty": 2.0}, "--length_penalty 2.0 needs --num_beams above 1, found 1"),
        ({"raw": True, "system": "x"}, "--system x does not go with --raw True"),
    ],
    ids=str,
)
def test_flags_that_make_no_sense_are_one_sentence(args, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        main(dataclasses.replace(args, **changes))
    assert sentence in str(error.value)


def test_settings_of_sampling_need_no_prefix():
    flags = ["--temperature", "0.5", "--top_k", "3", "--max_new_tokens", "7", "--stop", "江", "--cache", "int8"]
    args = parse(Args, "eval", flags)
    assert args.sampling == SamplingParams(temperature=0.5, top_k=3, max_new_tokens=7)
    assert args.stop == ("江",) and args.cache == "int8"
    assert parse(Args, "eval", ["--sampling.temperature", "0"]).sampling.temperature == 0


def test_the_caches_that_forget_are_those_that_cannot_go_back():
    assert [forgets(name) for name in CACHES] == [not cache_class(name).can_rewind for name in CACHES]


def test_the_light_table_of_benchmarks_agrees_with_the_benchmarks():
    assert typing.get_type_hints(Args)["task"] == typing.Literal[("chat", *BENCHMARKS)]
    flags = {flag.name for flag in dataclasses.fields(Args)}
    found = set()
    for path in Path(evaluation.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"evaluation.{path.stem}")
        tasks = (cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Task))
        found |= {(cls.__module__, cls.__name__) for cls in tasks if not inspect.isabstract(cls)}
    assert found == set(BENCHMARKS.values())
    for name in BENCHMARKS:
        data = None if name == "passkey" else Path()  # its text is made up
        task = make_task(name, SimpleNamespace(**vars(Args()) | {"data": data}))
        assert {each.name for each in dataclasses.fields(task)} <= flags


def test_a_context_that_the_config_understates(args, directory):
    """Answers fit the length that the flag states, be it longer or shorter than the config's."""
    own = load_model(directory).args.max_seq_len
    for length, fits in ((None, own), (own + 9, own + 9), (own - 9, own - 9)):
        asked = dataclasses.replace(args, max_seq_len=length, prompt="江" * (fits + 1), raw=True)
        with pytest.raises(ValueError, match=rf"the model takes {fits};"):
            main(asked)
    longer = dataclasses.replace(args, max_seq_len=own + 200, prompt="江" * own, raw=True)
    assert isinstance(main(longer)["answer"], str)
    with pytest.raises(ValueError, match="--max_seq_len should be at least 1, found 0"):
        dataclasses.replace(args, max_seq_len=0)

"""The script, called in-process on a small model on disk: every answer is compared with `generate` itself."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_chat_model import save_chat_model

import eval as script
from bins.token_bin import BinWriter
from chat.template import load_template
from checkpoint import peft
from checkpoint.directory import load_model
from cli.args import parse, run
from decoding.generate import Sampled, generate
from decoding.params import SamplingParams, Stop
from eval import Args, main
from lora import adapters
from serving.assistant import load_assistant
from tokenizer import load_tokenizer

SHORT = SamplingParams(temperature=0.8, max_new_tokens=20, seed=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("run") / "step_00000007")


@pytest.fixture
def args(directory) -> Args:
    return Args(model=directory, sampling=SHORT, device="cpu")


def expected_answer(directory: Path, messages: list[dict], params: SamplingParams = SHORT) -> str:
    tokenizer = load_tokenizer(directory)
    template = load_template(tokenizer)
    prompt, _ = template.encode(messages, add_generation_prompt=True)
    return tokenizer.decode(generate(load_model(directory), [prompt], params, Stop(template.stop_ids))[0])


def user(text: str) -> dict:
    return {"role": "user", "content": text}


# ---- answers


@pytest.mark.parametrize("system", ["", "写诗"])
def test_one_answer(args, directory, capsys, system):
    answer = main(dataclasses.replace(args, prompt="江上", system=system))["answer"]
    messages = [{"role": "system", "content": system}] * bool(system) + [user("江上")]
    assert answer == expected_answer(directory, messages) != ""
    assert capsys.readouterr().out == answer + "\n"


def test_an_adapter_answers_on_a_base_given_by_flag(args, directory, tmp_path):
    model = load_model(directory)
    adapters.apply(model, adapters.LoraArgs("lora", r=2))
    peft.save(tmp_path, model, base="elsewhere")
    adapted = dataclasses.replace(args, model=tmp_path, base=directory, prompt="江上")
    assert main(adapted)["answer"] == expected_answer(directory, [user("江上")])  # lora_B is still 0
    with pytest.raises(FileNotFoundError, match=r"adapter of elsewhere, .* --base DIR"):
        main(dataclasses.replace(adapted, base=None))


def test_raw_continues_the_text_after_the_id_that_begins_a_document(args, directory):
    answer = main(dataclasses.replace(args, prompt="江上", raw=True))["answer"]
    tokenizer = load_tokenizer(directory)
    prompt = [tokenizer.eos_id, *tokenizer.encode("江上")]
    ids = generate(load_model(directory), [prompt], SHORT, Stop([tokenizer.eos_id]))[0]
    assert answer == tokenizer.decode(ids)


def test_a_model_with_a_foreign_vocabulary_continues_text(shared, capsys):
    model = shared / "models" / "stories260K_hf"
    expected = json.loads((shared / "models" / "stories260K_expected.json").read_text())["greedy"][1]
    params = SamplingParams(temperature=0, max_new_tokens=200)
    answer = main(Args(model=model, prompt=expected["prompt"], sampling=params, device="cpu"))["answer"]
    assert expected["prompt"] + answer == expected["text"]


def piped(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_the_chat_keeps_its_history(args, directory, monkeypatch, capsys):
    piped(monkeypatch, "江上\n明月\n/reset\n江上\n")
    assert main(args) == {"answered": 3}
    first = expected_answer(directory, [user("江上")])
    history = [user("江上"), {"role": "assistant", "content": first}, user("明月")]
    second = expected_answer(directory, history, dataclasses.replace(SHORT, seed=4))
    third = expected_answer(directory, [user("江上")], dataclasses.replace(SHORT, seed=5))
    assert capsys.readouterr().out == f"{first}\n{second}\n{third}\n"
    assert third != first  # asked again, it may answer otherwise


def test_the_chat_says_when_it_forgets(tmp_path, monkeypatch, capsys):
    model = save_chat_model(tmp_path / "model", max_seq_len=64)
    piped(monkeypatch, "江上\n" * 6 + "江" * 70 + "\n江上\n")
    assert main(Args(model=model, sampling=SHORT, device="cpu")) == {"answered": 7}
    errors = capsys.readouterr().err
    assert "(the context is full; oldest turns forgotten: 1)" in errors
    assert "error: the prompt is 74 tokens long, the model takes 64; shorten it" in errors


def test_the_chat_continues_texts_of_a_model_without_template(args, monkeypatch, capsys):
    once = main(dataclasses.replace(args, raw=True, prompt="江上"))["answer"]
    piped(monkeypatch, "江上\n/reset\n江上\n")
    assert main(dataclasses.replace(args, raw=True)) == {"answered": 2}
    assert capsys.readouterr().out == f"{once}\n" * 3


def test_demo_answers_and_says_where_everything_lies(args, directory, capsys):
    (directory.parent / "metrics.jsonl").write_text("")
    answers = main(dataclasses.replace(args, demo=True, demo_prompts=("江上", "明月")))["answers"]
    assert answers == [expected_answer(directory, [user("江上")]), expected_answer(directory, [user("明月")])]
    out = capsys.readouterr().out
    assert f"> 江上\n{answers[0]}\n" in out
    assert str(directory) in out and "metrics.jsonl" in out and "loss.png" not in out
    assert f"python eval.py --model {directory}" in out


def test_examples_beside_the_model_are_told(args, directory, monkeypatch, capsys):
    (directory.parent / "examples.txt").write_text("江上\n明月\n", encoding="utf8")
    try:
        assert len(main(dataclasses.replace(args, demo=True))["answers"]) == 2
        piped(monkeypatch, "/help\n")
        main(args)
        assert "for example:\n  江上\n  明月" in capsys.readouterr().err
    finally:
        (directory.parent / "examples.txt").unlink()
    assert main(dataclasses.replace(args, demo=True)) == {"answers": []}
    piped(monkeypatch, "/help\n")
    main(args)
    assert "for example" not in capsys.readouterr().err


# ---- files of questions


def test_a_file_of_questions(args, directory, tmp_path, capsys):
    lines = [
        {"prompt": "江上", "id": 7},
        "not json",
        {"messages": [user("江上"), {"role": "assistant", "content": "明月"}, user("低头")]},
        {"prompt": 5},
        {"messages": [user("江上"), {"role": "assistant", "content": "the reference"}], "task": "title"},
        {"messages": [{"role": "assistant", "content": "明月"}]},
        {"query": ""},
        {"prompt": "江" * 250},
        [],
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    result = main(dataclasses.replace(args, input=path, batch_size=2))
    output = tmp_path / "questions.answers.jsonl"
    assert result == {"answers": 3, "bad": 6, "output": str(output)}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{**row, "answer": None} for row in rows] == [{**lines[i], "answer": None} for i in (0, 2, 4)]
    asked = [[user("江上")], lines[2]["messages"], [user("江上")]]
    expected = [expected_answer(directory, m, dataclasses.replace(SHORT, seed=3 + i)) for i, m in enumerate(asked)]
    assert [row["answer"] for row in rows] == expected
    kept = [json.loads(line) for line in (tmp_path / "questions.answers.bad.jsonl").read_text().splitlines()]
    assert [int(record["where"].rsplit(":", 1)[1]) for record in kept] == [2, 4, 6, 7, 8, 9]
    assert "not JSON" in kept[0]["reason"] and "254 tokens long" in kept[4]["reason"]
    assert "6 records could not be read" in capsys.readouterr().err


def test_answers_go_on_where_they_stopped(args, tmp_path, monkeypatch, capsys):
    path, output = tmp_path / "questions.jsonl", tmp_path / "questions.answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("江上", "明月", "低头", "床前", "故乡")))
    asked = dataclasses.replace(args, input=path, batch_size=2)
    main(asked)
    whole, begun = output.read_bytes(), tmp_path / "questions.answers.begun.json"
    assert not begun.exists()

    def answers_until(n):
        original = Sampled.answers

        def answers(self, prompts, *settings):
            for i, ids in enumerate(original(self, prompts, *settings)):
                if i == n:
                    raise KeyboardInterrupt
                yield ids

        return answers

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sampled, "answers", answers_until(3))
        main(asked)
    assert output.read_bytes() == b"".join(whole.splitlines(True)[:3]) and begun.exists()
    output.write_bytes(output.read_bytes()[:-4])  # a kill while a line is written
    capsys.readouterr()
    main(asked)
    assert output.read_bytes() == whole and not begun.exists()
    assert "2 of 5 answers already" in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sampled, "answers", answers_until(3))
        main(asked)
    other = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, seed=99))
    main(other)  # other settings begin anew
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 5 and output.read_bytes() != whole


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "should hold an object"),
        ('{"eos_token_id": 1' + "0" * 400 + "}", "is not valid JSON: a number of 401 digits"),
        ('{"eos_token_id": "2"}', "should be an id or a list of ids, found '2'"),
        ('{"eos_token_id": [2, null]}', "should be an id or a list of ids"),
    ],
)
def test_a_broken_generation_config_is_one_sentence(args, directory, tmp_path, content, sentence):
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        main(dataclasses.replace(args, model=copy, prompt="江上"))


def test_every_id_of_generation_config_ends_a_text(directory, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assistant = load_assistant(copy, torch.device("cpu"), torch.float32)
    assert {9, 11, *assistant.template.stop_ids} == set(assistant.stop.ids)
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text()) | {"eos_token_id": [12, 13]}
    (copy / "config.json").write_text(json.dumps(config))
    assert {12, 13} <= set(load_assistant(copy, torch.device("cpu"), torch.float32).stop.ids)


def test_half_a_character_beside_a_question_is_written_back(args, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "moon", "id": "\\ud83d"}\n')
    main(dataclasses.replace(args, input=path))
    assert json.loads((tmp_path / "questions.answers.jsonl").read_text())["id"] == "\ud83d"


def test_records_of_other_forms_are_answered_and_keep_their_fields(args, tmp_path):
    path = tmp_path / "questions.jsonl"
    records = [
        {"question": "江上", "answer": "明月"},
        {"instruction": "江上", "input": 3, "output": "x"},
        {"conversations": [{"from": "human", "value": "江上"}, {"from": "gpt", "value": "x"}]},
        {"prompt": "江上", "chosen": "a", "rejected": "b"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(dataclasses.replace(args, input=path))["answers"] == 4
    rows = [json.loads(line) for line in (tmp_path / "questions.answers.jsonl").read_text().splitlines()]
    assert rows[0].pop("expected") == "明月" and rows[0] == {"question": "江上", "answer": rows[0]["answer"]}
    assert [row | {"answer": 0} for row in rows[1:]] == [record | {"answer": 0} for record in records[1:]]


@pytest.mark.parametrize("content", ["", '{"title": "?"}\n', "nonsense\n"])
def test_a_file_without_prompts_is_refused(args, tmp_path, content):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"questions.jsonl holds no questions: expected records as for"):
        main(dataclasses.replace(args, input=path))
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be(args, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.jsonl is not a file of questions"):
        main(dataclasses.replace(args, input=tmp_path / "none.jsonl"))
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="would overwrite the questions"):
        main(dataclasses.replace(args, input=path, output=path))
    with pytest.raises(ValueError, match=r"--prompt x does not go with --input .*q.jsonl: either"):
        main(dataclasses.replace(args, input=path, prompt="x"))


# ---- loss


def write_bin(folder: Path, tokenizer, n: int = 30) -> Path:
    rng = np.random.default_rng(0)
    prefix = folder / "heldout"
    with BinWriter(prefix, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
        for _ in range(n):
            writer.add([*rng.integers(8, tokenizer.vocab_size, rng.integers(1, 40)).tolist(), tokenizer.eos_id])
    return prefix.with_suffix(".bin")


def test_loss_equals_a_brute_force_in_float64(args, directory, tmp_path, capsys):
    tokenizer = load_tokenizer(directory)
    template = load_template(tokenizer)
    path = write_bin(tmp_path, tokenizer)
    conversations = [[user("江上"), {"role": "assistant", "content": "明月" * n}] for n in (1, 5, 2)]
    sft = tmp_path / "sft_heldout.jsonl"
    sft.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
    flags = {"heldout": path, "sft_heldout": sft, "seq_len": 24, "batch_size": 4, "dtype": "fp32"}
    measured = main(dataclasses.replace(args, task="loss", **flags))

    model, n_bytes = load_model(directory, dtype=torch.float64), tokenizer.token_bytes()

    def brute(rows):  # of (ids, which of them count): nats a token and bits a byte
        nats = tokens = size = 0
        for ids, counted in rows:
            with torch.no_grad():
                logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            for t, (target, counts) in enumerate(zip(ids[1:], counted[1:])):
                nats, tokens, size = (
                    nats - float(logp[t, target]) * counts,
                    tokens + counts,
                    size + n_bytes[target] * counts,
                )
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size}

    stream = [tokenizer.eos_id, *np.fromfile(path, "<u2").tolist()]
    windows = [stream[i : i + 25] for i in range(0, len(stream) - 1, 24)]
    assert measured["heldout"] == pytest.approx(brute([(w, [True] * 25) for w in windows]), rel=1e-5)  # float32 sums
    assert measured["sft_heldout"] == pytest.approx(brute(map(template.encode, conversations)), rel=1e-5)
    with sft.open("a") as file:
        file.write('{"title": "江上"}\n')
    assert main(dataclasses.replace(args, task="loss", **flags))["sft_heldout"] == measured["sft_heldout"]
    said = capsys.readouterr()
    assert f"are left out: 1; the first, {sft}:" in said.err and "its keys are title" in said.err
    assert f"bits per byte {measured['heldout']['bits_per_byte']:.4f}" in said.out


def test_loss_of_what_is_there(args, directory, tmp_path):
    path = write_bin(tmp_path, load_tokenizer(directory))
    nothing = tmp_path / "none.jsonl"
    assert set(main(dataclasses.replace(args, task="loss", heldout=path, sft_heldout=nothing))) == {"heldout"}
    with pytest.raises(FileNotFoundError, match=r"neither .* nor .* exists: name a file with --heldout or --sft"):
        main(dataclasses.replace(args, task="loss", heldout=tmp_path / "x.bin", sft_heldout=nothing))
    meta = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(meta | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        main(dataclasses.replace(args, task="loss", heldout=path, sft_heldout=nothing))


# ---- from the command line


def test_what_a_user_can_mend_is_one_sentence_and_a_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "/nowhere"])
    with pytest.raises(SystemExit, match=r"^error: /nowhere does not exist; run `bash run.sh` to train one, or give"):
        run(main, parse(Args, "eval"))


def test_a_pipe_through_the_script(directory):
    command = [sys.executable, script.__file__, "--model", directory, "--device", "cpu"]
    command += ["--sampling.temperature", "0", "--sampling.max_new_tokens", "20"]
    run = subprocess.run(command, input="江上\n/set temprature 1\n", capture_output=True, text=True)
    expected = expected_answer(directory, [user("江上")], SamplingParams(temperature=0, max_new_tokens=20))
    assert (run.returncode, run.stdout) == (0, expected + "\n")
    assert run.stderr.startswith("error: unknown setting temprature; did you mean 'temperature'")

"""LongBench, LongEval and passkey on made-up data in their published layouts, asked of a small model."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_chat_model import save_chat_model

from decoding.generate import generate
from decoding.params import SamplingParams
from eval import Args, main
from evaluation.benchmark import prompt_ids
from evaluation.long_context import SETS, SETS_E, LongBench, LongEval
from evaluation.passkey import DEPTHS, Passkey
from evaluation.registry import make_task
from serving.assistant import load_assistant

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("run") / "step_00000007", max_seq_len=256)


@pytest.fixture(scope="module")
def assistant(model):
    return load_assistant(model, CPU, torch.float32)


PROMPTS = {name: f"{name}: {{context}}\nquestion: {{input}} {{}}\nanswer:" for name in SETS}


def write_longbench(folder: Path, names=("qasper", "trec", "lcc"), suffix="", lengths=(100, 5000, 9000)) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "config").mkdir()
    (folder / "config/dataset2prompt.json").write_text(json.dumps(PROMPTS))
    (folder / "config/dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(SETS, 8)))
    for name in names:
        rows = [
            {"input": f"q{n} {{context}}", "context": "月 moon " * (3 + 40 * n), "answers": ["moon", "river"]}
            | {"length": length, "all_classes": ["moon", "river"], "language": "en"}
            for n, length in enumerate(lengths)
        ]
        lines = [json.dumps(row) for row in rows] + ['{"input": 5}', "no json"]
        (folder / f"data/{name}{suffix}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(model: Path, output: Path, **options) -> tuple[dict, list[dict]]:
    report = main(Args(model=model, output=output, device="cpu", dtype="fp32", batch_size=4, **options))
    return report, [json.loads(line) for line in output.with_suffix(".items.jsonl").open(encoding="utf8")]


def test_longbench_by_set_and_language(model, tmp_path, capsys):
    data = write_longbench(tmp_path / "LongBench")
    report, items = run(model, tmp_path / "r.json", task="longbench", data=data)
    assert list(report["by_subject"]) == ["qasper", "trec", "lcc"] and list(report["by_category"]) == ["en", "code"]
    assert [item["item"] for item in items][:3] == ["qasper/0", "qasper/1", "qasper/2"] and len(items) == 9
    assert set(items[0]["scores"]) == {"qa_f1", "score"} and set(items[8]["scores"]) == {"code_similarity", "score"}
    assert report["bad_rows"] == 6 and report["cut"] == sum(item["cut"] for item in items) > 0
    assert "lacks the middle of" in capsys.readouterr().err
    mean = sum(values["score"]["value"] for values in report["by_subject"].values()) / 3
    assert report["mean_of_subjects"]["score"] == pytest.approx(mean)
    assert items[0]["right"] == ["moon", "river"]


def test_longbench_e_by_length(model, tmp_path):
    data = write_longbench(tmp_path / "x", ("qasper", "lcc"), "_e", lengths=(3999, 4000, 7999, 8000))
    report, items = run(model, tmp_path / "r.json", task="longbench_e", data=data)
    assert [item["category"] for item in items[:4]] == ["0-4k", "4-8k", "4-8k", "8k+"]
    tables = report["by_subject_and_category"]
    assert set(tables) == {f"{name} {size}" for name in ("qasper", "lcc") for size in ("0-4k", "4-8k", "8k+")}
    assert tables["lcc 4-8k"]["score"]["items"] == 2 and len(SETS_E) == 13 and len(SETS) == 21


def test_prompts_are_those_of_the_file_and_texts_are_not_filled_in_twice(tmp_path):
    task = make_task("longbench", Args(task="longbench", data=write_longbench(tmp_path / "x", ["qasper"])))
    (block,) = task.blocks()
    assert block[0].question == f"qasper: {'月 moon ' * 3}\nquestion: q0 {{context}} {{}}\nanswer:"
    assert task.length(block[0]) == 8


def test_answers_are_those_of_the_model_after_the_template_where_one_is_used(model, assistant, tmp_path):
    data = write_longbench(tmp_path / "x", ("qasper", "trec"))
    _, items = run(model, tmp_path / "r.json", task="longbench", data=data, limit=1)
    for item, templated in zip(items, (True, False)):
        text = PROMPTS[item["subject"]].replace("{context}", "月 moon " * 3).replace("{input}", "q0 {context}")
        alone = dataclasses.replace(assistant, template=assistant.template if templated else None)
        ids = alone.encode([{"role": "user", "content": text}]) if templated else prompt_ids(alone.tokenizer, text)
        (answer,) = generate(assistant.model, [ids], SamplingParams(temperature=0, max_new_tokens=8), alone.stop)
        assert item["answer"] == alone.text(answer) or item["answer"] == assistant.text(answer)
        assert item["tokens"] == len(ids)


@pytest.mark.parametrize("cut", ["middle", "left"])
def test_what_a_long_prompt_loses(assistant, tmp_path, cut):
    task = make_task("longbench", Args(task="longbench", cut=cut, data=write_longbench(tmp_path / "x", ["lcc"])))
    (block,) = task.blocks()
    item = dataclasses.replace(block[0], question="BEGIN " + "月" * 300 + " END")
    ids, is_cut = task.encode(assistant, item, 120)
    text = assistant.tokenizer.decode(ids)
    assert is_cut and 110 <= len(ids) <= 120 and text.endswith("END") and ("BEGIN" in text) == (cut == "middle")
    whole, is_cut = task.encode(assistant, dataclasses.replace(block[0], question="short"), 120)
    assert not is_cut and assistant.tokenizer.decode(whole).endswith("short")
    if cut == "middle":  # as published: the first and the last half of the ids
        all_ids = assistant.tokenizer.encode(item.question)
        begin = len(ids) - len(all_ids[:59] + all_ids[-59:])
        assert assistant.tokenizer.decode(all_ids[:50]) in text and begin >= 0


def test_a_template_stands_whole_around_a_cut_prompt(assistant, tmp_path):
    task = make_task("longbench", Args(task="longbench", data=write_longbench(tmp_path / "x", ["qasper"])))
    (block,) = task.blocks()
    short = assistant.encode([{"role": "user", "content": "x"}])
    ids, is_cut = task.encode(assistant, dataclasses.replace(block[0], question="月" * 400), 150)
    assert is_cut and len(ids) <= 150
    marker = assistant.tokenizer.encode("x")[0]
    head, tail = short[: short.index(marker)], short[short.index(marker) + 1 :]
    assert ids[: len(head)] == head and ids[-len(tail) :] == tail


def test_a_measurement_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    data = write_longbench(tmp_path / "x")
    whole, _ = run(model, tmp_path / "a.json", task="longbench", data=data)
    asked, ask = [], LongBench.ask

    def stops(self, assistant, items):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(items)
        return ask(self, assistant, items)

    monkeypatch.setattr(LongBench, "ask", stops)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "b.json", task="longbench", data=data)
    monkeypatch.setattr(LongBench, "ask", ask)
    again, _ = run(model, tmp_path / "b.json", task="longbench", data=data)
    assert {**again, "settings": None} == {**whole, "settings": None}


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"subjects": ("nosuch",)}, ValueError, "--subjects nosuch: expected names among narrativeqa"),
        ({"subjects": ("musique",)}, FileNotFoundError, "has no musique.jsonl; expected LongBench's directory"),
        ({"task": "longbench_e"}, ValueError, "has no items"),
    ],
)
def test_bad_data_of_longbench(model, tmp_path, options, error, expected):
    data = write_longbench(tmp_path / "x")
    with pytest.raises(error, match=expected):
        run(model, tmp_path / "r.json", **({"task": "longbench", "data": data} | options))
    (data / "config/dataset2prompt.json").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=r"dataset2prompt.json; expected|nosuch"):
        run(model, tmp_path / "r.json", **({"task": "longbench", "data": data} | options))


# ---- LongEval


def write_longeval(folder: Path) -> Path:
    for kind, number in (("lines", 200), ("lines", 30), ("topics", 5)):
        (folder / kind / "testcases").mkdir(parents=True, exist_ok=True)
        record = {"prompt": f"{kind} {number}", "random_idx": ["a", 1]}
        record |= {"expected_number": 42, "correct_line": "x"} if kind == "lines" else {"topics": ["The moon", "sun"]}
        path = folder / kind / "testcases" / f"{number}_{kind}.jsonl"
        path.write_text(json.dumps(record) + "\n" + json.dumps({"prompt": 5}) + "\n")
    return folder


def test_longeval_files_in_the_order_of_their_sizes(model, tmp_path):
    report, items = run(model, tmp_path / "r.json", task="longeval", data=write_longeval(tmp_path / "evaluation"))
    assert [item["item"] for item in items] == ["lines_30/0", "lines_200/0", "topics_5/0"]
    assert list(report["by_category"]) == ["lines", "topics"] and report["bad_rows"] == 3
    assert [item["right"] for item in items] == [42, 42, "The moon"]


@pytest.mark.parametrize(
    ("answer", "lines", "topics"),
    [("The number is 7, no: 42.", 1, 0), ("42 in line 7", 0, 0), ("", 0, 0), ("It is the Moon!", 0, 1), ("0042", 1, 0)],
)
def test_scores_of_longeval(answer, lines, topics, tmp_path):
    task = make_task("longeval", Args(task="longeval", data=write_longeval(tmp_path)))
    blocks = list(task.blocks())
    assert task.score(blocks[0][0], answer) == {"accuracy": [lines, 1]}
    assert task.score(blocks[-1][0], answer) == {"accuracy": [topics, 1]}
    assert isinstance(task, LongEval)


# ---- passkey


def test_passkey_texts_are_as_long_as_they_say_and_hold_the_number_once_at_its_depth(assistant):
    task = make_task("passkey", Args(task="passkey"))
    assert isinstance(task, Passkey)
    task.tokenizer, task.window = assistant.tokenizer, 2048
    blocks = list(task.blocks())
    assert [block[0].subject for block in blocks] == ["256", "512", "1024", "2048"]
    places = {}
    for block in blocks:
        for item in block:
            size = len(assistant.tokenizer.encode(item.question)) + task.length(item)
            assert 0.6 * int(item.subject) < size <= int(item.subject), item.key
            assert len(re.findall(r"\d{5}", item.question)) == 2 and item.question.count(item.answer) == 2
            places.setdefault(item.category, []).append(item.question.index(item.answer) / len(item.question))
    means = [sum(places[f"depth {depth} %"]) / len(places[f"depth {depth} %"]) for depth in DEPTHS]
    assert means == sorted(means) and means[0] < 0.3 and means[-1] > 0.7
    assert len({item.answer for block in blocks for item in block}) > 35
    assert [i.question for b in blocks for i in b] == [i.question for b in task.blocks() for i in b]


def test_passkey_is_measured_by_length_and_depth(model, tmp_path):
    report, items = run(model, tmp_path / "r.json", task="passkey", limit=5)
    assert set(report["by_category"]) == {f"depth {depth} %" for depth in DEPTHS} and len(items) == 5
    assert not any(item["cut"] for item in items) and report["task"] == "passkey"
    task = make_task("passkey", Args(task="passkey"))
    assert [task.score(Asked("12345"), text)["accuracy"][0] for text in ANSWERS] == [1, 1, 0, 0]


ANSWERS = (" 12345. Keep it", "是12345", "the key 1234", "none")


@dataclasses.dataclass
class Asked:
    """An item of which only the answer matters."""

    answer: str


def test_passkey_refuses_data_and_lengths_beyond_the_window(model, tmp_path):
    with pytest.raises(ValueError, match="leave out --data"):
        make_task("passkey", Args(task="passkey", data=tmp_path))
    with pytest.raises(ValueError, match="--subjects 4096: expected lengths from 64 to the window of 256"):
        run(model, tmp_path / "r.json", task="passkey", subjects=("4096",))


def test_two_models_on_the_same_items(model, tmp_path, capsys):
    other = save_chat_model(tmp_path / "other" / "step_00000001", max_seq_len=256)
    options = {"task": "passkey", "limit": 3, "output": tmp_path / "r.json", "device": "cpu", "dtype": "fp32"}
    result = main(Args(model=model, against=other, **options))
    assert result["difference"]["accuracy"]["items"] == 3 and "common items" in capsys.readouterr().out


def test_a_tiny_window_is_refused(tmp_path):
    small = save_chat_model(tmp_path / "m" / "step_00000001", max_seq_len=48)
    with pytest.raises(ValueError, match="window of 48 tokens: --task longeval needs 64"):
        run(small, tmp_path / "r.json", task="longeval", data=write_longeval(tmp_path / "e"))


def test_the_flag_of_cutting_is_for_long_prompts():
    with pytest.raises(ValueError, match="--cut left needs --task longbench"):
        Args(task="gsm8k", cut="left")

"""Examinations and minimal pairs: prompts by hand, answers against the model read directly."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_chat_model import save_chat_model

from checkpoint.directory import load_model
from eval import Args, main
from evaluation.exam_subjects import ACLUE, CEVAL, CMMLU, MMLU
from evaluation.registry import make_task
from tokenizer import load_tokenizer

HEAD = "id,question,A,B,C,D,answer\n"
CEVAL_PROMPT = """以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。

江上何人？
A. 甲
B. 乙
C. 丙
D. 丁
答案： B

月下何物？
A. 风
B. 花
C. 雪
D. 月
答案："""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("run") / "step_00000007", max_seq_len=1024)


@pytest.fixture
def exam(tmp_path) -> Path:
    """C-Eval's layout: one solved example and three questions in logic, one in law; a bad row in each."""
    for split, name, rows in (
        ("dev", "logic", "0,江上何人？,甲,乙,丙,丁,B\n"),
        ("dev", "law", "0,江上何人？,甲,乙,丙,丁,B\n"),
        (
            "val",
            "logic",
            "7,月下何物？,风,花,雪,月,D\n8,何人？,甲,乙,丙,丁,A\n,何时？,一,二,三,四,c\n9,何？,甲,乙,丙,丁,Z\n",
        ),
        ("val", "law", "0,何处？,东,南,西,北,A\n1,,东,南,西,北,A\n"),
        ("test", "law", "0,何处？,东,南,西,北\n3,何处？,上,南,西,北\n"),
    ):
        path = tmp_path / "exam" / split / f"{name}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((HEAD if split != "test" else HEAD.replace(",answer", "")) + rows, encoding="utf-8-sig")
    return tmp_path / "exam"


@pytest.fixture
def args(model, exam, tmp_path) -> Args:
    return Args(model=model, task="ceval", data=exam, shots=1, device="cpu", output=tmp_path / "report.json")


def items_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.with_suffix(".items.jsonl").open(encoding="utf8")]


def likeliest(directory: Path, prompt: str, choices: list[str]) -> list[float]:
    """Sums of log-probabilities, each choice read in a row of its own."""
    model, tokenizer = load_model(directory).eval(), load_tokenizer(directory)
    sums = []
    for choice in choices:
        whole, size = tokenizer.encode(prompt + choice), len(tokenizer.encode(prompt))
        with torch.no_grad():
            logprobs = model(torch.tensor([whole[:-1]]))[0].double().log_softmax(-1)
        sums.append(sum(logprobs[at - 1, whole[at]].item() for at in range(size, len(whole))))
    return sums


def test_the_number_of_subjects_is_the_published_one():
    assert [len(table) for table in (CEVAL, CMMLU, ACLUE, MMLU)] == [52, 67, 15, 57]
    assert CEVAL["logic"] == ("逻辑学", "Humanities")
    assert MMLU["us_foreign_policy"] == ("us foreign policy", "Social Science")


def test_an_examination_is_asked_as_published_and_answered_by_the_likeliest_letter(args, model):
    result = main(args)
    assert result["first_prompt"] == CEVAL_PROMPT
    records = items_of(args.output)
    assert [record["item"] for record in records] == ["logic/7", "logic/8", "logic/2", "law/0"]
    assert [record["answer"] for record in records] == [3, 0, 2, 0]
    expected = likeliest(model, CEVAL_PROMPT, [" A", " B", " C", " D"])
    assert records[0]["logprobs"] == pytest.approx(expected, abs=1e-4)
    right = [record["choice"] == record["answer"] for record in records]
    assert result["all"]["accuracy"]["value"] == sum(right) / 4
    assert result["by_subject"]["logic"]["accuracy"]["value"] == pytest.approx(sum(right[:3]) / 3)
    assert result["mean_of_subjects"]["accuracy"] == pytest.approx((sum(right[:3]) / 3 + right[3]) / 2)
    assert result["bad_rows"] == 2
    bad = [json.loads(line) for line in args.output.with_suffix(".bad.jsonl").open(encoding="utf8")]
    assert [(Path(row["where"]).name, row["reason"]) for row in bad] == [
        ("logic_val.csv:5", "expected one of A, B, C, D as \"answer\", found 'Z'"),
        ("law_val.csv:3", 'expected a text as "question"'),
    ]


def test_rows_that_break_off_are_bad(args):
    path = args.data / "val" / "law_val.csv"
    path.write_text("id,question,A,B,C,D,answer\n0,何处？,东,南,西,北,A\n1,何处？,东,南\n", encoding="utf8")
    options = {"subjects": ("law",), "shots": 0}
    assert main(dataclasses.replace(args, **options))["bad_rows"] == 1
    assert [item["item"] for item in items_of(args.output)] == ["law/0"]
    path.write_text("何处？,东,南\n" * 2, encoding="utf8")
    sentence = f"none of its 2 rows can be read. The first, {path}:1: expected at least 6 cells, found 3"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        main(dataclasses.replace(args, **options))


def test_options_as_whole_answers(args, model):
    main(dataclasses.replace(args, form="answers", subjects=("law",), shots=0))
    (record,) = items_of(args.output)
    prompt = "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n何处？\n答案："
    assert record["logprobs"] == pytest.approx(likeliest(model, prompt, [" 东", " 南", " 西", " 北"]), abs=1e-4)


def test_mmlu_without_a_line_of_names(model, tmp_path):
    path = tmp_path / "mmlu" / "test" / "us_foreign_policy_test.csv"
    path.parent.mkdir(parents=True)
    path.write_text("Who?,one,two,three,four,D\n", encoding="utf8")
    args = Args(model=model, task="mmlu", data=tmp_path / "mmlu", shots=0, output=tmp_path / "m.json")
    assert main(args)["first_prompt"] == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "Who?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )


def test_files_that_are_called_by_their_titles(model, tmp_path):
    for split in ("dev", "test"):  # as in the repository of ACLUE
        path = tmp_path / "aclue" / split / "古音学.csv"
        path.parent.mkdir(parents=True)
        path.write_text(f"Question,A,B,C,D,Answer\n{split}？,东,南,西,北,B\n", encoding="utf8")
    args = Args(model=model, task="aclue", data=tmp_path / "aclue", shots=1, output=tmp_path / "a.json")
    prompt = main(args)["first_prompt"]
    assert prompt.startswith("以下是关于古音学的单项选择题") and "dev？" in prompt and "test？" in prompt


def test_own_questions_with_their_first_records_as_examples(model, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [
        {"question": "何？", "choices": ["东", "南西"], "answer": 1, "subject": "甲"},
        {"question": "何处？", "A": "东", "B": "南西", "answer": "东", "subject": "甲"},
        {"question": "Where?", "A": "here", "B": "there", "answer": "b", "subject": "乙"},
        {"question": "Where?", "A": "here", "answer": "A", "subject": "乙"},
        [1],
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    args = Args(model=model, task="choices", data=path, shots=1, form="answers", output=tmp_path / "own.json")
    result = main(args)
    assert result["first_prompt"] == "何？\n答案： 南西\n\n何处？\n答案："
    assert {"accuracy", "accuracy_norm"} == result["all"].keys()
    assert (result["all"]["accuracy"]["items"], result["bad_rows"]) == (1, 2)
    (record,) = items_of(args.output)
    sums = record["logprobs"]
    assert result["all"]["accuracy_norm"]["value"] == float(sums[0] >= sums[1] / 2)
    with pytest.raises(ValueError, match="--subjects 丙: expected names among 甲, 乙"):
        main(dataclasses.replace(args, subjects=("丙",)))
    with pytest.raises(ValueError, match=r"--shots 2: all questions of .* would be examples"):
        main(dataclasses.replace(args, shots=2))
    with pytest.raises(FileNotFoundError, match=f"--task choices: {tmp_path} is a folder; expected a csv"):
        main(dataclasses.replace(args, data=tmp_path))


def test_only_questions_with_an_answer_are_examples(model, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [
        {"question": f"{n}何？", "choices": ["东", "西"], "answer": answer}
        for n, answer in enumerate([None, 0, 1, True])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    result = main(Args(model=model, task="choices", data=path, shots=1, output=tmp_path / "own.json"))
    assert result["first_prompt"] == "1何？\nA. 东\nB. 西\n答案： A\n\n0何？\nA. 东\nB. 西\n答案："
    assert [item["item"] for item in items_of(tmp_path / "own.json")] == ["own/0", "own/2"]
    assert (result["all"]["accuracy"]["items"], result["bad_rows"]) == (1, 1)  # true is no number of a choice


def test_an_id_of_an_earlier_question_is_a_bad_row(model, tmp_path):
    path = tmp_path / "own.jsonl"
    same = {"question": "何？", "choices": ["东", "西"], "answer": 0, "id": "x"}
    rows = [same, {**same, "answer": 1}, {**same, "subject": "乙"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    result = main(Args(model=model, task="choices", data=path, output=tmp_path / "own.json"))
    assert [item["item"] for item in items_of(tmp_path / "own.json")] == ["own/x", "乙/x"]
    assert result["bad_rows"] == 1


def test_a_choice_beyond_the_window_is_named(model, tmp_path):
    path = tmp_path / "order.jsonl"
    path.write_text(json.dumps({"sentence_good": "江" * 2000, "sentence_bad": "上"}), encoding="utf8")
    with pytest.raises(ValueError, match=r"a choice of order/0 has \d+ tokens; expected 1 to 1024, the model's window"):
        main(Args(model=model, task="zhoblimp", data=path, output=tmp_path / "p.json"))


@pytest.mark.parametrize(("task", "space"), [("blimp", " "), ("zhoblimp", "")])
def test_minimal_pairs(task, space, model, tmp_path):
    path = tmp_path / "pairs" / "order.jsonl"
    path.parent.mkdir()
    pairs = [("江上何人", "何人江上"), ("月下花", "花下月"), ("", "x")]
    rows = (json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n" for good, bad in pairs)
    path.write_text("".join(rows), encoding="utf8")
    args = Args(model=model, task=task, data=path.parent, output=tmp_path / "p.json")
    result = main(args)
    loaded, tokenizer = load_model(model).eval(), load_tokenizer(model)
    for (good, bad), record in zip(pairs, items_of(args.output)):
        sums = []
        for sentence in (good, bad):
            ids = tokenizer.encode(space + sentence)
            with torch.no_grad():
                logprobs = loaded(torch.tensor([[tokenizer.eos_id, *ids[:-1]]]))[0].log_softmax(-1)
            sums.append(logprobs.gather(-1, torch.tensor(ids)[:, None]).sum().item())
        assert record["logprobs"] == pytest.approx(sums, abs=1e-4)
        assert record["scores"]["accuracy"] == [float(sums[0] >= sums[1]), 1]
    assert (result["all"]["accuracy"]["items"], result["bad_rows"]) == (2, 1)


def test_a_prompt_beyond_the_window_has_fewer_shots(args, capsys):
    result = main(dataclasses.replace(args, max_seq_len=150, subjects=("logic",)))
    assert result["fewer_shots"] == 3
    assert "fewer shots for 3 items" in capsys.readouterr().err
    assert all(record["shots"] == 0 for record in items_of(args.output))


def test_the_test_split_of_ceval_gives_the_file_for_its_site(args):
    main(dataclasses.replace(args, split="test"))
    letters = json.loads(args.output.with_suffix(".submission.json").read_text())
    assert letters.keys() == {"law"}
    assert letters["law"].keys() == {"0", "3"}
    assert set(letters["law"].values()) <= set("ABCD")


def test_a_stopped_measurement_goes_on_behind_the_last_item(args):
    whole = main(args)
    lines = args.output.with_suffix(".items.jsonl").read_text(encoding="utf8").splitlines(keepends=True)
    task = make_task("ceval", args)
    begun = args.output.with_suffix(".items.begun.json")
    assert not begun.exists()

    class Interrupted(Exception):
        pass

    def ask_once(assistant, items, calls=[]):  # noqa: B006
        if calls:
            raise Interrupted
        calls.append(1)
        return type(task).ask(task, assistant, items)

    from serving.assistant import load_assistant

    assistant = load_assistant(args.model, torch.device("cpu"), torch.float32)
    task.ask = ask_once
    with pytest.raises(Interrupted):
        task.run(assistant)
    assert begun.exists()
    assert main(args) == whole
    assert args.output.with_suffix(".items.jsonl").read_text(encoding="utf8").splitlines(keepends=True) == lines


def test_two_models_are_compared_on_the_same_items(args, tmp_path, capsys):
    other = save_chat_model(tmp_path / "other" / "step_00000001", max_seq_len=1024, hidden_dim=64)
    result = main(dataclasses.replace(args, against=other))
    ours, theirs = (
        [r["scores"]["accuracy"][0] for r in items_of(path)]
        for path in (args.output, args.output.with_suffix(".against.json"))
    )
    assert result["difference"]["accuracy"]["value"] == pytest.approx((sum(ours) - sum(theirs)) / 4)
    assert "on 4 common items" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": None}, "--task ceval needs --data, and none was given; expected C-Eval's"),
        ({"data": Path("nowhere")}, "--task ceval needs --data, and nowhere does not exist; expected"),
        ({"subjects": ("logics",)}, "--subjects logics: expected names among computer_network,"),
        ({"subjects": ("physician",)}, "val has no file of --subjects physician"),
        ({"split": "test", "subjects": ("logic",)}, "test has no file of --subjects logic"),
        ({"task": "cmmlu", "data": Path(__file__).parent}, "test has no file of any subject; expected CMMLU's"),
    ],
)
def test_missing_data_is_one_sentence(args, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        main(dataclasses.replace(args, **changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"limit": 0}, "--limit should be at least 1, found 0"),
        ({"shots": -1}, "--shots should be at least 0, found -1"),
        ({"task": "blimp", "shots": 1}, "--shots 1 needs --task ceval, .* or gsm8k, found blimp"),
        ({"task": "loss"}, "--data .* needs --task ceval"),
    ],
)
def test_flags_that_the_task_does_not_read_are_refused(args, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(args, **{"output": None, "shots": None} | changes)

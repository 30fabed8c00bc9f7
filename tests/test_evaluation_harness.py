"""What the adapter for lm-evaluation-harness does itself; tests/harness_table.py compares it with the harness."""

import json
import random

import pytest
from helpers.small_model import small_model
from helpers.tiny_chat_model import save_chat_model

from cli.progress import Progress
from decoding.params import SamplingParams
from eval import Args, main
from evaluation.harness import Requests, alike, answer_texts, encode_chat, load, render_chat, sampling, score_pairs
from evaluation.likelihood import Pair, log_likelihoods
from evaluation.registry import make_task
from serving.assistant import Assistant, usable_template


def test_pairs_that_begin_alike_are_together_and_all_are_scored_in_order():
    rng = random.Random(3)
    beginnings = [[rng.randrange(50) for _ in range(40)] for _ in range(3)]
    pairs = [Pair([*beginnings[i % 3], rng.randrange(50)], [rng.randrange(50)]) for i in range(20)]
    groups = list(alike(pairs, most=5))
    assert sorted(i for group in groups for i in group) == list(range(20))
    assert all(len(group) <= 5 and len({i % 3 for i in group}) == 1 for group in groups)
    model = small_model(max_seq_len=48)
    with Progress("scoring", "requests", active=False) as progress:
        found = score_pairs(model, pairs, 2, progress)
    assert progress.done == 20
    for pair, likelihood in zip(pairs, found):
        (alone,) = log_likelihoods(model, [pair], 1)
        assert likelihood.logprob == pytest.approx(alone.logprob, abs=1e-4)
    assert list(alike([], 5)) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SamplingParams(temperature=0, top_k=0)),
        ({"do_sample": False, "temperature": 1, "max_gen_toks": 9}, SamplingParams(0, top_k=0, max_new_tokens=9)),
        ({"temperature": 0.5, "top_p": 0.9}, SamplingParams(0.5, top_k=0, top_p=0.9)),
        ({"do_sample": True}, SamplingParams(1.0, top_k=0)),
    ],
)
def test_settings_of_the_harness(options, expected):
    assert sampling(options) == expected


def test_a_conversation_becomes_a_text_and_the_same_ids(tmp_path):
    tokenizer = load(str(save_chat_model(tmp_path / "model")), "cpu").tokenizer
    talk = [
        {"role": "system", "content": "答<|assistant|>"},  # no token: a text that is called like one
        {"role": "user", "content": "江上</s>"},
        {"role": "assistant", "content": "月"},
        {"role": "user", "content": " 何处？ "},
    ]
    for messages in (talk, talk[1:2]):
        expected = usable_template(tokenizer).encode(messages, add_generation_prompt=True)[0]
        text = render_chat(tokenizer, messages)
        assert encode_chat(tokenizer, text) == expected
        assert encode_chat(tokenizer, text + "山")[: len(expected)] == expected
    tokenizer.chat_template, tokenizer.special = None, {}
    with pytest.raises(ValueError, match="no chat template: leave out --apply_chat_template"):
        render_chat(tokenizer, talk)


LONG_PROMPT = {"longeval": "line a: 5\nWhich number?", "longbench": "月 moon: 何处？"}
DATA = {  # task -> file, record, prompt
    "gsm8k": ("test.jsonl", {"question": "2 + 2?", "answer": "#### 4"}, "Question: 2 + 2?\nAnswer:"),
    "answers": ("own.jsonl", {"question": " 江上</s>", "answer": "月"}, " 江上</s>"),
    "longeval": ("5_lines.jsonl", {"prompt": LONG_PROMPT["longeval"], "expected_number": 5}, LONG_PROMPT["longeval"]),
    "longbench": ("lcc.jsonl", {"input": "何处？", "context": "月 moon", "answers": ["x"]}, LONG_PROMPT["longbench"]),
    "passkey": (None, None, None),
}


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_prompts_without_a_template_have_the_ids_that_the_harness_asks(name, begins, tmp_path, monkeypatch):
    model, (file, record, prompt) = save_chat_model(tmp_path / "model", max_seq_len=512), DATA[name]
    if begins:
        config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf8")) | {"add_bos_token": True}
        (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf8")
    if name == "longbench":
        (tmp_path / "dataset2prompt.json").write_text(json.dumps({"lcc": "{context}: {input}"}))
        (tmp_path / "dataset2maxlen.json").write_text(json.dumps({"lcc": 4}))
    if file:
        (tmp_path / file).write_text(json.dumps(record) + "\n")
    requests, asked = Requests(str(model), device="cpu"), []

    def answers(self, prompts, *_):
        asked.extend(map(list, prompts))
        return iter([""] * len(prompts))

    monkeypatch.setattr(Assistant, "answers", answers)
    data = None if file is None else tmp_path / file if name == "answers" else tmp_path
    options = {"passkey": {"subjects": ("64",)}, "gsm8k": {"shots": 0}}.get(name, {})
    args = Args(model=model, task=name, data=data, raw=True, limit=1, output=tmp_path / "r.json", **options)
    if prompt is None:
        task = make_task(name, args)
        task.tokenizer, task.window = requests.assistant.tokenizer, 512
        prompt = task.chosen()[0][0].question
    main(args)
    assert asked == [requests.tok_encode(prompt)]
    assert (asked[0][0] == requests.assistant.tokenizer.bos_id) == begins


def test_answers_end_before_a_stop_text(tmp_path):
    assistant = load(str(save_chat_model(tmp_path / "model")), "cpu")
    prompts = [assistant.tokenizer.encode(text) for text in ("江上", "江" * 300)]
    (whole,) = answer_texts(assistant, prompts[:1], {"max_gen_toks": 40}, 2)
    stop = next(character for character in whole[3:] if character.isalnum())  # half characters are no text
    for until in (stop, [stop]):
        answers = answer_texts(assistant, prompts, {"until": until, "max_gen_toks": 40}, 2)
        assert next(answers) == whole[: whole.index(stop)]
        assert isinstance(next(answers), str)  # a prompt longer than the window loses its beginning


def test_short_contexts_share_a_group_and_long_beginnings_keep_their_own():
    rng = random.Random(5)

    def ids(n: int) -> list[int]:
        return [rng.randrange(1, 50) for _ in range(n)]

    # questions of an examination, which begin alike by their first 20 ids only, and have four choices each
    questions = [[1] * 20 + ids(80) for _ in range(10)]
    pairs = [Pair(context, [choice]) for context in questions for choice in range(4)]
    (group,) = alike(pairs, 100)
    assert sorted(group) == list(range(40))
    assert [len(group) for group in alike(pairs, 16)] == [16, 16, 8]
    # one question alone, then eight after the same 200 ids: these are computed once for the eight
    examples = [2] * 200
    pairs = [Pair([1, *ids(150)], [1]), *(Pair([*examples, *ids(30)], [1]) for _ in range(8))]
    assert [len(group) for group in alike(pairs, 100)] == [1, 8]

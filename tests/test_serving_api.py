"""OpenAI's API over a real socket: answers, streams, log-probabilities, endings, and what is refused."""

import concurrent.futures
import re
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import torch
from helpers.server import served
from helpers.tiny_chat_model import save_chat_model

from decoding import cpu_step
from decoding.generate import generate_scored
from decoding.params import SamplingParams

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "举头望明月"}], "temperature": 0, "max_tokens": 20}
GO_ON = {"prompt": "床前明月光", "temperature": 0, "max_tokens": 20}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(save_chat_model(tmp_path_factory.mktemp("model"))) as server:
        yield server


def text_of(answer: dict) -> str:
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def without_time(answer: dict) -> dict:
    """What of an answer depends on the request alone."""
    answer = {key: value for key, value in answer.items() if key not in ("id", "created", "timings")}
    return answer | {"usage": {**answer["usage"], "prompt_tokens_details": None}}


# ---- answers


def test_answers_are_those_of_eval(server):
    own = server.service.assistant
    for body, prompt in ((ASK, own.encode(ASK["messages"])), (GO_ON, own.encode_text(GO_ON["prompt"]))):
        status, _, answer = server.ask(CHAT if "messages" in body else TEXT, body)
        (tokens,) = generate_scored(own.model, [prompt], SamplingParams(temperature=0, max_new_tokens=20), own.stop)
        assert status == 200 and text_of(answer) == own.tokenizer.decode([token.id for token in tokens])
        usage = answer["usage"]
        assert usage["prompt_tokens"] == len(prompt) and usage["completion_tokens"] in (len(tokens), len(tokens) + 1)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert answer["model"] == "tiny" and answer["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_chat_stream_has_the_form_of_the_api(server, logprobs):
    body = ASK | {"n": 2, "seed": 3, "temperature": 1, "stream_options": {"include_usage": True}}
    body |= {"logprobs": True, "top_logprobs": 2} if logprobs else {}
    _, _, whole = server.ask(CHAT, body)
    events = server.events(CHAT, body)
    assert all(event.keys() >= {"id", "object", "created", "model", "choices"} for event in events)
    assert len({event["id"] for event in events}) == 1 and events[0]["object"] == "chat.completion.chunk"
    *events, last = events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in events)
    for i in range(2):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == i]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["delta"] == {}
        assert [each["finish_reason"] for each in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole["choices"][i]["finish_reason"]
        assert "".join(each["delta"].get("content", "") for each in mine) == whole["choices"][i]["message"]["content"]
        told = [entry for each in mine if each["logprobs"] for entry in each["logprobs"]["content"]]
        assert told == (whole["choices"][i]["logprobs"]["content"] if logprobs else [])


def test_a_completion_stream_joins_to_the_answer(server):
    body = GO_ON | {"prompt": ["床前明月光", "the moon"], "logprobs": 1, "echo": True}
    _, _, whole = server.ask(TEXT, body)
    events = server.events(TEXT, body)
    for i, choice in enumerate(whole["choices"]):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == i]
        assert "".join(each["text"] for each in mine) == choice["text"] and choice["text"].startswith(body["prompt"][i])
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for key, values in choice["logprobs"].items():
            assert [value for each in mine for value in each["logprobs"][key]] == values


@pytest.mark.parametrize("form", ["text", "ids", "texts", "lists of ids"])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_log_probabilities_are_those_of_the_model(server, form, max_tokens):
    own, texts = server.service.assistant, ["床前明月光", "the moon above"]
    prompts = [own.encode_text(text) for text in texts]
    prompt = {"text": texts[0], "ids": prompts[0], "texts": texts, "lists of ids": prompts}[form]
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 3}
    _, _, answer = server.ask(TEXT, body)
    assert len(answer["choices"]) == (1 if form in ("text", "ids") else 2)
    for i, choice in enumerate(answer["choices"]):
        with torch.no_grad():
            logprobs = own.model(torch.tensor([prompts[i]])).log_softmax(-1)[0]
        found, ids = choice["logprobs"], prompts[i]
        expected = [None, *(float(row[token]) for row, token in zip(logprobs, ids[1:]))]
        assert found["token_logprobs"][: len(ids)] == [None, *(pytest.approx(x, abs=1e-5) for x in expected[1:])]
        assert len(found["tokens"]) == len(ids) + max_tokens == len(found["text_offset"])
        assert found["top_logprobs"][0] is None
        for row, name, logprob, top in zip(logprobs, found["tokens"][1:], expected[1:], found["top_logprobs"][1:]):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-5) and name in top
            assert top[name] >= logprob - 1e-5 and 1 <= len(top) <= 4
        assert choice["text"].startswith(texts[i]) and found["text_offset"][:2] == [0, 0]
        assert choice["finish_reason"] == "length" or max_tokens


def test_half_characters_have_bytes(server):
    body = ASK | {"messages": [{"role": "user", "content": "龘"}], "logprobs": True, "top_logprobs": 20}
    _, _, answer = server.ask(CHAT, body)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == text_of(answer)
    names = {entry["token"] for each in entries for entry in (each, *each["top_logprobs"])}
    assert any(name.startswith("bytes:\\x") for name in names)
    assert all(len(entry["top_logprobs"]) == 20 for entry in entries)


def test_stop_strings_end_answers_and_do_not_leak(server):
    whole = text_of(server.ask(TEXT, GO_ON)[2])
    for stop in re.findall("[^\ufffd]+", whole):
        start = whole.index(stop)
        body = GO_ON | {"stop": ["no such text", stop]}
        _, _, answer = server.ask(TEXT, body)
        assert text_of(answer) == whole[:start] and answer["choices"][0]["finish_reason"] == "stop"
        assert "".join(event["choices"][0]["text"] for event in server.events(TEXT, body)) == whole[:start]


def test_counts_of_tokens_by_either_name_and_ids_that_end(server):
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
        _, _, answer = server.ask(CHAT, {"messages": ASK["messages"], **limit, "ignore_eos": True})
        assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length"
    stop = server.service.assistant.template.stop_ids
    bias = {str(i): 100 for i in stop}
    _, _, answer = server.ask(CHAT, ASK | {"logit_bias": bias, "logprobs": True})
    assert text_of(answer) == "" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["logprobs"]["content"] == []
    _, _, answer = server.ask(TEXT, GO_ON | {"max_tokens": 0})
    assert text_of(answer) == "" and answer["usage"]["completion_tokens"] == 0


def test_settings_are_obeyed(server):
    free = text_of(server.ask(TEXT, GO_ON)[2])
    once = server.ask(TEXT, GO_ON | {"presence_penalty": 2, "frequency_penalty": 2})[2]
    assert text_of(once) != free
    hot = GO_ON | {"temperature": 1.5, "top_k": 0}
    answers = [text_of(server.ask(TEXT, hot | {"seed": seed})[2]) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    unseeded = {text_of(server.ask(TEXT, hot)[2]) for _ in range(4)}
    assert len(unseeded) > 1
    several = server.ask(TEXT, hot | {"seed": 1, "n": 3})[2]["choices"]
    assert several[0]["text"] == answers[0] and several[1]["text"] == answers[2] and len(several) == 3


def test_settings_that_openai_does_not_have(server):
    own = server.service.assistant
    greedy, hot = text_of(server.ask(TEXT, GO_ON)[2]), GO_ON | {"temperature": 3.0, "top_k": 0, "seed": 1}
    assert text_of(server.ask(TEXT, hot)[2]) != greedy
    for only_the_likeliest in ({"top_k": 1}, {"min_p": 1.0}):
        assert text_of(server.ask(TEXT, hot | only_the_likeliest)[2]) == greedy
    params = SamplingParams(temperature=0, max_new_tokens=20, repetition_penalty=1.8)
    (tokens,) = generate_scored(own.model, [own.encode_text(GO_ON["prompt"])], params, own.stop)
    found = text_of(server.ask(TEXT, GO_ON | {"repetition_penalty": 1.8})[2])
    assert found == own.tokenizer.decode([token.id for token in tokens]) and found != greedy


def test_frequency_and_presence_penalties_are_openai_s(server):
    own = server.service.assistant
    prompt, frequency, presence = own.encode_text("the moon"), 0.7, 0.4
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    _, _, found = server.ask(TEXT, body | {"frequency_penalty": frequency, "presence_penalty": presence})
    answer: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            logits = own.model(torch.tensor([prompt + answer]))[0, -1, : own.tokenizer.vocab_size].tolist()
        counts = [answer.count(i) for i in range(len(logits))]
        penalised = [x - frequency * n - presence * (n > 0) for x, n in zip(logits, counts)]
        answer.append(penalised.index(max(penalised)))
    assert text_of(found) == b"".join(map(own.tokenizer.id_to_bytes, answer)).decode(errors="replace")


# ---- the same whatever the load


def test_the_same_request_has_the_same_answer_under_any_load(tmp_path):
    """Bit for bit: log-probabilities, too; alone, among others, with its beginning kept, its prompt cut."""
    directory = save_chat_model(tmp_path, max_seq_len=400)
    long = "疑是地上霜，低头思故乡。" * 12
    bodies = [
        {"prompt": long[: 20 * i], "seed": i, "temperature": 1.2, "top_k": 0, "max_tokens": 10 + i, "logprobs": 2}
        | {"echo": i % 3 == 0, "presence_penalty": 0.5 * (i % 2)}
        for i in range(1, 9)
    ]
    with served(directory, rows=1, most=1000) as server:
        if cpu_step.compiled_step() is None:
            pytest.skip("there is no C++ compiler that works")
        alone = [server.ask(TEXT, body)[2] for body in bodies]
    with served(directory, rows=5, most=16) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: server.ask(TEXT, body)[2], bodies * 4))
        assert server.service.metrics.tokens["cached"] > 0
    for i, answer in enumerate(together):
        assert without_time(answer) == without_time(alone[i % 8])


def test_a_long_prompt_does_not_hold_up_a_short_one(tmp_path):
    with served(save_chat_model(tmp_path, max_seq_len=4000), rows=2, most=16) as server:
        long = server.service.assistant.encode_text("疑是地上霜" * 300)
        ended = []

        def ask(name, prompt):
            server.ask(TEXT, {"prompt": prompt, "max_tokens": 3, "ignore_eos": True})
            ended.append(name)

        first = threading.Thread(target=ask, args=("long", long))
        first.start()
        while not server.service.engine.running:
            pass
        ask("short", "月")
        first.join()
        assert ended == ["short", "long"]


def test_turns_read_only_what_is_new(server):
    messages, seen = [*ASK["messages"]], 0
    for turn in range(3):
        _, _, answer = server.ask(CHAT, ASK | {"messages": messages})
        usage = answer["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > seen - 10 or not turn  # the template's last tokens
        seen = usage["prompt_tokens"]
        messages += [{"role": "assistant", "content": text_of(answer) or "好"}, {"role": "user", "content": "再来"}]


def test_the_time_of_a_request_is_told(server):
    began = time.monotonic()
    answers = [server.ask(path, body)[2] for path, body in ((CHAT, ASK), (TEXT, GO_ON))]
    answers.append(server.events(CHAT, ASK | {"stream_options": {"include_usage": True}})[-1])
    most = 1000 * (time.monotonic() - began)
    for times in (answer["timings"] for answer in answers):
        assert 0 <= times["queue_ms"] <= times["first_token_ms"] <= times["total_ms"] <= most
        assert times["total_ms"] > 0


# ---- other paths


def test_models_health_and_metrics(server):
    _, _, listed = server.ask("/v1/models")
    assert listed["object"] == "list" and [card["id"] for card in listed["data"]] == ["tiny"]
    assert listed["data"][0].keys() >= {"id", "object", "created", "owned_by"}
    assert server.ask("/v1/models/tiny")[2] == listed["data"][0]
    assert server.error("/v1/models/other")[0] == 404
    assert server.ask("/health")[2] == {"status": "ok"} and server.ask("/")[0] == 200
    server.ask(TEXT, GO_ON)
    _, headers, text = server.ask("/metrics")
    assert headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['little_llama_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values['little_llama_requests_total{path="/v1/models/{name:path}",status="404"}']) >= 1
    assert values["little_llama_requests_running"] == "0" and values["little_llama_rows"] == "4"
    assert values['little_llama_request_seconds_bucket{le="+Inf"}'] == values["little_llama_request_seconds_count"]


def test_tokens_and_texts(server):
    tokenizer = server.service.assistant.tokenizer
    ids = tokenizer.encode("床前 moon")
    assert server.ask("/tokenize", {"prompt": "床前 moon", "add_special_tokens": False})[2]["tokens"] == ids
    _, _, answer = server.ask("/tokenize", {"content": "床前 moon"})
    assert answer["tokens"] == [tokenizer.eos_id, *ids] and answer["count"] == len(ids) + 1
    assert server.ask("/detokenize", {"tokens": ids})[2]["prompt"] == "床前 moon"
    _, _, answer = server.ask("/tokenize", {"messages": ASK["messages"]})
    assert answer["tokens"] == server.service.assistant.encode(ASK["messages"])
    _, _, info = server.ask("/tokenizer_info")
    assert info["eos_token"] == "</s>" and "<|user|>" in info["chat_template"]
    assert server.error("/tokenize", {}) == (
        400,
        "prompt is missing: give a text as prompt, or a conversation as messages",
    )


# ---- what is refused


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (TEXT, b"{", 400, "not valid JSON"),
        (TEXT, b"[1]", 400, "should be a JSON object"),
        (TEXT, b"\xff", 400, "not valid JSON"),
        (TEXT, {}, 400, "prompt is missing"),
        (TEXT, {"prompt": 3}, 400, "prompt should be a text, a list of texts"),
        (TEXT, {"prompt": []}, 400, "prompt is an empty list"),
        (TEXT, {"prompt": [[]]}, 400, "the prompt is empty"),
        (TEXT, {"prompt": [99999]}, 400, "holds id 99999"),
        (TEXT, {"prompt": "\ud800"}, 400, "surrogates not allowed"),
        (TEXT, {"prompt": "月" * 300}, 400, "tokens long, the model takes 200"),
        (TEXT, {"prompt": "月" * 100_000}, 400, "100000 characters do not fit"),
        (TEXT, GO_ON | {"model": "gpt-4"}, 404, "there is no model 'gpt-4' here: there is tiny"),
        (TEXT, GO_ON | {"temperature": "hot"}, 400, "temperature should be a valid number, found 'hot'"),
        (TEXT, GO_ON | {"temperature": -1}, 400, "temperature should be from 0 to 100, found -1.0"),
        (TEXT, GO_ON | {"top_p": 0}, 400, "top_p should be above 0"),
        (TEXT, GO_ON | {"n": 0}, 400, "n should be greater than or equal to 1, found 0"),
        (TEXT, GO_ON | {"n": 200, "prompt": ["a", "b"]}, 400, "at most 256 prompts times n, found 400"),
        (TEXT, GO_ON | {"max_tokens": 1.5}, 400, "max_tokens should be a valid integer"),
        (TEXT, GO_ON | {"logit_bias": {"99999": 1}}, 400, "found '99999'"),
        (TEXT, GO_ON | {"stop": [""]}, 400, "a stop string is empty"),
        (TEXT, GO_ON | {"stop": {}}, 400, "stop should be a text or a list"),
        (TEXT, GO_ON | {"suffix": "x"}, 400, "suffix is not offered"),
        (TEXT, GO_ON | {"best_of": 3}, 400, "best_of is not offered"),
        (CHAT, {"messages": []}, 400, "should have at least 1 item"),
        (CHAT, {"messages": ["hi"]}, 400, "messages.0 should be a valid dictionary"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "message 0 should have a role and a string"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "should be of role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "type 'image_url'"),
        (CHAT, {"messages": [{"role": "user", "content": "月" * 100_000}]}, 400, "100004 characters do not fit"),
        (CHAT, ASK | {"tools": [{"function": {"name": "f", "description": "月" * 100_000}}]}, 400, "do not fit"),
        (CHAT, ASK | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        (CHAT, ASK | {"top_logprobs": 21, "logprobs": True}, 400, "less than or equal to 20"),
        (CHAT, ASK | {"tools": [{"type": "function"}], "tool_choice": "required"}, 400, "a call cannot be forced"),
        (CHAT, ASK | {"tool_choice": "required"}, 400, "a call cannot be forced"),
        (CHAT, ASK | {"response_format": {"type": "xml"}}, 400, "response_format should be text, json_object, or"),
        (CHAT, ASK | {"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "response_format should be"),
        ("/v1/embeddings", {"input": "x"}, 400, "embeddings are not offered"),
        ("/v1/nothing", {}, 404, "there is nothing at /v1/nothing"),
        (TEXT, None, 405, "GET is not for /v1/completions"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0 should be greater than or equal to 0"),
        ("/detokenize", {"tokens": [1, 10**6]}, 400, "tokens: the vocabulary has ids 0.."),
    ],
)
def test_what_is_wrong_is_named(server, path, body, status, message):
    found, sentence = server.error(path, body)
    assert found == status and message in sentence


def test_a_model_without_a_template_says_so_and_continues_texts(server, monkeypatch):
    monkeypatch.setattr(server.service.assistant, "template", None)
    sentence = "tiny has no chat template, it only continues texts: POST to /v1/completions"
    assert server.error(CHAT, ASK) == server.error(CHAT, ASK | {"stream": True}) == (400, sentence)
    assert server.error("/tokenize", {"messages": ASK["messages"]}) == (400, sentence)
    assert server.ask(TEXT, GO_ON)[0] == 200


def test_what_clients_send_besides_is_ignored(server):
    plain = without_time(server.ask(CHAT, ASK)[2])
    extra = {"user": "me", "store": False, "metadata": {}, "tools": [], "tool_choice": "none", "stop": None, "n": None}
    extra |= {
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "logit_bias": {},
        "parallel_tool_calls": True,
    }
    assert without_time(server.ask(CHAT, ASK | extra)[2]) == plain
    parts = [{"type": "text", "text": "举头"}, {"type": "text", "text": "望明月"}]
    assert without_time(server.ask(CHAT, ASK | {"messages": [{"role": "user", "content": parts}]})[2]) == plain

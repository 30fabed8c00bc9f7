"""Thoughts, calls and results of tools in chat templates of the published shapes: the text of transformers, the masks
by hand."""

import copy
import hashlib
import json
import re
from itertools import chain

import pytest
from helpers.published_templates import MISTRAL3, PUBLISHED, QWEN3, open_published
from helpers.vocabularies import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import in_transformers, rendered, text_of

from chat.template import TEMPLATES, ChatTemplate, load_template, read_template, template_hash
from decoding.params import SamplingParams
from model import Transformer
from model_args import ModelArgs
from serving.assistant import Assistant
from serving.session import ChatSession

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers. 把两个数相加。",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
        },
    }
]


def user(content: str, **more) -> dict:
    return {"role": "user", "content": content} | more


def answer(content: str, **more) -> dict:
    return {"role": "assistant", "content": content} | more


def call(content: str, *arguments: dict | str, **more) -> dict:
    calls = [
        {"type": "function", "id": f"abcdefgh{n}", "function": {"name": "add", "arguments": each}}
        for n, each in enumerate(arguments)
    ]
    return answer(content, tool_calls=calls, **more)


def result(content: str, n: int = 0) -> dict:
    return {"role": "tool", "content": content, "name": "add", "tool_call_id": f"abcdefgh{n}"}


THOUGHTS = [user("2+3?"), answer("<think>\nTwo.\n</think>\n\n5"), user("+1?"), answer("<think>\nFive.\n</think>\n\n6")]
KEYS = [user("2+3?"), answer("5", reasoning_content="Two."), user("+1?"), answer("6", reasoning_content="Five.")]
AGENT = [
    user("2+3?", tools=TOOLS),
    call("", {"a": 2}, reasoning_content="Add."),
    result("5"),
    answer("It is 5.", reasoning_content="Done."),
]
TWICE = [*AGENT, user("4+5?"), call("", {"a": 4}), result('{"sum": 9}'), answer("9")]


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    return request.param, *open_published(request.param, tmp_path_factory.mktemp("published"))


def agents(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    """Conversations with thoughts, calls, results and tools, each of them optional; every text is any text."""
    arguments = st.dictionaries(text, text | st.integers() | st.lists(text, max_size=2), max_size=2)
    calls = st.lists(arguments | arguments.map(json.dumps), min_size=1, max_size=2)
    calling = st.builds(lambda content, calls, more: call(content, *calls, **more), text, calls, thoughts(text))
    turn = st.builds(
        lambda question, steps, last, more: [user(question), *chain(*steps), answer(last, **more)],
        text,
        st.lists(st.builds(lambda a, b, n: [a, *[result(b)] * n], calling, text, st.integers(1, 2)), max_size=2),
        text,
        thoughts(text),
    )
    turns = st.lists(turn, min_size=1, max_size=2).map(lambda turns: list(chain(*turns)))
    start = st.builds(lambda n, content: [{"role": "system", "content": content}] * n, st.integers(0, 1), text)

    def with_tools(start: list[dict], turns: list[dict], tools: list[dict]) -> list[dict]:
        first, *rest = [*start, *turns]
        return [first | ({"tools": tools} if tools else {}), *rest]

    tools = st.lists(st.builds(lambda t: TOOLS[0] | {"function": {"name": "f", "description": t}}, text), max_size=2)
    return st.builds(with_tools, start, turns, tools)


def thoughts(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict]:
    return st.just({}) | text.map(lambda thought: {"reasoning_content": thought})


@pytest.fixture(scope="module", params=["ours", "chatml"])
def saved(request, tmp_path_factory):
    """One of our templates, and what transformers makes of the directory it is saved in."""
    tokenizer = copy.copy(request.getfixturevalue("ours" if request.param == "ours" else "byte_level"))
    template = load_template(tokenizer, request.param)
    tokenizer.chat_template = template.jinja
    return template, in_transformers(template, tmp_path_factory.mktemp("saved"))


@given(messages=agents(TEXT))
@settings(max_examples=60, deadline=None)
def test_our_templates_render_all_of_it_as_transformers_does(saved, messages):
    template, theirs = saved
    ids, mask = template.encode(messages)
    tools = messages[0].get("tools")
    plain = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    found = theirs.apply_chat_template(plain, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == found["input_ids"]
    # Where an answer begins with a blank, transformers may not find its first character among the ids.
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(m["content"][:1].isspace() and not m.get("reasoning_content") for m in answers):
        assert mask == [bool(trained) for trained in found["assistant_masks"]]
    assert template.leaves_out(messages) == [k for k in ("name", "tool_call_id") if any(k in m for m in messages)]
    for n, message in enumerate(messages):
        if message["role"] == "assistant":  # each answer is trained after the prompt that generation has
            prompt = template.encode(messages[:n], add_generation_prompt=True)[0]
            assert ids[: len(prompt)] == prompt == their_ids(theirs, messages[:n], True)
            assert mask[len(prompt)] and not mask[len(prompt) - 1]


def test_what_our_templates_look_like(saved):
    template, _ = saved
    shown = template.tokenizer.decode(template.encode(AGENT)[0], skip_special=False)
    tools = f"<tools>\n{json.dumps(TOOLS[0], ensure_ascii=False)}\n</tools>"
    thought, called = "<think>\nAdd.\n</think>\n\n", f"<tool_call>\n{CALLED}\n</tool_call>"
    if template.name == "ours":
        assert shown == (
            f"<s><|system|>{tools}<|end|><|user|>2+3?<|end|><|assistant|>{thought}{called}<|end|>"
            "<|user|><tool_response>\n5\n</tool_response><|end|>"
            "<|assistant|><think>\nDone.\n</think>\n\nIt is 5.<|end|>"
        )
    else:
        assert shown == (
            f"<|im_start|>system\n{tools}<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n"
            f"<|im_start|>assistant\n{thought}{called}<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nDone.\n</think>\n\nIt is 5.<|im_end|>\n"
        )
    with_system = template.encode([{"role": "system", "content": "S", "tools": TOOLS}, user("q"), answer("a")])[0]
    assert f"S\n\n{tools}" in template.tokenizer.decode(with_system)


@pytest.mark.parametrize("name", ["plain", "llama2", "mftcoder"])
def test_templates_that_cannot_render_results_refuse_them(ours, name):
    template = load_template(ours, name)
    with pytest.raises(ValueError, match=f"{name} refuses this conversation"):
        template.encode([user("q"), call("a", {}), result("r"), answer("a")])
    with pytest.raises(ValueError, match=f"message 1 is nothing but tool_calls, which {name} does not render"):
        template.encode(AGENT[:2])
    assert template.leaves_out(KEYS) == ["reasoning_content"]


@pytest.mark.parametrize("name", ["ours", "chatml", "llama2"])
def test_a_run_of_the_former_text_of_our_templates_is_resumed(name):
    """The hashes are those in checkpoints that were written before the templates rendered thoughts and tools."""
    jinja = read_template(TEMPLATES / f"{name}.jinja")[0]
    former = {"ours": "f530fd43", "chatml": "508e2be4", "llama2": "cd0319e3"}
    assert template_hash(jinja).startswith(former[name])
    assert template_hash(jinja + " ") == hashlib.sha256((jinja + " ").encode()).hexdigest()


def their_ids(theirs, messages: list[dict], prompt: bool = False) -> list[int]:
    """What transformers renders, with the tools beside the messages."""
    tools = messages[0].get("tools")
    messages = [{key: value for key, value in message.items() if key not in ("tools", "loss")} for message in messages]
    return theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)["input_ids"]


@pytest.mark.parametrize("messages", [THOUGHTS, KEYS, AGENT, TWICE, [{"role": "system", "content": "S"}, *KEYS]])
def test_conversations_and_prompts_are_those_of_transformers(published, messages):
    name, template, theirs = published
    if name == "r1" and messages in (AGENT, TWICE):
        pytest.skip("the template does not know tools")
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            assert template.encode(messages[:n], add_generation_prompt=True)[0] == their_ids(theirs, messages[:n], True)
    if name != "r1":  # which cuts the thought out of the last answer
        assert template.encode(messages)[0] == their_ids(theirs, messages)


@given(messages=agents(TEXT))
@settings(max_examples=40, deadline=None)
def test_any_texts_are_rendered_as_transformers_does(published, messages):
    name, template, theirs = published
    if not name.startswith("qwen"):
        pytest.skip("the template refuses several calls in a message, or knows no tools")
    ids, mask = template.encode(messages)
    assert ids == their_ids(theirs, messages)
    # Each answer is trained from its marker on to the end of its turn, which Qwen writes once for each.
    answers = text_of(template.tokenizer, ids, mask)
    assert len(answers) == sum(message["role"] == "assistant" for message in messages)
    shown = template.tokenizer.decode(ids, skip_special=False)
    assert answers == [
        f"{turn}<|im_end|>" for turn in re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", shown, re.S)
    ]


# By hand: what a model writes after each prompt.
CALLED = '{"name": "add", "arguments": {"a": 2}}'
CALLED4 = '{"name": "add", "arguments": {"a": 4}}'
TRAINED = {
    "qwen3": {
        "thoughts": ["5<|im_end|>", "<think>\nFive.\n</think>\n\n6<|im_end|>"],
        "keys": ["5<|im_end|>", "<think>\nFive.\n</think>\n\n6<|im_end|>"],
        "agent": [
            f"<think>\nAdd.\n</think>\n\n<tool_call>\n{CALLED}\n</tool_call><|im_end|>",
            "<think>\nDone.\n</think>\n\nIt is 5.<|im_end|>",
        ],
        "twice": [
            f"<tool_call>\n{CALLED}\n</tool_call><|im_end|>",
            "It is 5.<|im_end|>",
            f"<tool_call>\n{CALLED4}\n</tool_call><|im_end|>",
            "<think>\n\n</think>\n\n9<|im_end|>",
        ],
    },
    "r1": {
        "thoughts": ["\n\n5<｜end▁of▁sentence｜>", "Five.\n</think>\n\n6<｜end▁of▁sentence｜>"],
        "keys": ["5<｜end▁of▁sentence｜>", "Five.\n</think>\n\n6<｜end▁of▁sentence｜>"],
    },
    "llama3.2": {
        "agent": ['{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "It is 5.<|eot_id|>"],
        "thoughts": [f"{message['content']}<|eot_id|>" for message in THOUGHTS[1::2]],
    },
    "qwen2.5": {
        "agent": [f"<tool_call>\n{CALLED}\n</tool_call><|im_end|>", "It is 5.<|im_end|>"],
        "thoughts": [f"{message['content']}<|im_end|>" for message in THOUGHTS[1::2]],
    },
    "mistral3": {
        "agent": [f'[TOOL_CALLS] [{CALLED[:-1]}, "id": "abcdefgh0"}}]</s>', " It is 5.</s>"],
        "twice": [
            f'[TOOL_CALLS] [{CALLED[:-1]}, "id": "abcdefgh0"}}]</s>',
            " It is 5.</s>",
            f'[TOOL_CALLS] [{CALLED4[:-1]}, "id": "abcdefgh0"}}]</s>',
            " 9</s>",
        ],
    },
}
TRAINED["qwen3, special thoughts"] = TRAINED["qwen3"]
CONVERSATIONS = {"thoughts": THOUGHTS, "keys": KEYS, "agent": AGENT, "twice": TWICE}


def test_what_is_trained(published):
    name, template, _ = published
    for conversation, trained in TRAINED[name].items():
        messages = CONVERSATIONS[conversation]
        assert text_of(template.tokenizer, *template.encode(messages)) == trained, conversation
        last = [m | {"loss": False} if m["role"] == "assistant" else m for m in messages[:-1]] + messages[-1:]
        assert text_of(template.tokenizer, *template.encode(last)) == trained[-1:], conversation


def test_a_thought_that_is_cut_out_continues_the_prompt(tmp_path):
    """DeepSeek-R1: transformers' prompt, then the answer as the model writes it."""
    template, theirs = open_published("r1", tmp_path)
    for messages in (THOUGHTS, KEYS):
        rest = theirs("Five.\n</think>\n\n6<｜end▁of▁sentence｜>", add_special_tokens=False)["input_ids"]
        prompt = their_ids(theirs, messages[:-1], prompt=True)
        assert template.encode(messages) == (prompt + rest, text_mask(template, messages, prompt, rest))
    plain = [user("q"), answer("<b>a</b>")]  # begins like <think>
    ids, mask = template.encode(plain)
    assert ids == their_ids(theirs, plain)
    assert text_of(template.tokenizer, ids, mask) == ["<b>a</b><｜end▁of▁sentence｜>"]


def text_mask(template: ChatTemplate, messages: list[dict], prompt: list[int], rest: list[int]) -> list[bool]:
    """By hand: earlier answers from <｜Assistant｜> to the end of the sentence, and all of the last one."""
    begin, end = (template.tokenizer.special[name] for name in ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"))
    first, stop = prompt.index(begin) + 1, prompt.index(end) + 1
    return [first <= i < stop for i in range(len(prompt))] + [True] * len(rest)


def test_what_a_template_leaves_out(published):
    name, template, _ = published
    everything = {"qwen3": ["name", "tool_call_id"], "qwen2.5": ["reasoning_content", "name", "tool_call_id"]}
    everything |= {"llama3.2": ["reasoning_content", "name", "tool_call_id"], "mistral3": ["reasoning_content", "name"]}
    # Mistral's template writes a system message only where the last message is the user's.
    everything["mistral3"].append("role system")
    everything |= {"r1": ["tool_calls", "name", "tool_call_id", "tools", "role tool"]}
    system = {"role": "system", "content": "S", "tools": TOOLS}
    assert template.leaves_out([system, *AGENT]) == everything[name.partition(",")[0]]
    assert template.leaves_out([user("q"), answer("a")]) == []
    beside = [] if name.startswith("qwen") else ["content beside tool_calls"]
    assert template.leaves_out([user("q"), call("text", {})])[-1:] == beside or name == "r1"


def test_blocks_of_the_last_exchange_alone(tmp_path):
    """A template may mark some answers only, as OLMo 3 trains thoughts: the mask is that of transformers."""
    jinja = QWEN3.replace(
        "{{- '<think>\\n' + thought.strip('\\n')", "{% generation %}{{- '<think>\\n' + thought.strip('\\n')"
    ).replace("{{- content.lstrip('\\n') }}", "{{- content.lstrip('\\n') + '<|im_end|>' }}{% endgeneration %}")
    jinja = jinja.replace("{{- content }}\n", "{{- content + '<|im_end|>' }}\n").replace(
        "'<|im_end|>\\n' }}\n    {%- elif message.role == 'tool'", "'\\n' }}\n    {%- elif message.role == 'tool'"
    )
    template, theirs = open_published("qwen3", tmp_path, jinja)
    assert template.encode(THOUGHTS) == rendered(theirs, THOUGHTS)
    last = [THOUGHTS[0], THOUGHTS[1] | {"loss": False}, *THOUGHTS[2:]]
    assert template.encode(last) == rendered(theirs, THOUGHTS)
    first = [*THOUGHTS[:3], THOUGHTS[3] | {"loss": False}]
    assert not any(template.encode(first)[1])


def test_special_tokens_in_calls_results_and_tools_are_text(published):
    name, template, _ = published
    if name == "r1":
        pytest.skip("the template does not know tools")
    special = set(template.tokenizer.special.values())

    def count(text: str) -> list[int]:
        tools = [{"type": "function", "function": {"name": "add", "description": text, "parameters": {}}}]
        messages = [user("q", tools=tools), call("", {"a": text}), result(text), answer("a")]
        return [i for i in template.encode(messages)[0] if i in special]

    forged = "".join(name for name in template.tokenizer.special if "think" not in name)
    assert count(forged) == count("harmless")


@pytest.mark.parametrize(
    "jinja, error",
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 'a' * 1000000000 }}", "makes a value of more than 67,108,864 characters"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "writes more than 67,108,864 characters"),
        ("{{ 'a' | center(99999999) }}", "writes more than 67,108,864 characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 0.2 seconds"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
            "more than 0.2 seconds",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        (
            "{% set n = namespace(x='abc') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "makes a value of more than",
        ),
        ("{{ 9 ** 999999999 }}", "makes a value of more than"),
        ("{{ [1] + 1 }}", "TypeError"),
        ("{{ messages[9].content.x }}", "refuses this conversation"),
        ("(" * 9, "writes no special token|changes an answer"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "is not a valid Jinja template"),
    ],
)
def test_a_template_that_fails_or_never_ends_is_refused_in_a_sentence(byte_level, jinja, error, monkeypatch):
    monkeypatch.setattr("chat.jinja.Environment.seconds", 0.2)
    with pytest.raises(ValueError, match=error) as caught:
        ChatTemplate(byte_level, jinja)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_place_that_cannot_be_found_names_the_way_on(tmp_path):
    jinja = MISTRAL3.replace("{{- bos_token }}", "{{- bos_token }}{{- messages | length }}")
    jinja = jinja.replace("system + message['content']", "message['content'] | length | string")
    template, _ = open_published("mistral3", tmp_path, jinja)
    with pytest.raises(ValueError, match=r"cannot be found.* generation .*, or choose another --data\.template"):
        template.encode([user("q"), answer("a"), user("q"), answer("b")])


class Scripted:
    """A decoder that answers with these texts, one after another."""

    def __init__(self, template: ChatTemplate, *texts: str) -> None:
        self.ids, self.prompts = iter([template.tokenizer.encode(text) for text in texts]), []

    def stream(self, prompt, params, stop, cache):
        self.prompts.append(list(prompt))
        return iter(next(self.ids))


@pytest.mark.parametrize("name, opened", [("qwen3", "<think>\n"), ("r1", "")])
def test_a_chat_shows_thoughts_and_passes_them_on_as_the_template_wants(tmp_path, name, opened):
    template, theirs = open_published(name, tmp_path)
    texts = [f"{opened}Two.\n</think>\n\n5", f"{opened}Five.\n</think>\n\n6", f"{opened}None.\n</think>\n\n7"]
    model = Transformer(ModelArgs(vocab_size=template.tokenizer.vocab_size, dim=8, n_layers=1, n_heads=1))
    decoder = Scripted(template, *texts)
    session = ChatSession(Assistant(model, template.tokenizer, template, decoder=decoder))
    history = []
    for question, text in zip(("2+3?", "+1?", "+1?"), texts):
        assert "".join(session.reply(question, SamplingParams())) == text
        history.append(user(question))
        assert decoder.prompts[-1] == their_ids(theirs, history, True)
        history.append(answer(text))
    assert session.messages == history

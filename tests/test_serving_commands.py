"""The commands of a chat, with a real conversation behind them."""

import json

import pytest
from helpers.small_model import ByteTokenizer
from test_serving_session import CHAT, Template, chat_model

from chat.conversations import file_conversations
from decoding.params import SamplingParams
from serving.assistant import Assistant
from serving.commands import Talk, carry_out, is_command, with_setting
from serving.session import ChatSession

HOT = SamplingParams(temperature=1.5, top_k=0, max_new_tokens=10)


class StrictTemplate(Template):
    """One without a place for a system message."""

    def encode(self, messages, add_generation_prompt=False):
        return super().encode([each for each in messages if each["role"] != "system"], add_generation_prompt)


def make_talk(template=Template, params=HOT, max_seq_len=120) -> Talk:
    session = ChatSession(Assistant(chat_model(max_seq_len), ByteTokenizer(), template()))
    return Talk(session.reply, params, session)


def answer(talk: Talk, text: str) -> str:
    """The answer to a question, which is repeated until there is one."""
    while not (pieces := "".join(talk.ask(text, talk.params))):
        pass
    return pieces


def test_what_is_a_command():
    assert all(map(is_command, ("/retry", "/set top_k 1", "/system be\nbrief", "/unknown")))
    assert not any(map(is_command, ("what?", "/usr/bin/env\nis a path", "a /retry")))


def test_set_changes_one_field(capsys):
    params = SamplingParams()
    assert with_setting(params, ["top_k", "5"]) == SamplingParams(top_k=5)
    assert with_setting(params, ["temperature", "1"]) == SamplingParams(temperature=1.0)
    talk = make_talk()
    carry_out("/set temperature 0.5", talk)
    assert talk.params.temperature == 0.5 and capsys.readouterr().err == "(temperature is 0.5)\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set", "/set expects a name and a value, as in /set temperature 0.7"),
        ("/set temperature 0.7 0.8", "/set expects a name and a value"),
        ("/set temprature 0.7", "unknown setting temprature; did you mean 'temperature'"),
        ("/set top_k 1.5", "top_k should be a whole number, found 1.5"),
        ("/set temperature hot", "temperature should be a number, found hot"),
        ("/set temperature -1", "temperature should be from 0 to 100, found -1.0"),
        ("/rest", "unknown command /rest; did you mean '/reset'"),
        ("/retry", "there is no question to answer again"),
        ("/save", "/save expects the name of a file, as in /save talk.jsonl"),
        ("/save x.jsonl", "/save: there is no conversation yet"),
        ("/load", "/load expects the name of a file"),
        ("/load no/such", "/load no/such: there is no such file"),
    ],
)
def test_commands_that_make_no_sense_are_one_sentence(line, sentence):
    with pytest.raises(ValueError) as error:
        carry_out(line, make_talk())
    assert sentence in str(error.value)


@pytest.mark.parametrize("line", ["/retry", "/save x", "/load x", "/system x"])
def test_what_needs_a_conversation_says_so(line):
    with pytest.raises(ValueError, match=f"{line[:5]}.* needs a conversation"):
        carry_out(line, Talk(lambda text, params: iter(()), CHAT))


def test_help_names_every_setting(capsys):
    talk = make_talk()
    talk.session.set_system("be {brief}")
    carry_out("/help", talk)
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("temperature 1.5", "seed 0", "/reset", "/quit", "/retry", "now: be {brief}"))
    carry_out("/help", Talk(lambda text, params: iter(()), CHAT))


def test_retry_draws_another_answer_in_the_place_of_the_last():
    talk = make_talk()
    answer(talk, "hello")
    first = answer(talk, "and then")
    again = "".join(carry_out("/retry", talk))
    assert again != first and [m["content"] for m in talk.session.messages][2:] == ["and then", again]
    stopped = carry_out("/retry", talk)
    stopped.close()  # before it has begun
    pieces = carry_out("/retry", talk)
    next(pieces)
    pieces.close()
    assert len(talk.session.messages) == 4 and talk.session.messages[2]["content"] == "and then"
    kept = talk.session.messages
    talk.params = SamplingParams(max_new_tokens=200)
    talk.session.cache.max_len = 10  # now the question does not fit
    with pytest.raises(ValueError):
        list(carry_out("/retry", talk))
    assert talk.session.messages == kept


def test_a_system_message_stands_before_what_follows(capsys):
    talk, other = make_talk(), make_talk()
    other.session.set_system("be brief")
    answer(talk, "hello")
    answer(other, "hello")
    carry_out("/system be brief", talk)
    assert talk.session.all_messages()[0] == {"role": "system", "content": "be brief"}
    talk.session.reset()
    other.session.reset()
    talk.session.asked = other.session.asked  # it is a part of the seed
    assert answer(talk, "hello") == answer(other, "hello")
    carry_out("/system -", talk)
    carry_out("/system", talk)
    told = capsys.readouterr().err.splitlines()
    assert told == ["(the system message is: be brief)", *2 * ["(there is no system message)"]]
    with pytest.raises(ValueError, match="tokens long, the model takes 120"):
        carry_out(f"/system {'x' * 200}", talk)
    with pytest.raises(ValueError, match="no place for a system message"):
        carry_out("/system x", make_talk(StrictTemplate))
    assert talk.session.assistant.system == ""


def test_a_conversation_goes_on_from_its_file(tmp_path, capsys):
    talk, path = make_talk(), tmp_path / "my talk.jsonl"
    carry_out("/system be brief", talk)
    answer(talk, "你好")
    carry_out(f"/save {path}", talk)
    following = answer(talk, "and then")
    carry_out(f"/save {path}", talk)  # its own file is replaced
    assert len(next(iter(file_conversations(path, [])))) == 5
    fresh = make_talk()
    carry_out(f"/load {path}", fresh)
    assert fresh.session.all_messages() == talk.session.all_messages()
    assert "".join(carry_out("/retry", fresh)) and following
    stranger = make_talk()
    answer(stranger, "hello")
    with pytest.raises(ValueError, match="the file is there already; choose another name"):
        carry_out(f"/save {path}", stranger)
    with pytest.raises(ValueError, match=r"could not be written"):
        carry_out(f"/save {tmp_path / 'no such' / 'file'}", talk)
    record = {"messages": [*talk.session.messages, {"role": "user", "content": "last?"}]}
    (tmp_path / "page.jsonl").write_text(json.dumps(record))
    carry_out(f"/load {tmp_path / 'page.jsonl'}", fresh)
    assert fresh.session.messages == talk.session.messages  # a question without an answer is left out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "file.jsonl has no usable answer"),
        ("{", "file.jsonl:1: not JSON"),
        ('{"messages": []}', "needs at least one message"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "the conversation has no answer"),
        ('{"text": "a"}', "should be of role"),
        (2 * '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n', "found 2"),
    ],
)
def test_files_that_are_no_conversation_change_nothing(tmp_path, text, sentence):
    talk, path = make_talk(), tmp_path / "file.jsonl"
    path.write_text(text)
    answer(talk, "hello")
    before = talk.session.messages
    with pytest.raises(ValueError, match=sentence):
        carry_out(f"/load {path}", talk)
    assert talk.session.messages == before


def test_reset_forgets(capsys):
    talk = make_talk()
    answer(talk, "hello")
    carry_out("/reset", talk)
    assert talk.session.messages == [] and capsys.readouterr().err == "(forgotten)\n"

"""A conversation turn by turn against the whole of it from scratch."""

import dataclasses

import pytest
import torch
from helpers.small_model import ByteTokenizer

from decoding.generate import generate
from decoding.params import SamplingParams, Stop
from decoding.speculative import PromptLookup, Speculative
from model import Transformer
from model_args import ModelArgs
from serving.assistant import Assistant
from serving.session import ChatSession
from serving.streaming import StopStrings


class Template:
    """A chat format over bytes and four markers, the shape of the real one."""

    stop_ids = (259,)

    def encode(self, messages, add_generation_prompt=False):
        ids, role = [], {"system": 256, "user": 257, "assistant": 258}
        if add_generation_prompt and messages[-1]["role"] != "user":  # as chat/template.py does
            raise ValueError(f"nothing to answer: the last message is of role {messages[-1]['role']}")
        for message in messages:
            ids += [role[message["role"]], *message["content"].encode(), 259]
        return ids + [258] * add_generation_prompt, None


CHAT = SamplingParams(temperature=0, max_new_tokens=10)


class ASCIIModel(Transformer):
    """Only ids 97..122 and the end marker come out, so that answers re-encode to the same ids."""

    def logits(self, hidden):
        allowed = torch.zeros(self.args.vocab_size, dtype=torch.bool)
        allowed[[*range(97, 123), 259]] = True
        return super().logits(hidden).masked_fill(~allowed, -torch.inf)


def chat_model(max_seq_len: int = 120) -> Transformer:
    torch.manual_seed(1)
    model = ASCIIModel(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=260, max_seq_len=max_seq_len))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def fed_tokens(model: Transformer, monkeypatch) -> list[int]:
    """A list that grows by the number of tokens of every forward pass."""
    widths, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, **kw: widths.append(tokens.numel()) or hidden(tokens, **kw))
    return widths


@pytest.mark.parametrize("system", ["", "be brief"])
def test_each_turn_equals_the_whole_conversation_from_scratch(monkeypatch, system):
    model, template, tokenizer = chat_model(), Template(), ByteTokenizer()
    session = ChatSession(Assistant(model, tokenizer, template, system=system))
    history = [{"role": "system", "content": system}] if system else []
    for turn, question in enumerate(["hello", "and then", "??"]):
        widths = fed_tokens(model, monkeypatch)
        params = dataclasses.replace(CHAT, temperature=0.8, seed=3)
        answer = list(session.ask(question, params))
        monkeypatch.undo()
        history.append({"role": "user", "content": question})
        prompt, _ = template.encode(history, add_generation_prompt=True)
        expected = generate(model, [prompt], dataclasses.replace(params, seed=3 + turn), Stop(template.stop_ids))[0]
        assert answer == expected
        if turn:  # the question with its three markers, and what the answer before left unfed
            assert widths[0] <= len(question) + 5
        history.append({"role": "assistant", "content": tokenizer.decode(answer)})
        assert session.messages == history[bool(system) :]


def test_the_oldest_turns_go_when_the_context_is_full():
    model, template = chat_model(max_seq_len=40), Template()
    session = ChatSession(Assistant(model, ByteTokenizer(), template, system="s"))
    for i in range(5):
        answer = list(session.ask(f"question {i}", CHAT))
        kept = [{"role": "system", "content": "s"}, *session.messages[:-1]]
        prompt, _ = template.encode(kept, add_generation_prompt=True)
        assert len(prompt) <= 30 and kept[0]["content"] == "s" and kept[-1]["content"] == f"question {i}"
        assert answer == generate(model, [prompt], CHAT, Stop(template.stop_ids))[0]
        assert session.forgotten + len(session.messages) // 2 == i + 1
    assert session.forgotten >= 3


def test_a_question_that_does_not_fit_leaves_the_history_alone():
    session = ChatSession(Assistant(chat_model(max_seq_len=40), ByteTokenizer(), Template()))
    list(session.ask("hi", CHAT))
    before = list(session.messages)
    with pytest.raises(ValueError, match="the prompt is 53 tokens long, the model takes 40"):
        session.ask("x" * 50, CHAT)
    assert session.messages == before and session.forgotten == 0
    assert len(list(session.ask("x" * 30, CHAT))) >= 1  # less room than asked for, but some


def test_an_answer_cut_short_enters_the_history():
    model = chat_model()
    session = ChatSession(Assistant(model, ByteTokenizer(), Template()))
    answer = session.ask("hello", CHAT)
    said = [next(answer), next(answer)]
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": ByteTokenizer().decode(said)}
    following = list(session.ask("go on", CHAT))
    prompt, _ = Template().encode(session.messages[:-1], add_generation_prompt=True)
    assert following == generate(model, [prompt], CHAT, Stop(Template.stop_ids))[0]
    session.ask("never read", CHAT)  # an answer nobody asked for changes nothing
    assert len(session.messages) == 4
    session.reset()
    assert session.messages == []


def test_a_stop_string_ends_a_turn_and_what_comes_after_it_is_not_made():
    model, tokenizer = chat_model(), ByteTokenizer()
    whole = tokenizer.decode(list(ChatSession(Assistant(model, tokenizer, Template())).ask("hello", CHAT)))
    stop = StopStrings(tokenizer, [whole[3:5]])
    decoders = (None, Speculative(model, PromptLookup(260)))
    for decoder in decoders:
        session = ChatSession(Assistant(model, tokenizer, Template(), decoder, stop))
        end = whole.index(whole[3:5])
        assert tokenizer.decode(list(session.ask("hello", CHAT))) == whole[: end + 2]
        assert session.messages[-1]["content"] == whole[:end]
        assert "".join(session.reply("hello", CHAT)).encode() == session.messages[-1]["content"].encode()

"""Samples against what the slow way gives: which ids are trained, and what is counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import sentencepiece
from helpers.character_template import ANSWER, BOS, END, ROLE_ID, CharTemplate, epoch_targets, exchange
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.conversations import file_conversations
from chat.samples import Record, encode_samples, read_samples
from chat.template import ChatTemplate, load_template
from corpora.registry import BadRecord
from dataset import IGNORE
from dataset_sft import SFTData
from tokenizer import load_tokenizer

# --- conversations -> samples


@settings(max_examples=200, deadline=None)
@given(
    conversations=st.lists(
        st.lists(st.text("天地玄黄", max_size=6), min_size=2, max_size=7).map(lambda texts: exchange(*texts)),
        max_size=8,
    ),
    seq_len=st.integers(1, 40),
    too_long=st.sampled_from(["cut", "drop"]),
)
def test_samples_train_the_answers_and_their_end_alone(conversations, seq_len, too_long):
    samples = encode_samples(conversations, CharTemplate(), seq_len, too_long)
    expected = []  # of each sample: its ids, and those of them that are answers or the end of one
    for messages in conversations:
        ids = CharTemplate().encode(messages)[0]
        if len(ids) > seq_len + 1 and too_long == "drop":
            continue
        ids = ids[: seq_len + 1]
        speaker = [
            max((t, i) for t, i in enumerate(ids[: at + 1]) if i in (BOS, *ROLE_ID.values())) for at in range(len(ids))
        ]
        trained = [i >= ANSWER or (i == END and speaker[at][1] == ROLE_ID["assistant"]) for at, i in enumerate(ids)]
        if any(trained):
            expected.append((ids, trained))
    found = list(zip(samples.offsets[:-1].tolist(), samples.offsets[1:].tolist()))
    assert [(samples.ids[a:b].tolist(), samples.mask[a:b].tolist()) for a, b in found] == expected
    assert (samples.ids.dtype, samples.mask.dtype, samples.offsets.dtype) == (np.int32, bool, np.uint64)
    stats = samples.stats
    assert stats["samples"] == len(samples) == len(expected)
    assert stats["tokens"] == len(samples.ids) and stats["targets"] == samples.mask.sum()
    left_out = stats["dropped"] + stats["beyond"] + stats["without_target"]
    assert stats["conversations"] == stats["samples"] + left_out


def test_what_is_cut_dropped_and_left_without_target_is_counted():
    short, long, question = exchange("问", "答"), exchange("问", "答" * 20), exchange("问" * 20, "答")
    untrained = [[asked, answered | {"loss": False}] for asked, answered in (short, long)]
    given_ = [short, long, question, *untrained]
    cut = encode_samples(given_, CharTemplate(), 10)
    expected = {"conversations": 5, "samples": 2, "tokens": 7 + 11, "targets": 2 + 6}
    assert cut.stats == expected | {"cut": 1, "dropped": 0, "beyond": 1, "without_target": 2, "turns": 5}
    assert cut.ids[-1] >= ANSWER  # no end token where the answer does not end
    dropped = encode_samples(given_, CharTemplate(), 10, "drop").stats
    expected = {"samples": 1, "dropped": 2, "cut": 0, "beyond": 0, "without_target": 2}  # no length would give them one
    assert expected.items() <= dropped.items()


@pytest.mark.parametrize(("seq_len", "cut"), [(5, 1), (6, 0), (7, 0)])
def test_a_sample_exactly_at_the_limit_is_whole(seq_len, cut):
    samples = encode_samples([exchange("问", "答")], CharTemplate(), seq_len)  # 7 ids take 6 positions
    assert samples.stats["cut"] == cut and samples.stats["tokens"] == 7 - cut
    batch = SFTData(samples, seq_len, 1, 0).batch(0)
    assert batch.n_targets == samples.stats["targets"] == 2 - cut
    assert (batch.targets[0, 5:] == END).sum() == (1 - cut)


def test_an_empty_answer_trains_its_end_alone():
    batch = SFTData(encode_samples([exchange("问", "")], CharTemplate(), 8), 8, 1, 0).batch(0)
    assert batch.targets[0].tolist() == [IGNORE] * 4 + [END] + [IGNORE] * 3


def test_an_id_nothing_precedes_is_no_target():
    class Whole:
        def encode(self, messages):
            return [8] * len(messages), [True] * len(messages)

    samples = encode_samples([exchange("a"), exchange("a", "b")], Whole(), 4)
    assert samples.stats["without_target"] == 1 and samples.stats["targets"] == 1


def test_only_the_last_answer_is_trained_if_so_asked():
    messages = exchange("问", "答一", "问", "答二")
    samples = encode_samples([messages], CharTemplate(), 40, train_on="last")
    assert samples.stats["turns"] == 2 and samples.stats["targets"] == 3
    assert samples.mask.tolist() == [False] * (len(samples.ids) - 3) + [True] * 3
    assert [message.get("loss") for message in messages] == [None] * 4  # the records stay as they were
    with pytest.raises(ValueError, match="'all' or 'last', found 'first'"):
        encode_samples([], CharTemplate(), 8, train_on="first")


def test_a_text_without_roles_is_trained_whole(chat_template):
    tokenizer = chat_template.tokenizer
    samples = encode_samples([[{"role": "text", "content": "明月"}]], chat_template, 40)
    assert samples.ids.tolist() == [tokenizer.eos_id, *tokenizer.encode("明月"), tokenizer.eos_id]
    assert samples.mask.tolist() == [False] + [True] * (len(samples.ids) - 1)


@pytest.mark.parametrize(
    "n_question, n_answer, seq_len", [(128, 128, 256), (128, 200, 256), (200, 200, 512), (3, 3, 10)]
)
def test_mask_and_end_where_question_and_answer_fill_the_row(n_question, n_answer, seq_len):
    """No budget of its own for either, no target in the padding, an end token only after a whole answer."""
    samples = encode_samples([exchange("问" * n_question, "答" * n_answer)], CharTemplate(), seq_len)
    batch = SFTData(samples, seq_len, 1, 0, "none").batch(0)
    targets = batch.targets[0].tolist()
    whole = [ord("答") % 1000 + ANSWER] * n_answer + [END]
    before = 3 + n_question  # <s>, <|user|>, the question, <|end|>, and <|assistant|> is the input to the first target
    assert targets == ([IGNORE] * before + whole + [IGNORE] * seq_len)[: len(targets)]
    assert len(targets) == min(seq_len, -(-(before + len(whole)) // 16) * 16)  # as long as is needed, rounded up


def test_the_sides_of_a_split_share_no_question_and_miss_none(tmp_path, chat_template):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "{n % 50}", "answer": "{n}"}}\n' for n in range(200)) + '{"prompt": ""}\n')
    broken: list[BadRecord] = []
    aside: list[Record] = []
    kept = read_samples(path, chat_template, 30, broken=broken, share=0.3, aside=aside)
    assert len(kept) + len(aside) == 200 and len(broken) == 1
    questions = Counter(record.question for record in aside)
    assert set(questions.values()) == {4} and 4 <= len(questions) <= 28  # every question with all four answers
    others = [messages for messages in file_conversations(path, []) if messages[0]["content"] not in questions]
    assert kept.ids.tolist() == encode_samples(others, chat_template, 30).ids.tolist()


def test_what_the_template_refuses_is_kept_aside_with_its_place(tmp_path, chat_template):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "answer": "a"}\n{"prompt": "q [/INST] x", "answer": "a"}\n')
    broken: list[BadRecord] = []
    samples = read_samples(path, load_template(chat_template.tokenizer, "llama2"), 100, broken=broken)
    assert len(samples) == 1 and broken[0].where == f"{path}:2" and "'[/INST]'" in broken[0].reason


def test_why_nothing_is_left_to_train_is_one_sentence(tmp_path, chat_template):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a long question", "answer": "a"}\n')
    for too_long in ("cut", "drop"):
        with pytest.raises(
            ValueError,
            match=r"a\.jsonl: no conversation has an answer within 4 tokens; --data\.seq_len \d+ ",
        ):
            read_samples(path, chat_template, 4, too_long)
    with pytest.raises(ValueError, match=r"--data\.heldout_share 0\.9999 holds out every record; lower it"):
        read_samples(path, chat_template, 4, share=0.9999)
    path.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a", "loss": false}]}')
    for seq_len in (2, 40):
        with pytest.raises(ValueError, match=r'no conversation has an answer that is trained: .* "loss": false'):
            read_samples(path, chat_template, seq_len)


def test_a_wrong_word_for_too_long_samples_is_refused():
    with pytest.raises(ValueError, match="'cut' or 'drop', found 'split'"):
        encode_samples([], CharTemplate(), 8, "split")


@pytest.fixture(scope="module")
def chat_template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    """The project's own chat format over a SentencePiece model of little more than bytes."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["床前明月光，疑是地上霜。", "举头望明月，低头思故乡。", "the river ran on"] * 10),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=3,
        control_symbols=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        minloglevel=2,
    )
    return load_template(load_tokenizer(prefix.with_suffix(".model")))


PIECES = ["明月", "江", "river ", "，", "\n", "😀", "<|end|>", "<|assistant|>", "</s>"]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=2, max_size=6),
    system=st.booleans(),
    seq_len=st.integers(20, 200),
)
def test_targets_of_the_real_template_are_the_answers_as_they_are_generated(chat_template, texts, system, seq_len):
    messages = [{"role": "system", "content": "s"}] * system + exchange(*texts[: len(texts) // 2 * 2])
    samples = encode_samples([messages], chat_template, seq_len)
    end = chat_template.tokenizer.special_id("<|end|>")
    expected = Counter()  # every answer comes after the very prompt that asks for it in a chat
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, _ = chat_template.encode(messages[:n], add_generation_prompt=True)
            ids = prompt + chat_template.tokenizer.encode(message["content"]) + [end]
            expected.update((tuple(ids[:t]), ids[t]) for t in range(len(prompt), min(len(ids), seq_len + 1)))
    assert samples.stats["targets"] == expected.total()
    if expected:
        assert epoch_targets(SFTData(samples, seq_len, 1, 0)) == expected


@pytest.mark.parametrize("name", ["sharegpt_zh_multiturn_1k.jsonl", "medical_zh_1k.jsonl", "alpaca_zh_demo.json"])
def test_real_files_are_read_almost_whole_and_every_target_is_in_an_epoch(shared, name):
    broken = []
    conversations = list(file_conversations(shared / "sft" / name, broken))
    assert len(conversations) > 900 and len(broken) < 5  # a handful has empty answers or turns out of order
    samples = encode_samples(conversations, CharTemplate(), 512)
    data = SFTData(samples, 512, 16, 0)
    batches = [data.batch(step) for step in range(data.steps_per_epoch)]
    assert sum(batch.n_targets for batch in batches) == samples.stats["targets"] > 0
    n_answers = sum(message["role"] == "assistant" for messages in conversations for message in messages)
    whole = encode_samples(conversations, CharTemplate(), 1 << 20)  # nothing is cut: every answer has its end
    assert int((whole.ids[whole.mask] == END).sum()) == n_answers

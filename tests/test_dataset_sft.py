"""Samples and rows against what the slow way gives: which ids are trained, in which company, how often."""

from __future__ import annotations

import csv
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import IGNORE, Batch
from dataset_sft import Samples, SFTData, best_fit, encode_samples, file_conversations, to_messages
from model import ModelArgs, Transformer
from tokenizer import ChatTemplate, load_template, load_tokenizer

BOS, ROLE_ID, END = 1, {"system": 4, "user": 5, "assistant": 6}, 7
ANSWER = 5000  # the stand-in template writes answers with ids from here on, everything else below


class CharTemplate:
    """<s>, then <|role|> characters <|end|> for each message; the kind of text can be told from the id."""

    def encode(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        ids, mask = [BOS], [False]
        for message in messages:
            trained = message["role"] == "assistant"
            content = [ord(c) % 1000 + (ANSWER if trained else 100) for c in message["content"]]
            ids += [ROLE_ID[message["role"]], *content, END]
            mask += [False] + [trained] * (len(content) + 1)
        return ids, mask


def exchange(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def samples_of(lengths: list[int], seed: int = 0) -> Samples:
    """Samples of these many ids, all of them different, a random half of each trained."""
    offsets = np.cumsum([0, *lengths]).astype(np.uint64)
    mask = np.random.default_rng(seed).random(sum(lengths)) < 0.5
    return Samples(np.arange(10, 10 + sum(lengths), dtype=np.int32), mask, offsets, {})


def targets_in_context(samples: Samples) -> Counter:
    """(ids before it in its sample, target) of every trained id: what a loss over the samples one by one sees."""
    pairs = Counter()
    for start, stop in zip(samples.offsets[:-1].tolist(), samples.offsets[1:].tolist()):
        ids = samples.ids[start:stop].tolist()
        pairs.update((tuple(ids[:t]), ids[t]) for t in range(1, len(ids)) if samples.mask[start + t])
    return pairs


def targets_in_rows(batch: Batch) -> Counter:
    """The same of a batch, with the context that positions and doc_ids leave to each target."""
    pairs = Counter()
    for row in range(len(batch)):
        tokens, targets = batch.tokens[row].tolist(), batch.targets[row].tolist()
        docs = batch.doc_ids[row].tolist() if batch.doc_ids is not None else [0] * len(tokens)
        positions = batch.positions[row].tolist() if batch.positions is not None else list(range(len(tokens)))
        for t, target in enumerate(targets):
            if target != IGNORE:
                seen = [s for s in range(t + 1) if docs[s] == docs[t]]
                assert [positions[s] for s in seen] == list(range(len(seen))) and docs[t] >= 0
                pairs[tuple(tokens[s] for s in seen), target] += 1
    return pairs


def epoch_targets(data: SFTData, epoch: int = 0, world: int = 1) -> Counter:
    steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
    return sum((targets_in_rows(data.batch(step, rank, world)) for step in steps for rank in range(world)), Counter())


# --- records -> conversations


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"chat_rounds": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "id": 7},
        {"instruction": "q", "output": "a"},
        {"instruction": "", "input": "q", "output": "a"},
        *({q: "q", a: "a"} for q in ("prompt", "question") for a in ("answer", "response")),
        {"query": "q", "answer": "a"},
        {"input": "q", "output": "a"},
        {"messages": None, "prompt": "q", "answer": "a"},
    ],
)
def test_the_usual_records_are_one_conversation(record):
    assert to_messages(record) == exchange("q", "a")


def test_alpaca_input_belongs_to_the_question():
    record = {"instruction": "译成英文：", "input": "江上", "output": "On the river"}
    assert to_messages(record) == exchange("译成英文：\n江上", "On the river")


def test_turns_after_a_system_message_and_a_last_question_nobody_answers():
    turns = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2"), ("human", "q3")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    assert to_messages(record) == [{"role": "system", "content": "s"}, *exchange("q1", "a1", "q2", "a2")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["q", "a"], "the record is list, expected an object"),
        ("q", "the record is str"),
        ({}, r"under the keys \(none\)"),
        ({"prompt": "q"}, "no question and answer under the keys prompt"),
        ({"prompt": "q", "answer": ""}, r"message 1 \(assistant\) has no text: ''"),
        ({"prompt": "q", "answer": " \n"}, r"message 1 \(assistant\) has no text"),
        ({"question": "q", "answer": None}, r"string, found .*None"),
        ({"question": "q", "answer": 3}, r"string, found .*3"),
        ({"instruction": "", "input": "", "output": "a"}, r"message 0 \(user\) has no text"),
        ({"question": "q", "answer": "a\ud800"}, r"message 1 \(assistant\) is not UTF-8"),
        ({"messages": []}, "no question and answer"),
        ({"conversations": []}, "at least one message"),
        ({"messages": exchange("q")}, "nothing is answered"),
        ({"messages": [{"role": "system", "content": "s"}, *exchange("q")]}, "nothing is answered"),
        ({"messages": ["q", "a"]}, "a turn is str, expected an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "string, found .*None"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 0 should be of role system or user, found 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 0 should be of role"),
        ({"messages": exchange("q", "a")[::-1]}, "message 0 should be of role system or user, found 'assistant'"),
        ({"messages": exchange("q", "a")[:1] * 2}, "message 1 should be of role assistant, found 'user'"),
        (
            {"messages": [*exchange("q", "a"), {"role": "system", "content": "s"}]},
            "message 2 should be of role user, found 'system'",
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 0 should be"),
    ],
)
def test_broken_records_say_why(record, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(record)


# --- files -> conversations

GOOD = [{"prompt": "问一", "answer": "答一"}, {"prompt": 'say, "two"', "answer": "two\nlines"}]
EXPECTED = [exchange(record["prompt"], record["answer"]) for record in GOOD]


def write(path: Path, rows: list[dict]) -> Path:
    """The same records in the format of the name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        array = json.dumps(rows, ensure_ascii=False, indent=1)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(array if path.suffix == ".json" else lines, encoding="utf8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_conversations_of_every_file_format(tmp_path, name):
    broken = []
    assert list(file_conversations(write(tmp_path / name, GOOD), broken)) == EXPECTED and not broken


def test_conversations_of_a_parquet_column_of_turns(tmp_path):
    path = write(tmp_path / "a.parquet", [{"messages": exchange("q", "a")}, {"messages": exchange("q", "a", "q", "a")}])
    assert list(file_conversations(path, [])) == [exchange("q", "a"), exchange("q", "a", "q", "a")]


def test_a_folder_is_its_files_in_order_without_plain_text(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jsonl", GOOD)
    write(tmp_path / "a.csv", [{"instruction": "q", "input": "", "output": "a"}])
    (tmp_path / "README.txt").write_text("about these files")
    assert list(file_conversations(tmp_path, [])) == [exchange("q", "a"), *EXPECTED]


def test_broken_records_are_kept_with_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with path.open("ab") as file:
        file.write(b'{"prompt": "q"\n[1]\n{"prompt": "q", "answer": ""}\n{"prompt": "q", "answer": "\xff\xfe"}\n')
    broken = []
    assert list(file_conversations(path, broken)) == EXPECTED
    assert [record.where for record in broken] == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    for record, reason in zip(broken, ("not JSON", "is list", "has no text", "not UTF-8")):
        assert reason in record.reason


def test_files_without_an_answer_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": "q", "answer": ""}])
    with pytest.raises(ValueError, match=r"no usable answer in 2 records; the first, .*a.jsonl:1: no question"):
        list(file_conversations(path, []))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl has no usable answer in 0 records"):
        list(file_conversations(tmp_path / "empty.jsonl", []))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="expected json, jsonl, csv, tsv or parquet, found plain text"):
        list(file_conversations(tmp_path / "a.txt", []))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(file_conversations(tmp_path / "nowhere.jsonl", []))


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
    assert stats["conversations"] == stats["samples"] + stats["dropped"] + stats["without_target"]


def test_what_is_cut_dropped_and_left_without_target_is_counted():
    short, long, question = exchange("问", "答"), exchange("问", "答" * 20), exchange("问" * 20, "答")
    cut = encode_samples([short, long, question], CharTemplate(), 10)
    expected = {"conversations": 3, "samples": 2, "tokens": 7 + 11, "targets": 2 + 6}
    assert cut.stats == expected | {"cut": 1, "dropped": 0, "without_target": 1}
    assert cut.ids[-1] >= ANSWER  # no end token where the answer does not end
    dropped = encode_samples([short, long, question], CharTemplate(), 10, "drop").stats
    assert (dropped["samples"], dropped["dropped"], dropped["cut"], dropped["without_target"]) == (1, 2, 0, 0)


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


# --- samples -> rows


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 14), min_size=1, max_size=25),
    room=st.integers(0, 9),
    share=st.integers(1, 3),
    world=st.integers(1, 3),
    epoch=st.integers(0, 2),
    packing=st.sampled_from(["best_fit", "none"]),
    shuffle=st.booleans(),
)
def test_packed_is_unpacked_and_every_sample_comes_once(lengths, room, share, world, epoch, packing, shuffle):
    samples = samples_of(lengths)
    data = SFTData(samples, max(lengths) - 1 + room, share * world, 3, packing, shuffle)
    assert epoch_targets(data, epoch, world) == targets_in_context(samples)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 14), min_size=1, max_size=25), seq_len=st.integers(13, 30))
def test_a_row_is_samples_one_after_another(lengths, seq_len):
    samples = samples_of(lengths)
    data = SFTData(samples, seq_len, 2, 1)
    taken = 0
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        assert [x.dtype for x in (batch.tokens, batch.targets, batch.positions)] == [torch.int64] * 3
        assert batch.doc_ids.dtype == torch.int32 and batch.tokens.shape == (2, seq_len)
        for tokens, docs, targets in zip(batch.tokens, batch.doc_ids, batch.targets):
            used = int((docs >= 0).sum())
            taken += used
            numbers = docs[:used].tolist()
            assert numbers == sorted(numbers) and set(numbers) == set(range(len(set(numbers))))
            assert docs[used:].eq(-1).all() and targets[used:].eq(IGNORE).all()
            for doc in set(numbers):
                ids = tokens[docs == doc].tolist()
                assert ids == list(range(ids[0], ids[0] + len(ids)))  # one whole sample, without its last id
                assert ids[0] - 10 in samples.offsets and ids[-1] + 2 - 10 in samples.offsets
    assert taken == sum(lengths) - len(lengths)
    assert data.packing_efficiency == pytest.approx(taken / (data.n_rows * seq_len), abs=1e-12)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_split_the_rows_of_a_single_process(world):
    data = SFTData(samples_of(np.random.default_rng(0).integers(2, 20, 77).tolist()), 24, 6, 3)
    for step in range(2 * data.steps_per_epoch):
        whole = data.batch(step)
        for rank in range(world):
            part = data.batch(step, rank, world)
            for name in ("tokens", "targets", "positions", "doc_ids"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[rank::world])
    with pytest.raises(ValueError, match="batch_size 6 does not divide over 4 processes"):
        data.batch(0, 0, 4)


def test_a_batch_depends_on_nothing_but_seed_and_step():
    samples = samples_of(np.random.default_rng(0).integers(2, 20, 50).tolist())
    data = SFTData(samples, 24, 4, 3)
    expected = [data.batch(step).tokens for step in range(3 * data.steps_per_epoch)]
    fresh = pickle.loads(pickle.dumps(SFTData(samples, 24, 4, 3)))
    for step in torch.randperm(len(expected)).tolist():
        np.random.seed(step)  # the global generator must not matter
        assert torch.equal(fresh.batch(step).tokens, expected[step])


def test_company_and_order_differ_by_epoch_and_seed_unless_not_shuffled():
    samples = samples_of(np.random.default_rng(0).integers(2, 12, 120).tolist())

    def rows(data: SFTData, epoch: int) -> list[list[int]]:
        steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
        return [row for step in steps for row in data.batch(step).tokens.tolist()]

    data = SFTData(samples, 20, 4, 3)
    assert rows(data, 0) != rows(data, 1) != rows(SFTData(samples, 20, 4, 4), 1)
    common = {tuple(row) for row in rows(data, 0)} & {tuple(row) for row in rows(data, 1)}
    assert len(common) < data.n_rows / 2  # not the same rows in another order
    fixed = SFTData(samples, 20, 4, 3, shuffle=False)
    assert rows(fixed, 0) == rows(fixed, 1)
    one_each = SFTData(samples, 20, 4, 3, "none", shuffle=False)
    assert [row[0] for row in rows(one_each, 0)][:120] == (samples.offsets[:-1].astype(int) + 10).tolist()
    assert one_each.n_rows == 120 and one_each.batch(0).doc_ids is None and one_each.batch(0).positions is None


def test_rows_that_fill_the_last_step_have_no_target():
    data = SFTData(samples_of([5, 5, 5]), 4, 2, 0)
    last = data.batch(1)
    assert data.steps_per_epoch == 2 and last.tokens.shape == (2, 4)
    assert last.doc_ids.tolist() == [[0] * 4, [-1] * 4] and last.targets[1].tolist() == [IGNORE] * 4


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), max_size=40), room=st.integers(0, 10))
def test_best_fit_takes_the_row_with_the_least_space_that_holds(sizes, room):
    sizes, capacity = sorted(sizes, reverse=True), 30 + room
    used: list[int] = []
    for size, row in zip(sizes, best_fit(np.array(sizes, int), capacity).tolist()):
        fitting = [capacity - u for u in used if capacity - u >= size]
        if fitting:
            assert capacity - used[row] == min(fitting)
            used[row] += size
        else:
            assert row == len(used)
            used.append(size)


def test_packing_wastes_little_of_short_samples():
    lengths = np.random.default_rng(0).integers(10, 100, 2000).tolist()
    packed, loose = (
        SFTData(samples_of(lengths), 128, 8, 0, packing).packing_efficiency for packing in ("best_fit", "none")
    )
    assert packed > 0.98 and loose < 0.45  # 0.996 and 0.427 in fact


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"packing": "greedy"}, "'best_fit' or 'none', found 'greedy'"),
        ({"seq_len": 4}, "2 to 5 ids for rows of 4, found 2 to 6; encode them with the same seq_len"),
        ({"samples": samples_of([1, 3])}, "found 1 to 3"),
        ({"samples": samples_of([])}, "no sample to train on"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_options_without_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SFTData(**({"samples": samples_of([6, 2]), "seq_len": 5, "batch_size": 2, "seed": 0} | options))


def test_the_loss_of_packed_rows_is_the_loss_of_samples_alone():
    model = Transformer(
        ModelArgs(dim=16, n_layers=2, n_heads=2, vocab_size=300, multiple_of=8, max_seq_len=32)
    ).double()
    samples = samples_of(np.random.default_rng(0).integers(2, 16, 20).tolist())
    loss = dict.fromkeys(("best_fit", "none"), 0.0)
    for packing in loss:
        data = SFTData(samples, 32, 4, 0, packing)
        for step in range(data.steps_per_epoch):
            batch = data.batch(step)
            total, count = model(batch.tokens, batch.targets, positions=batch.positions, doc_ids=batch.doc_ids)
            assert count == batch.n_targets
            loss[packing] += total.item()
    assert loss["best_fit"] == pytest.approx(loss["none"], rel=1e-6)  # the loss itself is summed in float32


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

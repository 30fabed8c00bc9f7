"""Pairs of answers on their way into batches: every pair once an epoch, whole, and seen as if it were alone."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.tiny_chat_model import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.conversations import PreferencePair, read_files, to_pair
from chat.samples import PAIRS, Record, Samples, encode_samples, read_samples
from chat.template import load_template
from dataset import IGNORE
from dataset_sft import PairData


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return load_template(chat_tokenizer(tmp_path_factory.mktemp("tokenizer")), "ours")


def pair(question: str, chosen: str, rejected: str, before: tuple = ()) -> PreferencePair:
    return PreferencePair([*before, {"role": "user", "content": question}], chosen, rejected)


def made_up(lengths: list[tuple[int, int]], seed: int = 0) -> Samples:
    """Pairs of texts of so many positions; no id occurs twice, and the mask is any with a target."""
    rng = np.random.default_rng(seed)
    sizes = [n + 1 for both in lengths for n in both]
    offsets = np.cumsum([0, *sizes]).astype(np.uint64)
    mask = rng.random(sum(sizes)) < 0.5
    mask[offsets[1:].astype(int) - 1] = True
    return Samples(np.arange(sum(sizes), dtype=np.int32), mask, offsets, {})


def test_the_last_answer_of_both_conversations_is_trained(template):
    before = ({"role": "user", "content": "sun?"}, {"role": "assistant", "content": "the sun"})
    samples = encode_samples([pair("moon?", "the moon", "no", before)], template, 100, kind=PAIRS)
    assert len(samples) == 2 and samples.stats["kept"] == 1
    for n, answer in enumerate(("the moon", "no")):
        here = np.s_[int(samples.offsets[n]) : int(samples.offsets[n + 1])]
        ids, mask = samples.ids[here], samples.mask[here]
        turns = [*before, {"role": "user", "content": "moon?"}, {"role": "assistant", "content": answer}]
        assert ids.tolist() == template.encode(turns)[0]
        trained = template.tokenizer.decode(ids[mask].tolist())
        assert answer in trained and "sun" not in trained


def test_what_does_not_fit_is_counted(template):
    long = "moon " * 30
    given_ = [
        pair("a?", "the moon", "no"),
        pair("b?", long, "no"),  # cut
        pair(long, "the moon", "no"),  # no answer is reached
        pair("c?", long + "one", long + "two"),  # alike as far as they are kept
    ]
    cut = encode_samples(given_, template, 30, kind=PAIRS)
    counts = {"pairs": 4, "kept": 2, "cut": 1, "dropped": 0, "beyond": 2, "alike": 0}
    assert counts.items() <= cut.stats.items() and len(cut) == 4
    assert max(np.diff(cut.offsets.astype(int))) == 31
    assert cut.stats["targets"] == cut.mask.sum() and cut.stats["tokens"] == len(cut.ids)
    dropped = encode_samples(given_, template, 30, "drop", kind=PAIRS).stats
    assert {"pairs": 4, "kept": 1, "cut": 0, "dropped": 3, "beyond": 0}.items() <= dropped.items()
    with pytest.raises(ValueError, match="'cut' or 'drop', found 'keep'"):
        encode_samples(given_, template, 30, "keep", kind=PAIRS)


def test_answers_that_the_template_makes_alike_are_not_blamed_on_the_length(template, tmp_path):
    jinja = template.jinja.replace("message['content']", "message['content'] | trim")
    (tmp_path / "trim.jinja").write_text(jinja)
    trimming = load_template(template.tokenizer, str(tmp_path / "trim.jinja"))
    path = tmp_path / "pairs.jsonl"
    record = {"prompt": "q", "chosen": "the moon", "rejected": "the moon "}
    path.write_text(json.dumps(record))
    for seq_len in (4, 40):
        with pytest.raises(ValueError, match=r"pairs\.jsonl: the template makes the two answers of every pair"):
            read_samples(path, trimming, seq_len, "drop", kind=PAIRS)
    assert read_samples(path, template, 40, kind=PAIRS).stats["kept"] == 1
    path.write_text(path.read_text() + "\n" + json.dumps(record | {"rejected": "no"}))
    assert {"alike": 1, "kept": 1}.items() <= read_samples(path, trimming, 40, kind=PAIRS).stats.items()


def test_files_are_split_by_the_hash_of_the_question(template, tmp_path):
    records = [{"prompt": f"{n}?", "chosen": "the moon", "rejected": "no"} for n in range(60)]
    records.append({"prompt": "?", "chosen": "same", "rejected": "same"})
    records.append({"prompt": "?", "chosen": f"<|{'x'}|>", "rejected": "no"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    broken = []
    whole = read_samples(path, template, 40, broken=broken, kind=PAIRS)
    aside: list[Record] = []
    kept = read_samples(path, template, 40, share=0.3, aside=aside, kind=PAIRS)
    assert whole.stats["kept"] == kept.stats["kept"] + len(aside) and 4 <= len(aside) <= 32
    questions = {record.question for record in aside}
    pairs = read_files(path, [], to_pair, "pair of answers")
    again = [pair for pair in pairs if pair.prompt[-1]["content"] not in questions]
    assert encode_samples(again, template, 40, kind=PAIRS).ids.tolist() == kept.ids.tolist()
    assert [bad.where for bad in broken] == [f"{path}:61"] and "the same" in broken[0].reason
    with pytest.raises(
        ValueError,
        match=r"no pair has two different answers within 3 tokens; --data\.seq_len \d+ ",
    ):
        read_samples(path, template, 3, kind=PAIRS)
    with pytest.raises(ValueError, match=r"--data\.heldout_share 0\.9999 holds out every record; lower it"):
        read_samples(path, template, 3, share=0.9999, kind=PAIRS)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
    batch=st.sampled_from([2, 4]),
    packing=st.sampled_from(["best_fit", "none"]),
    world=st.sampled_from([1, 2]),
    epoch=st.integers(0, 2),
    first=st.integers(0, 5),
)
def test_every_pair_once_an_epoch_whole_and_as_if_alone(lengths, batch, packing, world, epoch, first):
    samples = made_up(lengths)
    data = PairData(samples, 9, batch, seed=1, packing=packing, first=first)
    seen = []
    for step in range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch):
        for rank in range(world):
            mine = data.batch(step, rank, world)
            assert mine.tokens.shape == (batch // world, 18)
            parts = mine.split(1)  # a micro-batch of one row holds whole pairs
            assert sum(part.n_targets for part in parts) == mine.n_targets
            for part in parts:
                found = sorted(set(part.doc_ids.unique().tolist()) - {-1})
                assert found[1::2] == [i + 1 for i in found[::2]] and all(i % 2 == 0 for i in found[::2])
                assert part.n_targets == len(found) // 2
                seen += found
                for text in found:
                    here = part.doc_ids[0] == text
                    n = text - 2 * first
                    ids = samples.ids[int(samples.offsets[n]) : int(samples.offsets[n + 1])]
                    mask = samples.mask[int(samples.offsets[n]) : int(samples.offsets[n + 1])]
                    assert part.tokens[0][here].tolist() == ids[:-1].tolist()
                    assert part.targets[0][here].tolist() == np.where(mask, ids, IGNORE)[1:].tolist()
                    assert part.positions[0][here].tolist() == list(range(len(ids) - 1))
                    assert here.int().diff().abs().sum() <= 2  # in one piece
                assert (part.targets[part.doc_ids == -1] == IGNORE).all()
    assert sorted(seen) == list(range(2 * first, 2 * (first + len(lengths))))


def test_the_order_is_of_seed_and_epoch_alone():
    samples = made_up([(n % 7 + 1, n % 5 + 1) for n in range(40)])
    data = PairData(samples, 8, 4, seed=3)
    late = data.steps_per_epoch + 1
    for field in ("tokens", "targets", "positions", "doc_ids"):
        again = getattr(PairData(samples, 8, 4, seed=3).batch(late), field)
        assert torch.equal(getattr(data.batch(late), field), again)
        ranks = torch.cat([getattr(data.batch(late, rank, 2), field) for rank in range(2)])
        assert sorted(ranks.tolist()) == sorted(again.tolist())
    others = [data.batch(1).doc_ids, PairData(samples, 8, 4, seed=4).batch(late).doc_ids]
    assert not any(torch.equal(data.batch(late).doc_ids, other) for other in others)
    assert data.packing_efficiency > PairData(samples, 8, 4, 3, packing="none").packing_efficiency


def odd(samples: Samples) -> Samples:
    """The samples without the last one."""
    return dataclasses.replace(samples, offsets=samples.offsets[:-1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seq_len": 4}, "2 to 5 ids with seq_len 4, found 6 to 7; encode them with the same seq_len"),
        ({"packing": "concat"}, "packing is one of best_fit, none, found 'concat'"),
        ({"batch_size": 0}, "batch_size >= 1"),
        (
            {"samples": Samples(np.empty(0), np.empty(0), np.zeros(1, np.uint64), {})},
            "expected samples to train on, found none",
        ),
        ({"samples": odd(made_up([(5, 6), (5, 6)]))}, "expected 2 samples for each pair, found 3 in all"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PairData(**{"samples": made_up([(5, 6)]), "seq_len": 9, "batch_size": 2, "seed": 0} | arguments)

"""Samples in a form for readers."""

import numpy as np
import pytest
from helpers.character_template import CharTemplate, exchange
from helpers.tiny_chat_model import chat_tokenizer

from chat.samples import encode_samples, read_samples
from chat.show import marked, statistics
from chat.template import load_template


@pytest.mark.parametrize(("colour", "answer"), [(False, "⟦江</s><|end|>⟧"), (True, "\x1b[32m江</s><|end|>\x1b[0m")])
def test_the_text_of_a_sample_marks_what_is_trained(tmp_path, colour, answer):
    template = load_template(chat_tokenizer(tmp_path))
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "明月", "answer": "江</s>"}\n{"prompt": "q"}\n')
    samples = read_samples(path, template, 128)
    text = marked(template.tokenizer, samples.ids, samples.mask, colour)
    assert text == f"<s><|user|>明月<|end|><|assistant|>{answer}"


def test_a_character_that_is_cut_is_replaced(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    ids = np.array(tokenizer.encode("😀"))[:-1]  # without the last of its bytes
    assert marked(tokenizer, ids, np.ones(len(ids), bool), colour=False) == "⟦\ufffd⟧"


def test_statistics_count_records_targets_and_lengths():
    samples = encode_samples([exchange("问", "答"), exchange("问" * 20, "答")], CharTemplate(), 10)
    assert statistics(samples) == samples.stats | {
        "share of targets": "28.6%",  # 2 of 7
        "tokens a sample (percentiles)": "0% 7, 10% 7, 50% 7, 90% 7, 99% 7, 100% 7",
    }
    assert (samples.stats["samples"], samples.stats["turns"], samples.stats["beyond"]) == (1, 2, 1)

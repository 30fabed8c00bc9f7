"""Perplexity and bits per byte of any text, document by document, with a window that slides over long ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from corpora.files import find_files, read_files
from corpora.registry import BadRecord
from evaluation.benchmark import Benchmark, Item
from evaluation.likelihood import Pair, log_likelihoods, windows
from files import write_json_lines
from serving.assistant import Assistant, first_id

LETTER = re.compile(r"[^\W\d_]")
HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
CHINESE = 0.3  # a document is Chinese where this share of its letters is


@dataclass
class Perplexity(Benchmark):
    """Loss of every document of a text file or folder; `--subjects` are names of files."""

    stride: int | None
    per_document: Path | None

    name = "perplexity"
    source = "a text file, or a folder of them (txt, jsonl, json, csv, parquet, also compressed)"

    def blocks(self) -> Iterator[list[Item]]:
        for path in find_files(self.data):
            if self.subjects and path.name not in self.subjects:
                continue
            items = []
            for number, document in enumerate(read_files(path, "text")):
                if isinstance(document, BadRecord):
                    self.broken.append(document)
                elif document.text.strip():
                    items.append(
                        Item(f"{path.name}/{number}", path.name, document.text, category=language(document.text))
                    )
            yield items

    def ask(self, assistant: Assistant, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Every id is judged once, after as much of its document as the window holds, at least a half of it."""
        tokenizer, length = assistant.tokenizer, assistant.model.args.max_seq_len
        stride = min(self.stride or length // 2, length)
        texts = [[first_id(tokenizer), *tokenizer.encode(item.question)] for item in items]
        pairs: list[tuple[int, Pair]] = [(i, p) for i, ids in enumerate(texts) for p in windows(ids, length, stride)]
        nats = [0.0] * len(items)
        found = iter(log_likelihoods(assistant.model, [pair for _, pair in pairs], self.batch_size))
        for (i, _), likelihood in zip(pairs, found):
            nats[i] -= likelihood.logprob
        records = []
        for item, ids, loss in zip(items, texts, nats):
            n_bytes = len(item.question.encode("utf8", "replace"))
            scores = {"loss": [loss, len(ids) - 1], "bits_per_byte": [loss / math.log(2), n_bytes]}
            records.append({"scores": scores, "tokens": len(ids) - 1, "bytes": n_bytes})
        return records

    def run(self, assistant: Assistant) -> dict[str, Any]:
        result = super().run(assistant)
        print(f"perplexity by token {math.exp(result['all']['loss']['value']):.3f}")
        if self.per_document is not None:
            self.write_documents(self.report_path(assistant).with_suffix(".items.jsonl"))
        return result

    def write_documents(self, items: Path) -> None:
        """Write a line for each document of `items` to --per_document, the highest loss per token first."""
        rows = []
        for item in map(json.loads, items.open(encoding="utf8")):
            (nats, tokens), (bits, n_bytes) = item["scores"]["loss"], item["scores"]["bits_per_byte"]
            file, _, number = item["item"].rpartition("/")
            row = {"file": file, "document": int(number), "loss": nats / max(1, tokens)}
            rows.append(row | {"bits_per_byte": bits / n_bytes, "tokens": tokens, "bytes": n_bytes})
        write_json_lines(self.per_document, sorted(rows, key=lambda row: -row["loss"]))
        print(f"by document, the highest loss first: {self.per_document}")


def language(text: str) -> str:
    """Return "zh" where Chinese characters are a good part of the first thousand letters, else "other"."""
    letters = [match[0] for match in islice(LETTER.finditer(text), 1000)]
    chinese = sum(bool(HAN.match(letter)) for letter in letters)
    return "zh" if letters and chinese >= CHINESE * len(letters) else "other"

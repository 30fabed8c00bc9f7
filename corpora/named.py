"""Read named corpora whose files the user downloads: each in `raw_dir/NAME/`, as it was published.

A corpus is one function from a record to its text. Files may have any format of `corpora.files`, compressed or not, in
subfolders or not. A record is a dict for JSON, CSV and parquet files, and a str for plain text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corpora.files import Record, find_files, records, to_documents
from corpora.registry import BadRecord, Conversation, Document, register, stable_share

HELD_OUT_CONVERSATIONS = 0.01


def _files(raw_dir: Path, name: str, origin: str) -> list[Path]:
    folder = raw_dir / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}/ is missing: download the corpus {name} from {origin} and put its files there"
        )
    return find_files(folder)


def _is_reserved(path: Path) -> bool:
    """Return whether the publisher intends a file for validation or testing, so that its texts are held out."""
    return path.name.startswith(("valid", "test", "dev"))


def _named(
    name: str,
    description: str,
    licence: str,
    origin: str,
    pairs: Callable[[dict], tuple[str, str]] | None = None,
) -> Callable:
    """Register the corpus `name`; the decorated function returns the text of one record.

    pairs: returns the question and the answer of a record, or raises KeyError for a record without them.
    """

    def enter(text_of: Callable[[Any], str]) -> Callable:
        def documents(raw_dir: Path) -> Iterator[Document | BadRecord]:
            files = _files(raw_dir, name, origin)
            return itertools.chain.from_iterable(
                to_documents(records(path), text_of, name, True if _is_reserved(path) else None) for path in files
            )

        def conversations(raw_dir: Path) -> Iterator[Conversation]:
            for path in _files(raw_dir, name, origin):
                for record in records(path):
                    yield from _conversation(record, pairs, name, _is_reserved(path))

        with_pairs = conversations if pairs else None
        register(name, description=description, licence=licence, conversations=with_pairs)(documents)
        return text_of

    return enter


def _conversation(record: Record | BadRecord, pairs: Callable, name: str, reserved: bool) -> Iterator[Conversation]:
    """Yield the conversation in a record, or nothing if it has none; `documents` reports records that are broken."""
    if isinstance(record, BadRecord):
        return
    try:
        question, answer = pairs(record.value)
        held_out = reserved or stable_share(f"{name}:{question}") < HELD_OUT_CONVERSATIONS
    except (KeyError, TypeError, UnicodeEncodeError):
        return
    if isinstance(answer, str):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield Conversation(messages, held_out, name)


@_named(
    "wikipedia_cn",
    "Chinese Wikipedia, filtered (254,547 articles)",
    "CC BY-SA 3.0",
    "pleisto/wikipedia-cn-20230720-filtered on Hugging Face",
)
def wikipedia_cn(record: dict) -> str:
    """Return the text of `{"completion": text, "source": "wikipedia.zh2307"}`."""
    return record["completion"]


@_named(
    "baidu_baike",
    "5.63 million entries of Baidu Baike",
    "texts of Baidu Baike and its authors",
    "xuqinyang/BaiduBaike-5.63M on Hugging Face (563w_baidubaike.json)",
)
def baidu_baike(record: dict) -> str:
    """Return the text of `{"title", "summary", "sections": [{"title", "content"}]}`; the summary may be null."""
    parts = [f"{record['title']}：{record['summary']}"] if record.get("summary") else []
    parts += [f"{section['title']}：{section['content']}" for section in record["sections"]]
    return "\n".join(parts) or record["title"]


def _medical_pair(record: dict) -> tuple[str, str]:
    if "output" in record:
        return record.get("instruction", "") + record["input"], record["output"]
    return record["question"], record["response_chosen"]


@_named(
    "medical",
    "Chinese and English medicine: books, an encyclopedia, questions with answers",
    "Apache-2.0",
    "shibing624/medical on Hugging Face (pretrain, finetune and reward)",
    pairs=_medical_pair,
)
def medical(record: dict) -> str:
    """Return the text of a record in one of three forms; of two compared answers only the chosen one is used.

    pretrain: `{"text"}`; finetune: `{"instruction", "input", "output"}`, in English without the instruction; reward:
    `{"question", "response_chosen", "response_rejected"}`.
    """
    return record["text"] if "text" in record else "\n".join(_medical_pair(record))


@_named(
    "c4_zh",
    "the Chinese part of mC4",
    "ODC-BY; texts of the web",
    "allenai/c4 on Hugging Face (multilingual/c4-zh.*.json.gz)",
)
def c4_zh(record: dict) -> str:
    """Return the text of `{"text", "timestamp", "url"}`."""
    return record["text"]


@_named(
    "c4", "the English part of C4", "ODC-BY; texts of the web", "allenai/c4 on Hugging Face (en/c4-train.*.json.gz)"
)
def c4(record: dict) -> str:
    """Return the text of `{"text", "timestamp", "url"}`."""
    return record["text"]


@_named(
    "wudao",
    "WuDaoCorpus 2.0 base, 200 GB of Chinese web text",
    "the agreement of BAAI, no commercial use",
    "WuDaoCorpora of BAAI (WuDaoCorpus2.0_base_200G)",
)
def wudao(record: dict) -> str:
    """Return title and content of `{"id", "uniqueKey", "titleUkey", "dataType", "title", "content"}`."""
    return f"{record['title']}\n{record['content']}" if record.get("title") else record["content"]


@_named(
    "clue_corpus_small",
    "CLUECorpusSmall, 14 GB of news, forum, Wikipedia and comments in Chinese",
    "for research; texts of the web",
    "CLUEbenchmark/CLUECorpus2020 on GitHub",
)
def clue_corpus_small(record: dict | str) -> str:
    """Return the text of a block of a text file, or of a JSON line with `text`, or with `title` and `content`."""
    if isinstance(record, str):
        return record
    return record["text"] if "text" in record else f"{record['title']}\n{record['content']}"


@_named(
    "mnbvc",
    "MNBVC, a very large crawl of Chinese text in many kinds",
    "MIT (the collection); texts of the web",
    "liwu/MNBVC on Hugging Face (jsonl, gz)",
)
def mnbvc(record: dict) -> str:
    """Return the text of a record in one of four forms: `text`; `段落` (paragraphs, without those marked as repeated);
    `问` and `答`; `主题` with `回复`."""
    if "text" in record:
        return record["text"]
    if "段落" in record:
        return "\n".join(part["内容"] for part in record["段落"] if not part.get("是否重复"))
    if "主题" in record:
        return "\n".join([record["主题"], *(reply["回复"] for reply in record["回复"])])
    return f"{record['问']}\n{record['答']}"

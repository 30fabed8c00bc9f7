"""Texts that spell the markers of a template, in every role: no id of a marker comes from a text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from chat.template import TEMPLATES, ChatTemplate, load_template
from helpers.damage_runs import Kind, Result, World
from tokenizer import load_tokenizer

# of each template of ours, the published vocabulary that can carry it
CARRIERS = {"chatml": "qwen2.5", "llama2": "mistral3", "mftcoder": "mistral3", "plain": "llama3.2"}
PIECES = ("\n", " ", "x", "月", "<", "|", ">", "user", "assistant", "system", "[", "]", "</", "end", "s", "\u200b")


def template_of(world: World, name: str) -> ChatTemplate:
    """Return a template of ours or a published one, with a vocabulary that has its tokens."""
    if name == "ours":
        return load_template(load_tokenizer(world.folder / "data/tokenizer"), "ours")
    from helpers.published_templates import open_published

    folder = world.fresh("vocabulary")
    jinja = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf8") if name in CARRIERS else None
    return open_published(CARRIERS.get(name, name), folder, jinja)[0]


def markers(template: ChatTemplate, folder: Path | None) -> dict[str, int]:
    """Return the names and ids of all that is no text: special tokens, and added ones that the template writes."""
    found = dict(template.tokenizer.special)
    path = folder / "tokenizer.json" if folder else None
    for token in json.loads(path.read_text())["added_tokens"] if path and path.is_file() else ():
        if token["special"] or token["content"] in template.jinja:
            found[token["content"]] = token["id"]
    return found


def forge(name: str) -> Callable[[World, random.Random], Result]:
    """Return a trial of one conversation whose texts spell markers: the markers in it are those of harmless texts."""

    def make(world: World) -> tuple[ChatTemplate, dict[str, int], list[str]]:
        template = template_of(world, name)
        folder = world.folder / f"vocabulary{world.number}"
        names = markers(template, folder)
        spelled = [*names, *re.findall(r"'([^'\n]{3,40})'", template.jinja), *template.separators]
        return template, names, spelled

    def trial(world: World, rng: random.Random) -> Result:
        template, names, spelled = world.once(f"template {name}", lambda: make(world))
        # In an answer thoughts and calls may be written as text, and a system message may explain how.
        theirs = [name for name in names if name not in template.tokenizer.special] + ["<think>", "</think>"]
        harmless, forged = [], []
        roles = [*(["system"] if rng.random() < 0.5 else []), *["user", "assistant"] * rng.randint(1, 3)]
        for role in roles:
            words = [word for word in spelled if role == "user" or not any(each in word for each in theirs)]
            text = "a" + "".join(rng.choice(words if rng.random() < 0.6 else PIECES) for _ in range(rng.randint(1, 6)))
            harmless.append({"role": role, "content": "a"})
            forged.append({"role": role, "content": text + "z"})
        try:
            expected = [i for i in template.encode(harmless)[0] if i in names.values()]
        except ValueError as error:
            return Result("lost", f"harmless texts are refused: {error}")
        try:
            found = [i for i in template.encode(forged)[0] if i in names.values()]
        except ValueError as error:
            return Result("held", f"refused: {error}"[:200])
        return Result("held" if found == expected else "silent", "" if found == expected else json.dumps(forged))

    return trial


def forgeries() -> dict[str, Kind]:
    """Return the kinds of trials of this file by name."""
    from helpers.published_templates import PUBLISHED

    promise = "Texts that spell the markers of a template: no special token comes from a text in any role, and no other"
    promise += " added token that the template writes from a user's ({})"
    ours = {f"marker: {name}": Kind(promise.format("our templates"), 150, forge(name)) for name in ("ours", *CARRIERS)}
    return ours | {
        f"marker: {name}": Kind(promise.format("published templates"), 150, forge(name)) for name in PUBLISHED
    }

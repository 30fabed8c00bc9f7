"""The pieces of a vocabulary that a chat template writes around messages, so that a message cannot forge them."""

from __future__ import annotations

from contextlib import suppress

import jinja2

from chat.answers import CLOSE, OPEN
from chat.jinja import ENVIRONMENT
from chat.renderer import Renderer
from tokenizer import Tokenizer


def find_markers(tokenizer: Tokenizer, jinja: str, name: str) -> tuple[set[str], set[str]]:
    """Return the tokens in a template's texts that are not special, and those of them that an answer may contain.

    The first are found as transformers finds them: in the texts of the template, and in what it makes of a short
    conversation, because some templates put a marker together ("<|" + role + "|>"). An answer may contain the markers
    of its parts, such as <tool_call> and <think>, but not those that stand around every message.
    """
    candidates = {token for token in tokenizer.added if len(token) > 1 and not token.isspace()}
    if not candidates:
        return set(), set()
    renderer = Renderer(tokenizer, jinja, name)  # raises ValueError for what is no template
    nodes = ENVIRONMENT.parse(jinja)
    texts = [node.data for node in nodes.find_all(jinja2.nodes.TemplateData)]
    texts += [node.value for node in nodes.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    around = []
    for system in ([], [{"role": "system", "content": "s"}]):
        for messages, prompt in (([*system, question, answer], False), ([*system, question], True)):
            with suppress(ValueError):
                around.append(renderer.fill_plain(messages, prompt))
    every = {token for token in candidates if any(token in text for text in (*texts, *around))}
    framing = {token for token in every if any(token in text for text in around)} - {OPEN, CLOSE}
    return every, every - framing

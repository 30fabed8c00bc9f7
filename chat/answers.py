"""Where the answers stand in the text of a conversation, for templates without {% generation %} blocks.

An answer begins where the prompt for it ends, and ends with the special token that ends a turn. The prompt is what the
template makes of the messages before the answer; no mark inside an answer is needed, so a template may cut an answer
into thought and text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile

from chat.jinja import BREAK, FINISH
from chat.messages import Message

Fill = Callable[[list[Message], bool], str]  # messages, add_generation_prompt -> the template's text
OPEN, CLOSE = "<think>", "</think>"  # around a thought inside the content of an answer
WAY_ON = "put {% generation %} blocks around answers in a template file, or choose another --data.template"


def find_answers(
    fill: Fill, messages: list[Message], text: str, tokens: re.Pattern[str], ends: set[str]
) -> list[tuple[int, int]]:
    """Return where each answer begins and ends in `text`, which is the template's text of `messages`.

    tokens: finds marks, special and added tokens; ends: special tokens that end an answer. Raises ValueError when a
    place cannot be found.
    """
    spans, last = [], 0
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _start(fill, messages, n, text, tokens)
        if start < last:
            raise ValueError(f"the place of message {n} in the rendered text cannot be found: {WAY_ON}")
        last = end_of_answer(text, start, tokens, ends)
        spans.append((start, last))
    return spans


def end_of_answer(text: str, start: int, tokens: re.Pattern[str], ends: set[str]) -> int:
    """Return where the answer that begins at `start` ends: after the next of `ends`, or else with the text."""
    matches = (match for match in tokens.finditer(text, start) if match[0] in ends)
    return next((match.end() for match in matches), len(text))


def _start(fill: Fill, messages: list[Message], n: int, text: str, tokens: re.Pattern[str]) -> int:
    """Return where the answer `messages[n]` begins in `text`."""
    prompt = fill(messages[:n], True)
    if text.startswith(prompt):
        return len(prompt)
    # Later messages change what the template writes for earlier ones (tools before the last question), or the prompt
    # opens a thought that is not in the text. So only what follows the last message before the answer is compared.
    last, shown = messages[n - 1], messages[n - 1]["content"].rstrip()  # the mark must not keep spaces from being cut
    marked = [*messages[: n - 1], last | {"content": shown + FINISH + last["content"][len(shown) :]}]
    after_prompt = fill(marked, True).partition(FINISH)[2]
    before, _, after = fill([*marked, *messages[n:]], False).partition(FINISH)
    if before + after != text or not after:
        raise ValueError(
            f"the rendered text does not begin with the prompt of message {n}, whose place cannot be found: {WAY_ON}"
        )
    same = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(after_prompt, after)))
    if same != after_prompt:  # an answer may begin like the rest of the prompt by chance: go back to a token or a line
        ends = [match.end() for match in tokens.finditer(same) if match[0] != BREAK]
        same = same[: max([0, *ends, same.rfind("\n") + 1])]
    return len(before) + len(same)


def with_last_thought(fill: Fill, messages: list[Message], text: str, start: int) -> tuple[str, int]:
    """Return `text`, whose last answer begins at `start`, with the thought of that answer if the template cuts it out;
    and where the answer then begins.

    Templates such as DeepSeek-R1's cut a thought out of every answer, because they are made for the history of a chat.
    The model itself continues the prompt with the thought. So the prompt, then the thought and the rest of the answer,
    is what it has to learn.
    """
    content, thought = messages[-1].get("content", ""), messages[-1].get("reasoning_content", "").strip()
    written, closed, _ = content.partition(CLOSE)
    if closed:
        thought = written.rpartition(OPEN)[2].strip()
    if not thought:
        return text, start
    prompt, rest = fill(messages[:-1], True), text[start:]
    opens = prompt.rstrip().endswith(OPEN)
    # A key that the template does not know is no thought that it cuts out, unless its prompt asks for one.
    if not (closed or opens) or CLOSE in rest or (thought in rest and not opens):
        return text, start
    if not prompt.startswith(text[:start]):
        raise ValueError(f"the template leaves out the last answer's thought, and its place cannot be found: {WAY_ON}")
    head = f"{OPEN}\n{thought}\n{CLOSE}\n\n"
    if closed:  # as it is written, with the space after it
        head = content[: len(content) - len(content.rpartition(CLOSE)[2].lstrip())]
    if opens and head.lstrip().startswith(OPEN):
        head, gap = head.lstrip().removeprefix(OPEN), prompt[len(prompt.rstrip()) :]
        head = head.removeprefix(gap) if head.startswith(gap) else head.lstrip()
    return prompt + head + rest.lstrip(), len(prompt)

"""A Modelfile for Ollama, which takes a model's conversation template in the language of Go."""

from __future__ import annotations

import json

from chat.jinja import MARKS
from chat.messages import Message
from chat.template import load_template
from cli.progress import say
from tokenizer import Tokenizer

WORDS = ("first question", "first answer", "second question", "instructions")  # of the conversations that are tried


def write(tokenizer: Tokenizer | None, file: str) -> str | None:
    """Return the Modelfile of a GGUF file; None, with a notice, where Ollama cannot have the tokenizer's template."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    try:
        parts = parts_of(tokenizer)
    except ValueError as error:
        say(f"no Modelfile for Ollama is written: {error}")
        return None
    bos, system, user, assistant, begin = parts
    first = "" if tokenizer.begins else bos  # llama.cpp writes the bos of such a tokenizer itself
    roles = [("system", system), ("user", user), ("assistant", assistant)]
    body = "".join(
        f'{{{{ {"else " * (i > 0)}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for i, (role, (before, after)) in enumerate(roles)
    )
    template = f"{first}{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}{begin}"
    stop = assistant[1].strip()
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""'] + [f"PARAMETER stop {json.dumps(stop)}"] * bool(stop)
    return "\n".join(lines) + "\n"


Around = tuple[str, str]  # the texts before and after a message


def parts_of(tokenizer: Tokenizer) -> tuple[str, Around, Around, Around, str]:
    """Return what a template writes at the beginning, around a message of system, user and assistant, and before an
    answer. Raises ValueError for a template that is no sequence of such parts."""
    template = load_template(tokenizer)

    def render(messages: list[Message], begin: bool) -> str:
        return MARKS.sub("", template.render(messages, begin))

    q1, a1, q2, instructions = WORDS
    ask, answer, again = (
        [{"role": "user", "content": q1}],
        [{"role": "assistant", "content": a1}],
        [{"role": "user", "content": q2}],
    )
    one, two = render(ask, False), render(ask + answer, False)
    head, _, after_user = one.partition(q1)
    if not two.startswith(one) or a1 not in two:
        raise ValueError("its chat template does not write messages one after the other")
    before_answer, _, after_answer = two[len(one) :].partition(a1)
    begin = render(ask, True)[len(one) :]
    bos = head[: len(head) - len(render(ask + answer + again, False)[len(two) :].partition(q2)[0])]
    user, assistant = (head[len(bos) :], after_user), (before_answer, after_answer)
    try:
        with_system = render([{"role": "system", "content": instructions}, *ask], False)
    except ValueError:
        raise ValueError("its chat template has no system messages") from None
    before_system, _, rest = with_system.partition(instructions)
    if not before_system.startswith(bos) or not rest.endswith(one[len(bos) :]):
        raise ValueError("its chat template writes the system message inside another one")
    system = (before_system[len(bos) :], rest[: len(rest) - len(one[len(bos) :])])
    whole = [{"role": "system", "content": instructions}, *ask, *answer, *again]
    texts = zip((system, user, assistant, user), (instructions, q1, a1, q2))
    if render(whole, True) != bos + "".join(f"{before}{text}{after}" for (before, after), text in texts) + begin:
        raise ValueError("its chat template does not write messages one after the other")
    return bos, system, user, assistant, begin

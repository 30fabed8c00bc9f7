"""Chat templates: convert a conversation to ids and a mask of the trained tokens.

A template is Jinja text: one of chat/templates/ or the model's own. It is rendered as in transformers, so the ids equal
those of `apply_chat_template`; the mask, too, if the template has {% generation %} blocks. Without such blocks, the
trained tokens are those between the prompt of an answer and the special token that ends the answer, inclusive.

Special tokens written in a message are text here, so that a message cannot end its turn and begin another one. (In
transformers it can, unless the caller sanitizes it.) Some templates separate messages by plain text, such as LLaMA 2's
[/INST]. No tokenizer can protect that, so a message that contains such text is refused.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import jinja2
import numpy as np

from chat.jinja import BEGIN, BREAK, ENVIRONMENT, FINISH, MARKS
from chat.messages import Message, check_messages
from cli.args import nearest
from tokenizer import MARKERS, Tokenizer

TEMPLATES = Path(__file__).parent / "templates"
# First line of a template file that names special tokens in literal text. It is not a part of the template: the saved
# text and its hash stay the same when only this line changes.
NEEDS = re.compile(r"\{#- special tokens: (.*) -#\}\n")


def load_template(tokenizer: Tokenizer, name: str = "auto") -> ChatTemplate:
    """Load the chat template `name` for a tokenizer.

    name: "own" (the model's), a name in chat/templates/, the path of a .jinja file, or "auto": "own" if there is one,
    else "ours" if the vocabulary has its special tokens, else "plain".
    Raises ValueError for an unknown name, for a template whose special tokens the vocabulary lacks, and for one that
    writes no special token at the end of an answer.
    """
    known = {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}
    own = own_jinja(tokenizer)
    if name == "auto":
        name = "own" if own else "ours" if all(marker in tokenizer.special for marker in MARKERS) else "plain"
    if name == "own":
        if not own:
            raise ValueError(f"the model has no chat template of its own; choose one of {', '.join(known)}")
        return ChatTemplate(tokenizer, own, "the model's own")
    path = known.get(name, Path(name))
    if name not in known and not (path.suffix == ".jinja" and path.is_file()):
        names = ("auto", "own", *known)
        raise ValueError(
            f"unknown chat template {name!r}{nearest(name, names)}; "
            f"expected {', '.join(names)}, or the path of a .jinja file"
        )
    jinja, needs = read_template(path)
    if missing := [token for token in needs if token not in tokenizer.special]:
        raise ValueError(
            f"the template {name} needs the special tokens {', '.join(missing)}, which this vocabulary lacks; "
            f"add them with --add_special_tokens {' '.join(map(shlex.quote, missing))}"
        )
    return ChatTemplate(tokenizer, with_bos(jinja, tokenizer), name)


def with_bos(jinja: str, tokenizer: Tokenizer) -> str:
    """Return a template that begins as every text of the tokenizer begins: with bos, unless it writes bos itself."""
    bos = tokenizer.special_names().get("bos_token")
    if not tokenizer.begins or bos is None or "bos_token" in jinja or bos in jinja:
        return jinja
    return "{{- bos_token -}}\n" + jinja


def read_template(path: Path) -> tuple[str, list[str]]:
    """Return the Jinja text of a template file and the special tokens that its first line names.

    The first line is optional, for example `{#- special tokens: <|im_start|> <|im_end|> -#}`; the text is without it.
    """
    jinja = path.read_text(encoding="utf8").rstrip("\n")
    needs = NEEDS.match(jinja)
    return (jinja[needs.end() :], needs[1].split()) if needs else (jinja, [])


def _any_of(names: Iterable[str]) -> str:
    """Return a regular expression that matches one of the names, the longest first; without names it never matches."""
    return f"(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)'})"


def own_jinja(tokenizer: Tokenizer) -> str | None:
    """Return the Jinja text that came with the tokenizer; the one named "default" if there are several."""
    own = tokenizer.chat_template
    if isinstance(own, list):  # the form of several templates in tokenizer_config.json
        own = {each["name"]: each["template"] for each in own}
    return own.get("default") if isinstance(own, dict) else own


class ChatTemplate:
    """Conversations to ids and masks; one object serves training, chat and saving.

    jinja: text that is saved and that transformers renders
    stop_ids: ids that end an answer; generation stops at each of them
    separators: texts between two messages that contain no special token

    Raises ValueError when the Jinja cannot be read or writes no special token at the end of an answer.
    """

    def __init__(self, tokenizer: Tokenizer, jinja: str, name: str = "the chat template") -> None:
        self.tokenizer, self.jinja, self.name = tokenizer, jinja, name
        # A rendered text is split at marks and at special tokens, except those after BREAK, which are text.
        names = _any_of(tokenizer.special)
        self._names = re.compile(f"(?={names})")
        self._split = re.compile(f"([{BREAK}{BEGIN}{FINISH}]|(?<!{BREAK}){names})")
        # Some special tokens remove the white space to their left or right, also when a mark stands in between.
        before, after = (_any_of(s for s, sides in tokenizer.strips.items() if sides[n]) for n in (0, 1))
        space = rf"[\s{BREAK}{BEGIN}{FINISH}]*"
        self._spaces = [re.compile(f"{space}(?<!{BREAK}){before}"), re.compile(f"(?<!{BREAK}){after}{space}")]
        try:
            self._template = ENVIRONMENT.from_string(jinja)
        except jinja2.TemplateError as error:
            raise ValueError(f"{name} is not a valid Jinja template: {error}") from None
        self._has_blocks = re.search(r"\{%[-+]?\s*generation\b", jinja) is not None
        self.separators: list[str] = []
        self._probe()

    def encode(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """Return `(ids, mask)` of a conversation, equally long; `mask[i]` is True where `ids[i]` is trained.

        An assistant message with `"loss": False` is not trained. Raises ValueError when roles are out of order (see
        `check_messages`), a message contains a separator, or the template refuses or changes a message.
        """
        rendered = self._without_spaces(self.check(messages, add_generation_prompt))
        trained_turns = iter([m.get("loss", True) for m in messages if m["role"] == "assistant"])
        ids: list[int] = []
        mask: list[bool] = []
        run: list[tuple[str, bool]] = []
        trained = False
        for n, part in enumerate(self._split.split(rendered)):  # text, mark or special token, text, ...
            if part == BEGIN:
                trained = bool(next(trained_turns))
            elif part == FINISH:
                trained = False
            elif n % 2 and part != BREAK:  # a special token: encode the text before it
                encode_texts(self.tokenizer, run, ids, mask)
                run = []
                ids.append(self.tokenizer.special[part])
                mask.append(trained)
            elif part and part != BREAK:
                run.append((part, trained))
        encode_texts(self.tokenizer, run, ids, mask)
        return ids, mask

    def _without_spaces(self, rendered: str) -> str:
        """Return the text without the white space that some special tokens remove beside them."""
        for spaces in self._spaces if self.tokenizer.strips else ():
            rendered = spaces.sub(lambda match: re.sub(r"\s", "", match[0]), rendered)
        return rendered

    def check(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Return the rendered text of a conversation (see `render`); raises the errors of `encode`."""
        check_messages(messages, add_generation_prompt)
        self._check_separators(messages)
        return self.render(messages, add_generation_prompt)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation with marks in it.

        BREAK stands before a special token that is text; BEGIN and FINISH stand around the generated part of each
        assistant message.
        """
        if self._has_blocks:
            rendered = self._fill(messages, add_generation_prompt)
            if rendered.count(BEGIN) != sum(message["role"] == "assistant" for message in messages):
                raise ValueError(f"{self.name} should have one {{% generation %}} block for each assistant message")
            return rendered
        return self._mark_answers(messages, add_generation_prompt)

    def _fill(self, messages: list[Message], add_generation_prompt: bool, marked: str = "") -> str:
        """Render the template, with BREAK before special tokens in messages.

        marked: BEGIN and FINISH go "around" each answer, "inside" of the white space around it, or nowhere ("").
        """
        filled = []
        for message in messages:
            content = self._names.sub(BREAK, message["content"])
            if marked and message["role"] == "assistant":
                text = content if marked == "around" else content.strip()
                before, _, after = content.partition(text) if text else ("", "", content)
                content = f"{before}{BEGIN}{text}{FINISH}{after}"
            filled.append({"role": message["role"], "content": content})
        try:
            return self._template.render(
                messages=filled,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_names(),
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self.name} refuses this conversation: {error}") from None

    def _mark_answers(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Return what `render` does for a template without {% generation %} blocks.

        The answers are found by rendering them with marks, which the template has to leave where they are.
        """
        plain = self._fill(messages, add_generation_prompt)
        for how in ("around", "inside"):  # many templates strip an answer: marks outside of it would stop that
            marked = self._fill(messages, add_generation_prompt, how)
            if re.sub(f"[{BEGIN}{FINISH}]", "", marked) == plain and marked.count(BEGIN) == sum(
                message["role"] == "assistant" for message in messages
            ):
                break
        else:
            raise ValueError(
                f"{self.name} changes an answer and has no {{% generation %}} blocks, which would show what to train"
            )
        out, at, pieces = [], 0, re.split(f"{BEGIN}|{FINISH}", marked)  # text, answer, text, answer, ..., text
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        bounds = list(itertools.accumulate(map(len, pieces)))  # start and stop of each answer in `plain`
        for n, start, stop in zip(answers, bounds[0::2], bounds[1::2]):
            # What follows the prompt is generated: from there, not only from the answer itself ...
            prompt = self._prompt_length(messages[:n], plain)
            start = prompt if prompt is not None and at <= prompt <= start else start
            # ... to the end of the next special token, which ends the turn.
            end = next((match.end() for match in self._split.finditer(plain, stop) if match[0] != BREAK), stop)
            out += [plain[at:start], BEGIN, plain[start:end], FINISH]
            at = end
        return "".join([*out, plain[at:]])

    def _prompt_length(self, messages: list[Message], plain: str) -> int | None:
        """Return the length in characters of the prompt for `messages`, None if `plain` does not begin with it."""
        try:
            prompt = self._fill(messages, True)
        except ValueError:
            return None
        return len(prompt) if plain.startswith(prompt) else None

    def _check_separators(self, messages: list[Message]) -> None:
        """Raise ValueError when a message contains a mark, or, except for answers, a separator."""
        for n, message in enumerate(messages):
            if mark := MARKS.search(message["content"]):
                raise ValueError(f"message {n} contains U+{ord(mark[0]):X}, a noncharacter: remove it")
            for separator in self.separators if message["role"] != "assistant" else ():
                if separator in message["content"]:
                    raise ValueError(
                        f"message {n} ({message['role']}) contains {separator!r}, which in {self.name} ends the message"
                    )

    def _probe(self) -> None:
        """Render a short conversation to find the ids that end an answer and the texts that separate messages."""
        question, answer = {"role": "user", "content": "\ufdd3"}, {"role": "assistant", "content": "\ufdd4"}
        ids, mask = self.encode([question, answer])
        names = set(self.tokenizer.special.values()) - {self.tokenizer.unk_id}
        ends = {i for i, trained in zip(ids, mask) if trained and i in names}
        if not ends:
            raise ValueError(
                f"{self.name} writes no special token of this vocabulary at the end of an answer, "
                "so that no answer could end; choose another template"
            )
        self.stop_ids: list[int] = sorted({*ends, self.tokenizer.eos_id} - {None})
        conversation = [question, answer]
        try:
            self._fill([{"role": "system", "content": "\ufdd5"}, *conversation], False)
            conversation = [{"role": "system", "content": "\ufdd5"}, *conversation]
        except ValueError:
            pass  # the template has no system message
        between = re.split("[\ufdd3-\ufdd5]", MARKS.sub("", self._fill(conversation, False)))[1:-1]
        self.separators = [text.strip() for text in between if text.strip() and not self._names.search(text)]


def encode_texts(tokenizer: Tokenizer, run: list[tuple[str, bool]], ids: list[int], mask: list[bool]) -> None:
    """Append the ids and mask of adjacent texts, `run` = [(text, trained), ...], encoded as one text.

    transformers encodes them as one, too. A token is trained if any of its characters is.
    """
    text = "".join(part for part, _ in run)
    if not text:
        return
    if len({trained for _, trained in run}) == 1:  # all or nothing is trained: no spans needed
        text_ids = tokenizer.encode(text, follows_special=bool(ids))
        ids += text_ids
        mask += [run[0][1]] * len(text_ids)
        return
    trained = np.repeat([trained for _, trained in run], [len(part) for part, _ in run])  # (characters,)
    before = np.append(0, np.cumsum(trained))  # (characters + 1,) number of trained characters before each
    text_ids, spans = tokenizer.encode_spans(text, follows_special=bool(ids))
    ids += text_ids
    # An empty span (a token without characters of its own) counts as the character at its place.
    start, stop = spans[:, 0], np.minimum(np.maximum(spans[:, 1], spans[:, 0] + 1), len(text))
    mask += (before[stop] > before[start]).tolist()

"""Chat templates: a conversation -> ids and the mask of what is trained.

A template is Jinja, one of ours (chat_templates/) or a model's own, rendered as transformers does: the ids are those of
its `apply_chat_template`, and where the template has {% generation %} blocks, so is the mask. Of one without, what
follows the prompt of an answer is trained, up to and with the special token that ends it.

Special tokens written in a message are text here: a content cannot forge a turn. (In transformers it can, unless asked
to sanitize.) Where a template parts two messages with nothing but text, as LLaMA 2's [/INST] does, that is beyond any
tokenizer: a message that contains such text is refused.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import jinja2
import jinja2.ext
import numpy as np

from chat.jinja import BEGIN, BREAK, ENVIRONMENT, FINISH, MARKS
from chat.messages import Message, check_messages
from cli.args import nearest
from tokenizer import MARKERS, TEMPLATES, Tokenizer


def load_template(tokenizer: Tokenizer, name: str = "auto") -> ChatTemplate:
    """The chat template `name` for `tokenizer`.

    "auto": the model's own, else "ours", else, in a vocabulary without our markers, "plain". Otherwise a name in
    chat_templates/, "own" or the path of a .jinja file. Raises ValueError for another name, for a template whose
    special tokens this vocabulary lacks, and for one that cannot end a turn.
    """
    known = {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}
    own = own_jinja(tokenizer)
    if name == "auto":
        name = "own" if own else "ours" if all(marker in tokenizer.special for marker in MARKERS) else "plain"
    if name == "own":
        if not own:
            raise ValueError(f"this model brings no chat template of its own; templates are {', '.join(known)}")
        return ChatTemplate(tokenizer, own, "the model's own")
    path = known.get(name, Path(name))
    if name not in known and not (path.suffix == ".jinja" and path.is_file()):
        names = ("auto", "own", *known)
        raise ValueError(
            f"unknown chat template {name!r}{nearest(name, names)}; known are {', '.join(names)}, or a .jinja file"
        )
    return ChatTemplate(tokenizer, path.read_text(encoding="utf8").rstrip("\n"), name)


def _any_of(names: Iterable[str]) -> str:
    """A regular expression for one of these names, the longest that fits; for nothing if there are none."""
    return f"(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)'})"


def own_jinja(tokenizer: Tokenizer) -> str | None:
    """The Jinja that came with the tokenizer; of several, the one named "default"."""
    own = tokenizer.chat_template
    if isinstance(own, list):  # as tokenizer_config.json holds several
        own = {each["name"]: each["template"] for each in own}
    return own.get("default") if isinstance(own, dict) else own


class ChatTemplate:
    """Conversations -> ids and the mask of what is trained, by one object for training, chat and what is saved.

    `jinja`: the text transformers renders. `stop_ids`: generation stops at any of them. `separators`: what stands
    between two messages without any special token. Raises ValueError as `load_template` does.
    """

    def __init__(self, tokenizer: Tokenizer, jinja: str, name: str = "the chat template") -> None:
        self.tokenizer, self.jinja, self.name = tokenizer, jinja, name
        names = _any_of(tokenizer.special)
        self._names = re.compile(f"(?={names})")
        self._split = re.compile(f"([{BREAK}{BEGIN}{FINISH}]|(?<!{BREAK}){names})")
        before, after = (_any_of(s for s, sides in tokenizer.strips.items() if sides[n]) for n in (0, 1))
        space = rf"[\s{BREAK}{BEGIN}{FINISH}]*"  # between marks, too
        self._spaces = [re.compile(f"{space}(?<!{BREAK}){before}"), re.compile(f"(?<!{BREAK}){after}{space}")]
        try:
            self._template = ENVIRONMENT.from_string(jinja)
        except jinja2.TemplateError as error:
            raise ValueError(f"{name} is no Jinja that can be read: {error}") from None
        self._has_blocks = re.search(r"\{%[-+]?\s*generation\b", jinja) is not None
        self.separators: list[str] = []
        self._probe()

    def encode(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """`(ids, mask)` of a conversation, of one length: `mask[i]` is True where `ids[i]` is predicted and trained.

        An assistant message with `"loss": False` is not trained. Raises ValueError where roles are out of order, see
        `check_messages`, where a message contains a separator, and where the template refuses or changes a message.
        """
        rendered = self._without_spaces(self.check(messages, add_generation_prompt))
        trained_turns = iter([m.get("loss", True) for m in messages if m["role"] == "assistant"])
        ids: list[int] = []
        mask: list[bool] = []
        run: list[tuple[str, bool]] = []
        trained = False
        for n, part in enumerate(self._split.split(rendered)):
            if part == BEGIN:
                trained = bool(next(trained_turns))
            elif part == FINISH:
                trained = False
            elif n % 2 and part != BREAK:
                self._encode_text(run, ids, mask)
                run = []
                ids.append(self.tokenizer.special[part])
                mask.append(trained)
            elif part and part != BREAK:
                run.append((part, trained))
        self._encode_text(run, ids, mask)
        return ids, mask

    def _without_spaces(self, rendered: str) -> str:
        """The text without the white space that some special tokens take with them."""
        for spaces in self._spaces if self.tokenizer.strips else ():
            rendered = spaces.sub(lambda found: re.sub(r"\s", "", found[0]), rendered)
        return rendered

    def check(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Raise what `encode` would; returns the rendered text, see `render`."""
        check_messages(messages, add_generation_prompt)
        self._check_separators(messages)
        return self.render(messages, add_generation_prompt)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation, with BREAK before a special token that is text, BEGIN and FINISH around what is
        generated in each assistant message."""
        if self._has_blocks:
            rendered = self._fill(messages, add_generation_prompt)
            if rendered.count(BEGIN) != sum(message["role"] == "assistant" for message in messages):
                raise ValueError(f"{self.name} has not one {{% generation %}} block for each assistant message")
            return rendered
        return self._mark_answers(messages, add_generation_prompt)

    def _fill(self, messages: list[Message], add_generation_prompt: bool, marked: str = "") -> str:
        """The template filled in; `marked` says where BEGIN and FINISH stand in answers: "around", "inside" or not."""
        given = []
        for message in messages:
            content = self._names.sub(BREAK, message["content"])
            if marked and message["role"] == "assistant":
                text = content if marked == "around" else content.strip()
                before, _, after = content.partition(text) if text else ("", "", content)
                content = f"{before}{BEGIN}{text}{FINISH}{after}"
            given.append({"role": message["role"], "content": content})
        try:
            return self._template.render(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_names(),
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self.name} refuses this conversation: {error}") from None

    def _mark_answers(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Of a template without {% generation %}: find the answers by marks put around them, and their prompts."""
        plain = self._fill(messages, add_generation_prompt)
        for how in ("around", "inside"):  # inside of the white space that many templates strip
            marked = self._fill(messages, add_generation_prompt, how)
            if re.sub(f"[{BEGIN}{FINISH}]", "", marked) == plain and marked.count(BEGIN) == sum(
                message["role"] == "assistant" for message in messages
            ):
                break
        else:
            raise ValueError(f"{self.name} changes an answer, and has no {{% generation %}} blocks to train by")
        out, at, pieces = [], 0, re.split(f"{BEGIN}|{FINISH}", marked)  # text, answer, text, answer, ..., text
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        bounds = list(itertools.accumulate(map(len, pieces)))
        for n, start, stop in zip(answers, bounds[0::2], bounds[1::2]):
            prompt = self._prompt_length(messages[:n], plain)
            start = prompt if prompt is not None and at <= prompt <= start else start
            end = next((found.end() for found in self._split.finditer(plain, stop) if found[0] != BREAK), stop)
            out += [plain[at:start], BEGIN, plain[start:end], FINISH]
            at = end
        return "".join([*out, plain[at:]])

    def _prompt_length(self, messages: list[Message], plain: str) -> int | None:
        """Characters of the prompt that `messages` are, if the conversation `plain` begins with it."""
        try:
            prompt = self._fill(messages, True)
        except ValueError:
            return None
        return len(prompt) if plain.startswith(prompt) else None

    def _encode_text(self, run: list[tuple[str, bool]], ids: list[int], mask: list[bool]) -> None:
        """Neighbouring texts encoded as one, as transformers sees them; a token is trained if any of it is."""
        text = "".join(part for part, _ in run)
        if not text:
            return
        if len({trained for _, trained in run}) == 1:
            found = self.tokenizer.encode(text, follows_special=bool(ids))
            ids += found
            mask += [run[0][1]] * len(found)
            return
        trained = np.repeat([trained for _, trained in run], [len(part) for part, _ in run])
        before = np.append(0, np.cumsum(trained))  # (characters + 1,): how many of those before each are trained
        found, spans = self.tokenizer.encode_spans(text, follows_special=bool(ids))
        ids += found
        start, stop = spans[:, 0], np.minimum(np.maximum(spans[:, 1], spans[:, 0] + 1), len(text))
        mask += (before[stop] > before[start]).tolist()

    def _check_separators(self, messages: list[Message]) -> None:
        for n, message in enumerate(messages):
            if mark := MARKS.search(message["content"]):
                raise ValueError(f"message {n} contains U+{ord(mark[0]):X}, a noncharacter that texts may not hold")
            for separator in self.separators if message["role"] != "assistant" else ():
                if separator in message["content"]:
                    raise ValueError(
                        f"message {n} ({message['role']}) contains {separator!r}, which in {self.name} ends the message"
                    )

    def _probe(self) -> None:
        """Render an exchange to learn what ends an answer and what parts messages."""
        if missing := [word for word in self._needed() if word not in self.tokenizer.special]:
            raise ValueError(
                f"template {self.name} needs the special tokens {', '.join(missing)}, and this vocabulary lacks them; "
                f"add them with --add_special_tokens {' '.join(map(shlex.quote, missing))}"
            )
        asked, answered = {"role": "user", "content": "\ufdd3"}, {"role": "assistant", "content": "\ufdd4"}
        ids, mask = self.encode([asked, answered])
        names = set(self.tokenizer.special.values()) - {self.tokenizer.unk_id}
        ends = {i for i, trained in zip(ids, mask) if trained and i in names}
        if not ends:
            raise ValueError(f"no turn could end: {self.name} writes no special token of this vocabulary at its end")
        self.stop_ids: list[int] = sorted({*ends, self.tokenizer.eos_id} - {None})
        conversation = [asked, answered]
        try:
            self._fill([{"role": "system", "content": "\ufdd5"}, *conversation], False)
            conversation = [{"role": "system", "content": "\ufdd5"}, *conversation]
        except ValueError:
            pass  # a template that knows no system message
        between = re.split("[\ufdd3-\ufdd5]", MARKS.sub("", self._fill(conversation, False)))[1:-1]
        self.separators = [text.strip() for text in between if text.strip() and not self._names.search(text)]

    def _needed(self) -> Iterable[str]:
        """The special tokens that one of ours wants; of another template they are not known beforehand."""
        needed = {"ours": ("<s>", *MARKERS), "chatml": ("<|im_start|>", "<|im_end|>")}
        return needed.get(self.name, ())


# --- Jinja as transformers renders it -----------------------------------------------------------------------------

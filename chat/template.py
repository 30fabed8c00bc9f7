"""Chat templates: convert a conversation to ids and a mask of the trained tokens.

A template is Jinja text: one of chat/templates/ or the model's own. It is rendered as in transformers, so the ids equal
those of `apply_chat_template`; the mask, too, if the template has {% generation %} blocks. Without such blocks, the
trained tokens are those between the prompt of an answer and the special token that ends the answer, inclusive
(chat/answers.py). If such a template cuts the thought out of the last answer, the thought is put back.

Special tokens written in a message are text here, and so is every token that the template writes (chat/markers.py), so
that a message cannot end its turn and begin another one. (In transformers it can, unless the caller sanitizes it.) Some
templates separate messages by plain text, such as LLaMA 2's [/INST]. No tokenizer can protect that, so a message that
contains such text is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from datetime import datetime
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from chat.answers import end_of_answer, find_answers, with_last_thought
from chat.features import calling, parts_of, rendered_parts
from chat.jinja import BEGIN, BREAK, FINISH, MARKS
from chat.markers import find_markers
from chat.messages import Message, check_messages, texts
from chat.renderer import BLOCK, Renderer, any_of
from cli.args import nearest
from tokenizer import MARKERS, Tokenizer

TEMPLATES = Path(__file__).parent / "templates"
# First line of a template file that names special tokens in literal text. It is not a part of the template: the saved
# text and its hash stay the same when only this line changes.
NEEDS = re.compile(r"\{#- special tokens: (.*) -#\}\n")
# Texts of our templates before they rendered thoughts and tools, as checkpoints of that time know them. Conversations
# without these have the same ids, so such a run is resumed.
FORMER = {
    "ours": "f530fd4305ec53d63d2348bf3b4e79a55cc8d9559133fdecedd659f8d0fdaf1e",
    "chatml": "508e2be4fe8392a766bbbfd250ba5dd8b424d8768526122220ff287ddbc63a59",
    "llama2": "cd0319e3071ae51f18681e89d4f310e8c5a44addfc15a332d7efe2a76e5ab912",
}


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
        template = ChatTemplate(tokenizer, own, "the model's own")
        if isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
            tools = tokenizer.chat_template["tool_use"]
            template.tool_use = ChatTemplate(tokenizer, tools, "the model's own template for tools")
            template.stop_ids = sorted({*template.stop_ids, *template.tool_use.stop_ids})
        return template
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


def template_hash(jinja: str) -> str:
    """Return the SHA-256 of a template's text, by which a run knows its template when it is resumed."""
    same = (former for name, former in FORMER.items() if jinja == read_template(TEMPLATES / f"{name}.jinja")[0])
    return next(same, hashlib.sha256(jinja.encode()).hexdigest())


def own_jinja(tokenizer: Tokenizer) -> str | None:
    """Return the Jinja text that came with the tokenizer; the one named "default" if there are several."""
    own = tokenizer.chat_template
    if isinstance(own, dict) and "default" not in own:
        raise ValueError(
            f"the model has the chat templates {', '.join(sorted(own))}, and none with the name default: "
            "choose one of ours, or give the path of a .jinja file"
        )
    return own["default"] if isinstance(own, dict) else own


class ChatTemplate:
    """Conversations to ids and masks; one object serves training, chat and saving.

    jinja: text that is saved and that transformers renders
    stop_ids: ids that end an answer; generation stops at each of them
    separators: texts between two messages that contain no special token
    tool_use: the template of the same model for conversations that have tools, where it has another one for them

    Raises ValueError when the Jinja cannot be read or writes no special token at the end of an answer.
    """

    def __init__(self, tokenizer: Tokenizer, jinja: str, name: str = "the chat template") -> None:
        self.tokenizer, self.jinja, self.name = tokenizer, jinja, name
        self.tool_use: ChatTemplate | None = None
        markers, in_answers = find_markers(tokenizer, jinja, name)
        self._guarded = tokenizer.guarding(markers) if markers else tokenizer
        self._renderer = Renderer(self._guarded, jinja, name, in_answers)
        # Some special tokens remove the white space to their left or right, also when a mark stands in between.
        before, after = (any_of(s for s, sides in self._guarded.strips.items() if sides[n]) for n in (0, 1))
        space = rf"[\s{BREAK}{BEGIN}{FINISH}]*"
        self._spaces = [re.compile(f"{space}(?<!{BREAK}){before}"), re.compile(f"(?<!{BREAK}){after}{space}")]
        self.separators: list[str] = []
        self._ends: set[str] = set()
        self._probe()

    def encode(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """Return `(ids, mask)` of a conversation, equally long; `mask[i]` is True where `ids[i]` is trained.

        An assistant message with `"loss": False` is not trained. Raises ValueError when roles are out of order (see
        `check_messages`), a message contains a separator, or the template refuses or changes a message.
        """
        if (template := self._for(messages)) is not self:
            return template.encode(messages, add_generation_prompt)
        rendered = self._without_spaces(self.check(messages, add_generation_prompt))
        ids: list[int] = []
        mask: list[bool] = []
        run: list[tuple[str, bool]] = []
        trained = False
        for n, part in enumerate(self._renderer.tokens.split(rendered)):  # text, mark or special token, text, ...
            if part in (BEGIN, FINISH):
                trained = part == BEGIN
            elif n % 2 and part != BREAK:  # a special token: encode the text before it
                encode_texts(self._guarded, run, ids, mask)
                run = []
                ids.append(self._guarded.special[part])
                mask.append(trained)
            elif part and part != BREAK:
                run.append((part, trained))
        encode_texts(self._guarded, run, ids, mask)
        return ids, mask

    def _for(self, messages: list[Message]) -> ChatTemplate:
        """Return the template of a conversation, as transformers chooses it."""
        return self.tool_use if self.tool_use and any(message.get("tools") for message in messages) else self

    def _without_spaces(self, rendered: str) -> str:
        """Return the text without the white space that some special tokens remove beside them."""
        for spaces in self._spaces if self._guarded.strips else ():
            rendered = spaces.sub(lambda match: re.sub(r"\s", "", match[0]), rendered)
        return rendered

    def check(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Return the rendered text of a conversation (see `render`); raises the errors of `encode`."""
        check_messages(messages, add_generation_prompt)
        self._for(messages)._check_texts(messages)
        return self._for(messages).render(messages, add_generation_prompt)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation with marks in it.

        BREAK stands before a special token that is text; BEGIN and FINISH stand around all that is trained.
        """
        messages = [self._renderer.as_text(message) for message in messages]
        text = self._renderer.fill(messages, add_generation_prompt)
        trained = [bool(message.get("loss", True)) for message in messages if message["role"] == "assistant"]
        if all(trained) if self._renderer.has_blocks else add_generation_prompt:  # nothing of a prompt is trained
            return text
        try:
            return (self._only_trained if self._renderer.has_blocks else self._mark_answers)(messages, text, trained)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def _mark_answers(self, messages: list[Message], text: str, trained: list[bool]) -> str:
        """Return `text`, of a template without {% generation %} blocks, with marks around the trained answers."""
        spans = self._spans(messages, text)
        if messages[-1]["role"] == "assistant":
            text, start = with_last_thought(self._renderer.fill, messages, text, spans[-1][0])
            spans[-1] = (start, end_of_answer(text, start, self._renderer.tokens, self._ends))
        for (start, stop), is_trained in list(zip(spans, trained))[::-1]:
            if is_trained:
                text = text[:start] + BEGIN + text[start:stop] + FINISH + text[stop:]
        return text

    def _spans(self, messages: list[Message], text: str) -> list[tuple[int, int]]:
        """Return where each answer begins and ends in `text`, which has no marks."""
        return find_answers(self._renderer.fill_plain, messages, text, self._renderer.places, self._ends)

    def _only_trained(self, messages: list[Message], text: str, trained: list[bool]) -> str:
        """Return `text`, of a template with {% generation %} blocks, without the marks of answers that are not trained.

        A template may have no block for an answer, or several.
        """
        pieces = re.split(f"{BEGIN}|{FINISH}", text)  # text, block, text, block, ..., text
        owners = range(len(trained))  # the answer that each block belongs to
        if len(pieces) != 2 * len(trained) + 1:
            stops = [stop for _, stop in self._spans(messages, "".join(pieces))]
            begins = accumulate(map(len, pieces))
            owners = [sum(stop <= begin for stop in stops[:-1]) for begin in list(begins)[0:-1:2]]
        for n, owner in enumerate(owners):
            if trained[owner]:
                pieces[2 * n + 1] = f"{BEGIN}{pieces[2 * n + 1]}{FINISH}"
        return "".join(pieces)

    @property
    def saved(self) -> str | dict[str, str]:
        """Text of the template for a tokenizer's directory; with `tool_use`, both by name."""
        return {"default": self.jinja, "tool_use": self.tool_use.jinja} if self.tool_use else self.jinja

    def leaves_out(self, messages: list[Message]) -> list[str]:
        """Return the parts of a conversation (`features.PARTS`) that the template does not render.

        A thought that the template leaves out of earlier answers on purpose is no such part.
        """
        return [part for part in parts_of(messages) if part not in self._for(messages).rendered]

    @cached_property
    def rendered(self) -> set[str]:
        """Parts of conversations that the template renders."""
        return rendered_parts(self.render)

    def _check_texts(self, messages: list[Message]) -> None:
        """Raise ValueError when a message contains a mark, or, except for answers, a separator, or has an answer that
        only calls, and the template leaves calls out."""
        for n, message in enumerate(messages):
            if message.get("tool_calls") and not message.get("content") and "tool_calls" not in self.rendered:
                raise ValueError(f"message {n} is nothing but tool_calls, which {self.name} does not render")
            for text in texts(message):
                if mark := MARKS.search(text):
                    raise ValueError(f"message {n} contains U+{ord(mark[0]):X}, a noncharacter: remove it")
            for separator in self.separators if message["role"] != "assistant" else ():
                if separator in message["content"]:
                    raise ValueError(
                        f"message {n} ({message['role']}) contains {separator!r}, which in {self.name} ends the message"
                    )

    def _probe(self) -> None:
        """Render short conversations to find the ids that end an answer and the texts that separate messages."""
        question, answer = {"role": "user", "content": "\ufdd3"}, {"role": "assistant", "content": "\ufdd4"}
        unk = {name for name, i in self._guarded.special.items() if i == self.tokenizer.unk_id}
        text = self._renderer.fill([question, answer], False)
        if self._renderer.has_blocks:
            ends = [self._renderer.tokens_in(block)[-1:] for block in BLOCK.findall(text)]
        elif "\ufdd4" in text:
            ends = [self._renderer.tokens_in(text, "\ufdd4")[:1]]
        else:
            raise ValueError(
                f"{self.name} changes an answer and has no {{% generation %}} blocks, which would show what to train"
            )
        self._ends = set(chain(*ends)) - unk
        if not self._ends:
            raise ValueError(
                f"{self.name} writes no special token of this vocabulary at the end of an answer, "
                "so that no answer could end; choose another template"
            )
        for call in (calling("\ufdd5", content=""), calling("\ufdd5")):  # a call may end with another token
            with contextlib.suppress(ValueError):
                text = self._renderer.fill_plain([question, call], False)
                self._ends |= set(self._renderer.tokens_in(text, "\ufdd5")[-1:]) - unk
        self.stop_ids: list[int] = sorted(
            {*(self._guarded.special[name] for name in self._ends), self.tokenizer.eos_id} - {None}
        )
        conversation = [question, answer]
        text = self._renderer.fill_plain(conversation, False)
        with contextlib.suppress(ValueError):  # not every template has a system message
            text = self._renderer.fill_plain([{"role": "system", "content": "\ufdd5"}, *conversation], False)
        between = re.split("[\ufdd3-\ufdd5]", text)[1:-1]
        self.separators = [text.strip() for text in between if text.strip() and not self._renderer.names.search(text)]


def set_date(template: ChatTemplate, date: datetime) -> None:
    """Let a template write this date in place of the present one (Llama 3 names the date in every prompt)."""
    for each in filter(None, (template, template.tool_use)):
        each._renderer.variables["strftime_now"] = date.strftime


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

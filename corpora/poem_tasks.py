"""Make conversations from poems: one exchange for each poem, always the same one, and several in a conversation.

A form in the request is always the form of the answer. The answer to a request for a poem is the verse alone, behind
the name of its rhyme where the poem has it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from corpora.registry import Conversation, stable_share
from corpora.verse import Poem, form_of, forms, split_lines

T = TypeVar("T")

MAX_TITLE = 12
"""Longest title, in characters, that a request uses; longer ones describe an occasion rather than name a theme."""

MAX_TURNS, MAX_SIZE = 8, 500
"""Most answers of a conversation, and its largest size: characters, and MARKERS for each answer. So conversations fit
in rows of 512 tokens, whose positions are all trained."""
MARKERS = 6

SHORT_FORMS = {"五言绝句": "五绝", "七言绝句": "七绝", "五言律诗": "五律", "七言律诗": "七律"}
# Titles that only refer to another poem, and names for unknown authors.
_POINTING = {"又", "和", "再和", "次韵", "再次韵", "又次韵", "用韵", "前韵", "诗", "五言", "七言", "缺题", "失题"}
_NAMELESS = {"无名氏", "佚名", "不详", "阙名", "失名"}

PHRASINGS = {
    "title": (
        "以《{title}》为题写一首{form}",
        "请以《{title}》为题，写一首{form}。",
        "写一首题为《{title}》的{form}",
        "帮我写一首{form}，题目是《{title}》",
        "作{form}一首，题为《{title}》。",
        "用“{title}”作题目，写首{form}吧",
        "《{title}》，{form}",
    ),
    "theme": ("写一首关于{title}的{form}", "以{title}为题，写一首{form}", "用{form}写{title}"),
    "title_author": (
        "以《{title}》为题，仿{author}写一首{form}",
        "仿{author}作一首{form}，题为《{title}》。",
        "写一首{author}风格的{form}，题目是《{title}》",
        "请学{author}的笔意，以《{title}》为题写一首{form}。",
        "如果你是{author}，请以《{title}》为题写一首{form}。",
    ),
    "author": (
        "写一首{author}风格的{form}",
        "仿{author}写一首{form}",
        "请模仿{author}，作{form}一首。",
        "来一首{author}那样的{form}",
        "像{author}那样写一首{form}",
    ),
    "form": ("写一首{form}", "请写一首{form}。", "作{form}一首", "来一首{form}吧", "我想读一首{form}"),
    "free": (
        "写一首诗",
        "来一首诗吧",
        "给我写首诗。",
        "写一首关于{title}的诗",
        "写首{title}的诗吧",
        "以《{title}》为题写一首诗",
        "帮我写一首诗，题目是《{title}》",
    ),
    "next_line": (
        "接下一句：{line}",
        "下一句是什么：{line}",
        "“{line}”的下一句是什么？",
        "{line}的下一句",
        "请接下句：{line}",
    ),
    "previous_line": ("上一句是什么：{line}", "“{line}”的上一句是什么？", "接上一句：{line}", "{line}的上一句"),
    "go_on": ("再接一句", "接着呢？", "继续", "再下一句呢？", "然后呢？"),
    "which_form": ("这是什么体裁？", "这首诗是什么体？", "这是绝句还是律诗？"),
}

EXAMPLES = ("以《江上》为题写一首五言绝句", "写一首李白风格的七言律诗", "接下一句：床前明月光", "你能做什么？", "hello")
"""What a chat with a model that was trained on these conversations suggests to ask."""

_INTRODUCTION = (
    "我是一个小诗人，会写五绝、七绝、五律和七律，也会接诗句。",
    "我是小诗人，一个学过唐宋诗的小模型。给我一个题目，我就写一首诗。",
)
_ABILITIES = (
    "我会写五言和七言的绝句、律诗。你可以说：以《江上》为题写一首五言绝句。",
    "给我题目和体裁，我来写诗；给我一句诗，我来接下一句。",
)
_ONLY_POEMS = (
    "这个我不会，我只会写诗。给我一个题目吧！",
    "我只会写诗和接诗句。你可以说：以《江上》为题写一首五言绝句。",
)
_ABOUT_ME = ("I am a little poet. I write short Chinese poems.",)
_IN_CHINESE = ("I only write Chinese poems. Ask me in Chinese: 写一首五言绝句",)
CHAT = (
    (
        ("你好", "您好", "你好啊", "你好！", "嗨", "早上好", "晚上好", "在吗", "你好，小诗人"),
        ("你好！想读一首什么诗？", "你好！给我一个题目，我为你写诗。"),
    ),
    (
        ("你是谁", "你是谁？", "你叫什么名字？", "介绍一下你自己", "请自我介绍", "你是什么", "你是机器人吗？"),
        _INTRODUCTION,
    ),
    (
        (
            "你会做什么",
            "你会做什么？",
            "你能做什么？",
            "你能做什么",
            "你会什么",
            "怎么用你？",
            "有什么可以帮我的",
            "帮助",
        ),
        _ABILITIES,
    ),
    (
        ("谢谢", "谢谢你", "谢谢！", "多谢", "写得真好", "好诗", "不错", "很好", "太棒了"),
        ("不客气，还想读一首吗？", "谢谢你的夸奖！"),
    ),
    (("再见", "拜拜", "下次再聊", "晚安", "再见！"), ("再见，愿你有诗为伴。", "再见！")),
    (
        (
            "今天天气怎么样？",
            "讲个笑话",
            "给我讲个故事",
            "1+1等于几？",
            "你几岁了？",
            "你喜欢什么？",
            "你吃饭了吗？",
            "现在几点了？",
            "帮我写一篇作文",
            "什么是人工智能？",
            "推荐一本书",
            "我心情不好",
            "我们聊聊天吧",
            "你会唱歌吗？",
            "中国的首都是哪里？",
            "怎么做红烧肉？",
            "帮我翻译一句话",
            "写一段代码",
            "为什么？",
            "你会说英语吗？",
        ),
        _ONLY_POEMS,
    ),
    (
        ("hello", "hi", "Hello!", "Hi there", "Hello", "hey", "good morning"),
        ("Hello! Give me a title, and I write a poem.",),
    ),
    (("who are you", "Who are you?", "what are you", "What is your name?", "are you a robot?"), _ABOUT_ME),
    (("What can you do?", "what can you do", "help", "How do I use this?", "What do you do?"), _IN_CHINESE),
    (("thanks", "Thank you!", "thank you", "Thanks!", "great", "good"), ("You are welcome. Another poem?",)),
    (("bye", "Goodbye", "Bye!", "goodbye", "good night", "see you"), ("Goodbye!",)),
    (
        (
            "How are you?",
            "Tell me a joke",
            "What is the weather today?",
            "Write a poem about the moon",
            "I am sad",
            "Can you speak English?",
            "Where is Beijing?",
            "How old are you?",
            "Write some code",
            "Do you like music?",
            "write a poem",
            "What is AI?",
            "tell me a story",
            "Why?",
            "What is 1 + 1?",
            "Let us talk",
        ),
        _IN_CHINESE,
    ),
)


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    # Of Python's generator, only random() returns the same numbers in every version.
    return options[int(rng.random() * len(options))]


def _ask(rng: random.Random, task: str, poem: Poem, line: str = "") -> str:
    """Return a user message for a task, in a random phrasing."""
    form = poem.form if rng.random() < 0.75 else SHORT_FORMS[poem.form]
    if task == "title" and len(poem.title) <= 3 and rng.random() < 0.3:
        task = "theme"
    return _pick(rng, PHRASINGS[task]).format(title=poem.title, author=poem.author, form=form, line=line)


def _turns(*contents: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(contents), contents)]


def _punctuated(poem: Poem, i: int) -> str:
    """Return line i with its comma or full stop."""
    return poem.lines[i] + "，。"[i % 2]


def _quote(rng: random.Random, poem: Poem, i: int) -> str:
    """Return line i as people type it: mostly without its punctuation."""
    return poem.lines[i] if rng.random() < 0.7 else _punctuated(poem, i)


def _write(task: str) -> Callable[[random.Random, Poem], list[dict]]:
    return lambda rng, poem: _turns(_ask(rng, task, poem), poem.text)


def _next_line(rng: random.Random, poem: Poem) -> list[dict]:
    i = int(rng.random() * (len(poem.lines) - 1))
    return _turns(_ask(rng, "next_line", poem, _quote(rng, poem, i)), _punctuated(poem, i + 1))


def _previous_line(rng: random.Random, poem: Poem) -> list[dict]:
    i = 1 + int(rng.random() * (len(poem.lines) - 1))
    return _turns(_ask(rng, "previous_line", poem, _quote(rng, poem, i)), _punctuated(poem, i - 1))


def _two_lines(rng: random.Random, poem: Poem) -> list[dict]:
    i = int(rng.random() * (len(poem.lines) - 2))
    first = _ask(rng, "next_line", poem, _quote(rng, poem, i))
    return _turns(first, _punctuated(poem, i + 1), _ask(rng, "go_on", poem), _punctuated(poem, i + 2))


def _which_form(rng: random.Random, poem: Poem) -> list[dict]:
    return _turns(_ask(rng, "title", poem), poem.text, _ask(rng, "which_form", poem), f"这是一首{poem.form}。")


def _chat(rng: random.Random, poem: Poem) -> list[dict]:
    questions, answers = _pick(rng, CHAT)
    return _turns(_pick(rng, questions), _pick(rng, answers))


# task -> (weight in the draw, what the poem must have, function that makes the conversation)
TASKS: dict[str, tuple[float, str, Callable[[random.Random, Poem], list[dict]]]] = {
    "title": (44, "title", _write("title")),
    "title_author": (20, "title author", _write("title_author")),
    "author": (9, "author", _write("author")),
    "form": (4, "", _write("form")),
    "free": (4, "title", _write("free")),
    "next_line": (12, "", _next_line),
    "previous_line": (3, "", _previous_line),
    "two_lines": (3, "", _two_lines),
    "which_form": (1.5, "title", _which_form),
    "chat": (8, "training", _chat),
}


def conversation(poem: Poem) -> Conversation:
    """Return the exchange that a poem makes, as a conversation; it depends on the poem alone.

    A held-out poem makes a held-out conversation, so its title and author occur in no training conversation. Small
    talk ("chat") does not depend on the poem and is therefore made from training poems only.
    """
    has = {
        "title": len(poem.title) <= MAX_TITLE and poem.title not in _POINTING,
        "author": poem.author not in _NAMELESS,
        "training": not poem.held_out,
    }
    possible = [name for name, (_, needs, _) in TASKS.items() if all(has[need] for need in needs.split())]
    seed = hashlib.sha256(f"{poem.title}\n{poem.author}\n{poem.text}".encode()).digest()
    rng = random.Random(int.from_bytes(seed[:8], "big"))
    # draw a task with a probability proportional to its weight
    point = rng.random() * sum(TASKS[name][0] for name in possible)
    for name in possible:
        point -= TASKS[name][0]
        if point < 0:
            break
    return Conversation(TASKS[name][2](rng, poem), poem.held_out, name)


def conversations(poems: Iterable[Poem]) -> Iterator[Conversation]:
    """Yield conversations of 1 to MAX_TURNS answers, within MAX_SIZE, that join the exchanges of the poems in order.

    A model learns so to answer in the middle of a conversation. Held-out poems are only joined with held-out ones. The
    first poem alone says how many answers there should be.
    """
    waiting: dict[bool, Conversation] = {}
    limits: dict[bool, int] = {}
    for poem in poems:
        talk = conversation(poem)
        before = waiting.pop(poem.held_out, None)
        if before is not None:
            messages = before.messages + talk.messages
            if len(messages) <= 2 * limits[poem.held_out] and size(messages) <= MAX_SIZE:
                waiting[poem.held_out] = Conversation(messages, poem.held_out, "joined")
                continue
            yield before
        waiting[poem.held_out] = talk
        limits[poem.held_out] = 1 + int(MAX_TURNS * stable_share(f"turns:{poem.text}"))
    yield from waiting.values()


def size(messages: list[dict]) -> int:
    """Return the characters of a conversation, and MARKERS for each answer."""
    return sum(len(message["content"]) for message in messages) + MARKERS * (len(messages) // 2)


def is_sensible(question: str, answer: str) -> bool:
    """Return whether the answer to one of EXAMPLES is what was asked for: a poem of the form, a line of the same
    length, or the small talk that belongs to the question."""
    if form := next((form for form in forms if form in question), None):
        return form_of(answer) == form
    if line := question.partition("接下一句：")[2]:
        return [len(line)] == [len(each) for each in split_lines(answer)]
    return any(answer in answers for questions, answers in CHAT if question in questions)

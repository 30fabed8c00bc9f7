"""corpora/named.py: each corpus on a few records of the shape its publisher gave it."""

import gzip
import json

import pytest

from corpora import CORPORA, BadRecord, SourceArgs, read, read_conversations

NAMED = ["wikipedia_cn", "baidu_baike", "medical", "c4_zh", "c4", "wudao", "clue_corpus_small", "mnbvc"]


def lines(*records: dict) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def texts(tmp_path, name: str) -> list[str]:
    found = list(read(SourceArgs(corpus=(name,), raw_dir=tmp_path)))
    assert not [record for record in found if isinstance(record, BadRecord)]
    assert {document.source for document in found} == {name}
    return [document.text for document in found]


@pytest.fixture
def put(tmp_path):
    def put(path: str, data: bytes) -> None:
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    return put


@pytest.mark.parametrize("name", NAMED)
def test_a_missing_corpus_says_what_to_put_where(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name}/ is missing: download the corpus {name} from \w+.* and put"):
        read(SourceArgs(corpus=(name,), raw_dir=tmp_path))
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="has no file to read"):
        read(SourceArgs(corpus=(name,), raw_dir=tmp_path))
    assert CORPORA[name].licence and CORPORA[name].description


def test_wikipedia_cn(tmp_path, put):
    records = [
        {"completion": f"昭通机场（ZPZT）是位于中国云南昭通的民用机场{i}。", "source": "wikipedia.zh2307"}
        for i in "一二"
    ]
    put("wikipedia_cn/wikipedia-cn-20230720-filtered.json", json.dumps(records, ensure_ascii=False).encode())
    assert texts(tmp_path, "wikipedia_cn") == [record["completion"] for record in records]


def test_baidu_baike(tmp_path, put):
    put(
        "baidu_baike/563w_baidubaike.json",
        lines(
            {
                "title": "红色食品",
                "summary": "红色食品是指食品为红色。",
                "sections": [{"title": "简介", "content": "颜色较深。"}, {"title": "营养", "content": "番茄红素。"}],
                "tags": ["食品"],
                "url": "http://baike.baidu.com/view/0.htm",
            },
            {"title": "空", "summary": None, "sections": [{"title": "一", "content": "二"}], "tags": [], "url": ""},
            {"title": "只有题目", "summary": None, "sections": [], "tags": [], "url": ""},
        ),
    )
    assert texts(tmp_path, "baidu_baike") == [
        "红色食品：红色食品是指食品为红色。\n简介：颜色较深。\n营养：番茄红素。",
        "一：二",
        "只有题目",
    ]


def test_medical_has_three_forms_and_never_teaches_what_was_rejected(tmp_path, put):
    put("medical/pretrain/medical_book_zh.json", lines({"text": "人体解剖学"}))
    put("medical/pretrain/valid_encyclopedia.json", lines({"text": "留作检验"}))
    put("medical/finetune/train_zh_0.json", lines({"instruction": "头痛", "input": "怎么办", "output": "休息"}))
    put("medical/finetune/train_en_1.json", lines({"instruction": "", "input": "I cough.", "output": "Rest."}))
    put("medical/finetune/test_zh_0.json", lines({"instruction": "牙痛", "input": "", "output": "看牙医"}))
    put(
        "medical/reward/train.json",
        lines({"question": "发热？", "response_chosen": "多喝水", "response_rejected": "不可取的回答"}),
    )
    source = SourceArgs(corpus=("medical",), raw_dir=tmp_path)
    assert {document.text: document.held_out for document in read(source)} == {
        "人体解剖学": None,
        "留作检验": True,
        "头痛怎么办\n休息": None,
        "I cough.\nRest.": None,
        "牙痛\n看牙医": True,
        "发热？\n多喝水": None,
    }
    conversations = {c.messages[0]["content"]: c for c in read_conversations(source)}
    assert set(conversations) == {"头痛怎么办", "I cough.", "牙痛", "发热？"}
    assert conversations["牙痛"].held_out
    assert conversations["发热？"].messages[1] == {"role": "assistant", "content": "多喝水"}


def test_broken_medical_pairs_are_bad_documents_and_no_conversations(tmp_path, put):
    put("medical/train.json", lines({"instruction": "a", "input": "b"}, {"input": "a", "output": None}) + b"{\n3\n")
    source = SourceArgs(corpus=("medical",), raw_dir=tmp_path)
    found = list(read(source))
    assert len(found) == 4 and all(isinstance(record, BadRecord) for record in found)
    assert list(read_conversations(source)) == []


@pytest.mark.parametrize(
    ("name", "file"), [("c4_zh", "c4-zh.tfrecord-00000.json.gz"), ("c4", "c4-train.00000.json.gz")]
)
def test_c4(tmp_path, put, name, file):
    record = {"text": "Beginners BBQ Class!\nDo you want to", "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b"}
    put(f"{name}/{file}", gzip.compress(lines(record, record)))
    assert texts(tmp_path, name) == [record["text"]] * 2


def test_wudao(tmp_path, put):
    record = {"id": 1, "uniqueKey": "u", "titleUkey": "t", "dataType": "百科", "title": "题", "content": "文一。文二。"}
    records = [record, {**record, "title": ""}]
    put("wudao/part-2021278643.json", json.dumps(records, ensure_ascii=False).encode())
    assert texts(tmp_path, "wudao") == ["题\n文一。文二。", "文一。文二。"]


def test_clue_corpus_small(tmp_path, put):
    put("clue_corpus_small/news2016zh_corpus/1.txt", "第一篇第一句。\n第一篇第二句。\n\n第二篇。\n".encode())
    put("clue_corpus_small/wiki_zh/AA/wiki_00", lines({"id": "13", "url": "u", "title": "数学", "text": "数学\n\n是"}))
    put("clue_corpus_small/webText2019zh/a.json", lines({"qid": 1, "title": "问", "desc": "", "content": "答"}))
    assert texts(tmp_path, "clue_corpus_small") == [
        "第一篇第一句。\n第一篇第二句。",
        "第二篇。",
        "问\n答",
        "数学\n\n是",
    ]


def test_mnbvc(tmp_path, put):
    paragraph = {"行号": 1, "是否重复": False, "是否跨文件重复": False, "md5": "x", "内容": "第一段"}
    put(
        "mnbvc/news/a.jsonl.gz",
        gzip.compress(
            lines(
                {
                    "文件名": "文件.txt",
                    "是否待查文件": False,
                    "段落数": 3,
                    "段落": [
                        paragraph,
                        {**paragraph, "行号": 2, "内容": "第二段"},
                        {**paragraph, "行号": 3, "是否重复": True},
                    ],
                }
            )
        ),
    )
    put("mnbvc/qa/b.jsonl", lines({"id": 1, "问": "写小说", "答": "他们相遇。", "来源": "wikihow", "元数据": {}}))
    put("mnbvc/law/c.jsonl", lines({"text": "判决书", "meta": "{}"}))
    put("mnbvc/forum/d.jsonl", lines({"ID": 1, "主题": "帖子", "回复": [{"楼ID": "1", "回复": "一楼"}]}))
    assert texts(tmp_path, "mnbvc") == ["帖子\n一楼", "判决书", "第一段\n第二段", "写小说\n他们相遇。"]


def test_a_record_of_another_shape_is_bad(tmp_path, put):
    put("wikipedia_cn/a.json", b'[{"text": "x"}, {"completion": "good"}, "x"]')
    bad, good, other = read(SourceArgs(corpus=("wikipedia_cn",), raw_dir=tmp_path))
    assert "no key 'completion'" in bad.reason and isinstance(other, BadRecord)
    assert good.text == "good"

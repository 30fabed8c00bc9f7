"""The page at / as a file: whole, shut off from everything else, in two languages."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from serving.page import HERE, read_page

PARTS = sorted(HERE.glob("page*.js"))


def words() -> dict[str, dict[str, str]]:
    """The words of each language by name."""
    text = (HERE / "page_words.js").read_text(encoding="utf8")
    found = {}
    for language, body in re.findall(r"^  (en|zh): \{\n(.*?)^  \},", text, re.DOTALL | re.MULTILINE):
        found[language] = dict(re.findall(r'(\w+):\s+"([^"]*)"', body))
    return found


def test_it_is_one_file_with_all_parts():
    html = read_page().html.decode()
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]*\b(?:src|href)="(?!data:)', html)
    assert "//" not in "".join(re.findall(r'"(https?:[^"]*)"', html))
    for part in [*PARTS, HERE / "page.css"]:
        assert part.read_text(encoding="utf8") in html
        assert "</script" not in part.read_text(encoding="utf8") and "</style" not in part.read_text(encoding="utf8")


def test_its_policy_allows_its_own_parts_and_nothing_else():
    page = read_page()
    policy = dict(rule.split(" ", 1) for rule in page.headers["Content-Security-Policy"].split("; "))
    assert (
        policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["trusted-types"] == "'none'"
    )
    assert "unsafe" not in str(policy) and "*" not in str(policy)
    for kind in ("script", "style"):
        bodies = re.findall(rf"<{kind}>(.*?)</{kind}>", page.html.decode(), re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
        assert bodies and policy[f"{kind}-src"] == " ".join(f"'sha256-{each}'" for each in hashes)


@pytest.mark.parametrize("part", PARTS, ids=lambda path: path.name)
def test_no_part_can_make_html_of_a_text(part: Path):
    text = part.read_text(encoding="utf8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text)
    assert text.count("\n") < 400


def test_both_languages_have_every_word_that_is_used():
    found = words()
    assert found["en"].keys() == found["zh"].keys()
    assert all(found["en"][name].count("{}") == found["zh"][name].count("{}") for name in found["en"])
    assert all(re.search("[\u4e00-\u9fff]", word) for word in found["zh"].values())
    scripts = "".join(path.read_text(encoding="utf8") for path in PARTS if path.name != "page_words.js")
    html = (HERE / "page.html").read_text(encoding="utf8")
    used = set(re.findall(r'\bsay\("(\w+)"', scripts)) | set(re.findall(r'data-(?:text|label|title)="(\w+)"', html))
    assert used <= found["en"].keys()
    everything = scripts + html
    assert [name for name in found["en"] if not re.search(rf"\b{name}\b", everything)] == []

"""Texts on the page, in a real browser: no text of a model becomes HTML, and Markdown is shown as it is meant."""

import re

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


HOSTILE = """<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script>
[a link](javascript:window.hacked=1) [b](JaVaScRiPt:alert(1)) [c](data:text/html,<script>window.hacked=1</script>)
![picture](https://evil.example/x.png) <https://evil.example> <a href="https://evil.example">d</a> [e](//evil.example)

- <svg onload="window.hacked=1">
> <iframe src="https://evil.example"></iframe>

| <b onclick=1>x</b> | y |
|---|---|
| **<i>z</i>** | `<u>` |

```html" onload="window.hacked=1
<style>body { display: none }</style>
</code></pre><script>window.hacked=1</script>
```
# <h1 style="position: fixed">&lt;b&gt;"""


@pytest.mark.parametrize("answered", [True, False], ids=["answer", "question"])
def test_no_text_becomes_html(screen, answered):
    screen.answer_with(HOSTILE if answered else "fine")
    screen.send("question" if answered else HOSTILE)
    assert screen.evaluate("window.hacked") is None
    thread = "#thread .text "
    assert (
        screen.locator(", ".join(thread + name for name in ("img", "script", "iframe", "svg", "style", "u"))).count()
        == 0
    )
    links = screen.locator(f"{thread} a").evaluate_all("all => all.map(a => [a.protocol, a.rel])")
    assert all(protocol == "https:" and "noopener" in rel for protocol, rel in links)
    assert screen.locator("[onerror], [onload], [onclick], #thread .text [style]").count() == 0
    shown = "".join(screen.texts())
    for text in (
        '<img src=x onerror="window.hacked=1">',
        "<script>window.hacked=1</script>",
        "&lt;b&gt;",
        "javascript:",
    ):
        assert text in shown
    error = screen.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } }"
    )
    assert error == "TypeError"  # the browser itself refuses
    screen.expected = ("TrustedHTML",)


MARKDOWN = """# Head *line* #

床前**明月**光，
疑是_地上_霜 and snake_case_word, 2 * 3 * 4, a\\*b, ~~gone~~ `co*de*` ``a`b``

1. one
2. two
   - deeper **bold *both***
   - again

   a paragraph

3. three

> quoted
> > twice
> - item

***

| a | b |
|:--|--:|
| `1` | *2* \\| 3 |

```python
if a < b:  # *plain*

    pass
```

[text](https://example.org/a_(b)?c=1&d=2 "title") ![alt](https://example.org/p.png)
***both*** and **unclosed
- * -
+ plus
"""


def outline(html: str) -> list[str]:
    """The tags and words of HTML, without attributes but addresses."""
    html = re.sub(r"</?(thead|tbody|pre)[^>]*>|\s(?!href)[\w-]+=\"[^\"]*\"", "", html)
    return re.findall(r"<[^>]+>|[^<>\s]+", html)


def test_markdown_is_that_of_a_well_kept_library(screen):
    """markdown-it-py, with ends of lines kept, pictures as links and code without the language above it."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])
    expected = re.sub("(</?)h1>", r"\1h3>", parser.render(MARKDOWN)).replace("<s>", "<del>").replace("</s>", "</del>")
    expected = re.sub(r'<img src="([^"]*)" alt="([^"]*)"[^>]*/?>', r'<a href="\1">\2</a>', expected)
    expected = re.sub(r"<li>\s*<p>(.*?)</p>", r"<li>\1", re.sub("<br />", "<br>", expected.replace("<hr />", "<hr>")))
    script = """text => {
        const box = document.createElement("div");
        box.append(new Markdown(text, null, words).nodes());
        for (const each of box.querySelectorAll(".code > div")) each.remove();
        for (const each of box.querySelectorAll("div")) each.replaceWith(...each.childNodes);
        return new XMLSerializer().serializeToString(box);
    }"""
    found = screen.evaluate(script, MARKDOWN)
    found = re.sub(r"<li>\s*<p>(.*?)</p>", r"<li>\1", re.sub(r"^<div[^>]*>|</div>$", "", found).replace(" />", ">"))
    assert outline(found) == outline(expected)
    for text in (
        "> " * 3000,
        "- " * 3000,
        "*a " * 20_000,
        "[" * 20_000,
        "`" * 9999 + "a`",
        "|" * 5000 + "\n|-|",
        "**" * 9999,
    ):
        assert screen.evaluate(f"text => ({script})(text).length", text) > 0

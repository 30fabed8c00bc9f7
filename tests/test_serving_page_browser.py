"""The page at / in a real browser: what a person does on it."""

import json
import re

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from helpers.page import CHAT, EXAMPLES
from helpers.server import served
from helpers.tiny_chat_model import save_chat_model


def test_a_question_gets_the_answer_of_the_api(screen, page_server):
    screen.set(temperature=0, max_tokens=12, system="诗")
    assert screen.locator(".hello li").all_inner_texts() == EXAMPLES
    screen.send("举头望明月")
    messages = [{"role": "system", "content": "诗"}, {"role": "user", "content": "举头望明月"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 5}
    answer = page_server.ask("/v1/chat/completions", body)[2]
    (question, found), choice = screen.texts(), answer["choices"][0]
    assert question == "举头望明月" and found.split() == choice["message"]["content"].split()
    stats = screen.locator(".stats").inner_text()
    assert re.match(rf"{answer['usage']['completion_tokens']} tokens · [\d.]+ tokens/s · first after [\d.]+ s", stats)
    assert screen.inner_text("#title") == "举头望明月" and screen.input_value("#input") == ""
    # the likeliest tokens are those of the API: by the pointer, then by the keys
    entries = choice["logprobs"]["content"]
    spans = screen.locator(".assistant .t")
    spans.first.hover()
    shown = screen.locator("#tip tr:not(:first-child)").first.inner_text()
    assert f"{100 * 2.718281828 ** entries[0]['top_logprobs'][0]['logprob']:.1f} %" in shown
    screen.locator(".assistant .text").focus()
    for _ in range(2):
        screen.keyboard.press("ArrowRight")
    assert screen.locator(".t.at").evaluate("e => e.dataset.token") == spans.nth(2).get_attribute("data-token")
    screen.keyboard.press("Escape")
    assert not screen.is_visible("#tip")


def test_an_answer_comes_in_pieces_and_stops(screen, page_server):
    screen.set(max_tokens=29000)
    with_more = {"ignore_eos": True}
    screen.route(CHAT, lambda route: route.continue_(post_data=json.dumps(route.request.post_data_json | with_more)))
    screen.send("月", wait=False)
    lengths = set()
    while len(lengths) < 3:
        lengths.add(len(screen.locator(".running .text").inner_text()))
    assert screen.locator("#send").is_hidden() and screen.locator(".message button:has-text('Edit')").is_disabled()
    screen.send("not yet", wait=False)
    screen.click("#stop")
    screen.wait()
    page_server.wait_until_idle()
    assert "stopped" in screen.locator(".stats").inner_text() and screen.input_value("#input") == "not yet"
    texts = screen.texts()
    assert len(texts) == 2 and len(texts[1]) >= max(lengths)
    screen.reload()
    screen.locator(".message").first.wait_for()
    assert screen.texts()[0] == "月" and "stopped" in screen.locator(".stats").inner_text()


def test_edited_and_drawn_again_messages_stand_beside_the_old_ones(screen):
    requests = screen.answer_with("first")
    screen.send("one")
    screen.answer_with("second")
    screen.send("two")
    requests = screen.answer_with("third")
    screen.click(".assistant:nth-of-type(4) button:has-text('Regenerate')")
    screen.wait()
    assert screen.texts() == ["one", "first", "two", "third"]
    assert [message["content"] for message in requests[0]["messages"]] == ["one", "first", "two"]
    screen.click("[aria-label='Previous version']")
    assert screen.texts() == ["one", "first", "two", "second"] and screen.inner_text(".version") == "1/2"
    requests = screen.answer_with("fourth")
    screen.locator(".message").first.hover()
    screen.click(".user >> nth=0 >> button:has-text('Edit')")
    screen.fill(".message textarea", "one more")
    screen.click(".editor button:has-text('Send')")
    screen.wait()
    assert screen.texts() == ["one more", "fourth"]
    assert requests[0]["messages"] == [{"role": "user", "content": "one more"}]
    screen.locator(".message").first.hover()
    screen.click("[aria-label='Previous version']")
    assert screen.texts() == ["one", "first", "two", "second"]
    screen.click(".assistant >> nth=1 >> button:has-text('Edit')")
    screen.fill(".message textarea", "mine")
    screen.keyboard.press("Control+Enter")
    assert screen.texts() == ["one", "first", "two", "mine"]


def test_conversations_and_settings_are_kept(screen):
    screen.answer_with("answer")
    screen.set(temperature=0.3)
    for question in ("one", "two", "three"):
        screen.click("#new")
        screen.send(question)
    screen.reload()
    screen.locator(".message").first.wait_for()
    assert screen.locator("#list .name").all_inner_texts() == ["three", "two", "one"]
    screen.click("#list .name:has-text('one')")
    assert screen.texts() == ["one", "answer"]
    requests = screen.answer_with("more")
    screen.send("four")
    assert requests[0]["temperature"] == 0.3 and "top_p" not in requests[0]
    screen.once("dialog", lambda dialog: dialog.accept("renamed"))
    screen.click("[aria-label='Rename: one']")
    screen.once("dialog", lambda dialog: dialog.accept())
    screen.hover("#list .name:has-text('two')")
    screen.click("[aria-label='Delete: two']")
    assert screen.locator("#list .name").all_inner_texts() == ["renamed", "three"]
    other = screen.context.new_page()  # a second window sees the same, and does not overwrite it
    other.goto(screen.server.url)
    other.locator("#list .name:has-text('three')").click()
    assert other.locator(".message > .text").all_inner_texts() == ["three", "answer"]
    other.close()


def test_languages(open_screen):
    screen = open_screen(locale="zh-CN")
    assert screen.inner_text("#new") == "新对话" and screen.get_attribute("html", "lang") == "zh-CN"
    assert screen.get_attribute("#input", "placeholder") == "问点什么"
    screen.click("#open")
    screen.select_option("#language", "en")
    screen.press("#settings", "Escape")
    screen.reload()
    assert screen.inner_text("#new") == "New conversation" and screen.get_attribute("html", "lang") == "en"
    assert screen.get_attribute("#send", "aria-label") == "Send"


def test_a_phone_has_no_sideways_scroll(open_screen):
    screen = open_screen(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    wide = "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n|" + "long cell " * 9 + "|" + "z" * 90 + "|\n|-|-|\n|1|2|\n"
    screen.answer_with(wide)
    screen.send("w" * 200)
    sizes = "e => [e.scrollWidth, e.clientWidth]"
    for selector in ("html", "body", "#thread"):
        inner, outer = screen.locator(selector).evaluate(sizes)
        assert inner <= outer == 360
    assert not screen.is_visible("#list")
    screen.click("#menu")
    screen.locator("#list").wait_for()
    screen.click("#new")
    assert not screen.is_visible("#list") and screen.locator(".hello").is_visible()
    screen.click("#open")
    inner, outer = screen.locator("#settings").evaluate(sizes)
    assert inner <= outer <= 360


def test_dark_and_light(open_screen):
    screen = open_screen(color_scheme="dark")
    brightness = (
        "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + Number(b), 0)"
    )
    assert screen.evaluate(brightness) < 150
    screen.click("#open")
    screen.select_option("#theme", "light")
    assert screen.evaluate(brightness) > 600
    screen.emulate_media(color_scheme="light")
    screen.select_option("#theme", "dark")
    assert screen.evaluate(brightness) < 150


def test_the_key_is_asked_for_and_not_kept(open_screen, page_model):
    with served(page_model, api_key="secret") as server:
        screen = open_screen(server)
        screen.expected = ("401",)
        screen.locator("#key").wait_for()
        screen.fill("#key", "wrong")
        screen.press("#key", "Enter")
        screen.locator("#key").wait_for()
        screen.fill("#key", "secret")
        screen.press("#key", "Enter")
        screen.locator(".hello li").first.wait_for()
        screen.send("月")
        assert len(screen.texts()) == 2
        assert "secret" not in screen.evaluate("JSON.stringify({ ...localStorage })")


def test_a_model_without_a_template_continues_texts(open_screen, page_model, monkeypatch):
    with served(page_model) as server:
        monkeypatch.setattr(server.service.assistant, "template", None)
        screen = open_screen(server)
        assert "no chat template" in screen.inner_text(".hello") and not screen.locator(".choice").count()
        screen.set(temperature=0, max_tokens=6)
        screen.send("床前明月光")
        screen.send("")
        body = {"prompt": "床前明月光", "temperature": 0, "max_tokens": 6}
        first = server.ask("/v1/completions", body)[2]["choices"][0]["text"]
        second = server.ask("/v1/completions", body | {"prompt": "床前明月光" + first})[2]["choices"][0]["text"]
        found = screen.locator(".message > .text").all_text_contents()
        assert found == ["床前明月光", first, second] and screen.locator(".t").count() > 3


ERRORS = {
    (429, "busy"): "The server is busy. Try again in 7 s.",
    (504, "timeout"): "The answer took longer than the server allows.",
    (400, "context_length_exceeded"): "This does not fit into the context of the model.",
    (400, None): "The server refused the request.",
    (404, "model_not_found"): "The server does not have this model any more.",
    (500, None): "The server made a mistake.",
}


def test_errors_are_told_in_plain_words(screen):
    screen.expected = ("status of",)
    for (status, code), sentence in ERRORS.items():
        error = {"message": f"<b>because</b> {status}", "type": "x", "param": None, "code": code}
        screen.answer_with(json.dumps(error), status=status, **{"retry-after": "7"})
        screen.send("again")
        shown = screen.inner_text("[role=alert]")
        assert sentence in shown and f"<b>because</b> {status}" in shown
    screen.answer_with("half", end=False)
    screen.click("[role=alert] button")
    screen.wait()
    assert "broke off" in screen.inner_text("[role=alert]") and screen.texts() == ["again", "half"]
    screen.answer_with("whole")
    screen.click("[role=alert] button")
    screen.wait()
    assert screen.texts() == ["again", "whole"] and not screen.locator("[role=alert]").count()


def test_a_server_that_is_gone_is_told(open_screen, page_model):
    with served(page_model) as server:
        screen = open_screen(server, locale="zh-CN")
        screen.locator(".hello li").first.wait_for()
    screen.expected = ("ERR_CONNECTION_REFUSED",)
    screen.send("月")
    assert "服务器没有回应" in screen.inner_text("[role=alert]") and screen.texts() == ["月"]


def test_the_oldest_turns_are_left_out_where_the_context_is_full(open_screen, tmp_path):
    with served(save_chat_model(tmp_path, max_seq_len=60)) as server:
        screen = open_screen(server)
        screen.set(temperature=0, max_tokens=8)
        for i in range(5):
            screen.send(f"question {i}")
        assert len(screen.texts()) == 10 and "oldest turns left out:" in screen.locator(".stats").last.inner_text()


def test_an_enter_of_a_chinese_keyboard_does_not_send(screen):
    screen.locator(".hello li").first.wait_for()
    screen.fill("#input", "ni hao")
    event = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    screen.evaluate(f"document.getElementById('input').dispatchEvent({event})")
    screen.press("#input", "Shift+Enter")
    assert screen.input_value("#input") == "ni hao\n" and screen.texts() == []


def test_a_conversation_is_saved_to_a_file_and_opened(screen, tmp_path):
    screen.answer_with("answer")
    screen.set(system="be brief")
    screen.send("a/b: question?")
    with screen.expect_download() as download:
        screen.click("#export")
    assert download.value.suggested_filename == "a b question .jsonl".replace(" .", ".")
    path = tmp_path / "mine.jsonl"
    download.value.save_as(path)
    record = json.loads(path.read_text(encoding="utf8"))
    roles = [("system", "be brief"), ("user", "a/b: question?"), ("assistant", "answer")]
    assert [(message["role"], message["content"]) for message in record["messages"]] == roles
    screen.set_input_files("#file", path)
    screen.locator("#list .name:has-text('mine')").wait_for()
    assert screen.texts() == ["a/b: question?", "answer"] and screen.locator("#list li").count() == 2
    path.write_text('{"messages": [{"role": "user", "content": 1}]}')
    screen.set_input_files("#file", path)
    screen.locator("#note:has-text('no conversation')").wait_for()


def test_everything_has_a_name_for_who_does_not_see_it(screen):
    screen.answer_with("answer `code`\n```\nx\n```")
    screen.send("question")
    screen.click("#open")
    names = """() => [...document.querySelectorAll("button, select, input:not([type=file]), textarea")]
        .filter((each) => !(each.getAttribute("aria-label") || each.textContent.trim() || each.labels?.length))
        .map((each) => each.outerHTML)"""
    assert screen.evaluate(names) == []
    screen.press("#settings", "Escape")
    seen = set()
    screen.focus("#input")
    for _ in range(25):
        screen.keyboard.press("Tab")
        seen.add(screen.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"new", "open", "thread", "export", "Regenerate", "Copy"} <= seen

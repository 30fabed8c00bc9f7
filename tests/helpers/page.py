"""The page at / in a window of a real browser, for tests; its fixtures are known to all of them."""

import json

import pytest

from helpers.browser import browser
from helpers.tiny_chat_model import save_chat_model

CHAT = "**/v1/chat/completions"
EXAMPLES = ["以《江上》为题写一首五言绝句", "hello"]


@pytest.fixture(scope="module")
def page_model(tmp_path_factory):
    directory = save_chat_model(tmp_path_factory.mktemp("model"), max_seq_len=30000)
    (directory / "examples.txt").write_text("\n".join(EXAMPLES), encoding="utf8")
    return directory


@pytest.fixture(scope="module")
def page_server(page_model):
    from helpers.server import served  # needs the extra "serve", which a test may lack

    with served(page_model) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


class Screen:
    """A window of the browser with a store of its own, in which nothing may go wrong unseen."""

    def __init__(self, chromium, server, **options) -> None:
        options = {"locale": "en-US", "viewport": {"width": 1000, "height": 700}} | options
        self.context = chromium.new_context(**options)
        self.context.set_default_timeout(90_000)  # for machines that are busy with other tests
        self.page, self.wrong, self.asked = self.context.new_page(), [], []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.server, self.expected = server, ()
        self.page.goto(server.url)

    def __getattr__(self, name):
        return getattr(self.page, name)

    def send(self, text: str, wait: bool = True) -> None:
        self.locator("#model option").first.wait_for(state="attached")
        self.fill("#input", text)
        self.press("#input", "Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        self.locator("#send").wait_for()

    def texts(self) -> list[str]:
        """The messages that are shown."""
        return self.locator(".message > .text").all_inner_texts()

    def set(self, **values) -> None:
        """Fill in some settings."""
        self.click("#open")
        for name, value in values.items():
            self.fill(f"#{name}", str(value))
        self.press("#settings", "Escape")

    def answer_with(self, *pieces: str, path: str = CHAT, status: int = 200, end: bool = True, **headers: str) -> list:
        """Let a stand-in for the server stream an answer, or say an error; return the requests that it gets."""
        requests = []

        def fulfil(route) -> None:
            requests.append(route.request.post_data_json)
            if status != 200:
                return route.fulfill(status=status, headers=headers, json={"error": json.loads(pieces[0])})
            choices = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces]
            events = [json.dumps({"choices": [choice]}) for choice in choices]
            done = ["[DONE]"] if end else []
            body = "".join(f"data: {event}\n\n" for event in [*events, *done])
            return route.fulfill(status=200, content_type="text/event-stream", body=body)

        self.page.unroute_all()
        self.page.route(path, fulfil)
        return requests


@pytest.fixture
def open_screen(chromium, page_server):
    screens = []

    def open_one(server=page_server, **options) -> Screen:
        screens.append(Screen(chromium, server, **options))
        return screens[-1]

    yield open_one
    for screen in screens:
        screen.context.close()
        wrong = [each for each in screen.wrong if not any(word in each for word in screen.expected)]
        assert wrong == [], wrong
        assert all(url.startswith((screen.server.url, "data:", "blob:")) for url in screen.asked), screen.asked


@pytest.fixture
def screen(open_screen):
    return open_screen()

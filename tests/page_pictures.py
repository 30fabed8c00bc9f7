"""Take the pictures of the server's page in docs/ anew, from a server that runs.

python serve.py --name poet &
python -m tests.page_pictures http://127.0.0.1:8000
"""

import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).parent))
from helpers.browser import browser

DOCS = Path(__file__).parents[1] / "docs"
DESKTOP, PHONE = {"width": 960, "height": 640}, {"width": 360, "height": 640}
POEM, LINE, HELLO = "以《江上》为题写一首五言绝句", "接下一句：床前明月光", "hello"


def ask(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.locator("#send").wait_for()
    page.mouse.move(500, 500)


def take(page, name: str) -> None:
    """Write a picture with few colours, which is small."""
    image = Image.open(BytesIO(page.screenshot())).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)


def start(chromium, url: str, seed: int, **options):
    page = chromium.new_context(**options).new_page()
    page.goto(url)
    page.locator("#model option").first.wait_for(state="attached")
    page.click("#open")
    page.fill("#seed", str(seed))
    page.press("#settings", "Escape")
    return page


def main(url: str) -> None:
    with browser() as chromium:
        page = start(chromium, url, 1, viewport=DESKTOP, locale="zh-CN")
        ask(page, "你能做什么？")
        page.click("#new")
        ask(page, LINE)
        page.click("#new")
        ask(page, POEM)
        ask(page, LINE)
        page.locator(".assistant >> nth=0 >> .t").nth(6).hover()
        take(page, "page_zh_desktop.png")
        page = start(chromium, url, 2, viewport=PHONE, locale="zh-CN", has_touch=True, is_mobile=True)
        take(page, "page_zh_phone.png")
        page = start(
            chromium, url, 3, viewport=PHONE, locale="en-US", color_scheme="dark", has_touch=True, is_mobile=True
        )
        ask(page, HELLO)
        ask(page, POEM)
        take(page, "page_en_phone_dark.png")
        page = start(chromium, url, 4, viewport=DESKTOP, locale="en-US", color_scheme="dark")
        page.click("#open")
        page.check("#colours")
        page.press("#settings", "Escape")
        ask(page, HELLO)
        ask(page, POEM)
        page.click(".assistant >> nth=1 >> button:has-text('Regenerate')")
        page.locator("#send").wait_for()
        page.mouse.move(500, 500)
        take(page, "page_en_desktop_dark.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

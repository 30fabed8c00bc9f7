"""The page at /: its parts beside this file, put together into one, and headers that shut out everything else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

PART = re.compile(r'<link rel="stylesheet" href="(page\w*\.css)">|<script src="(page\w*\.js)"></script>')
HERE = Path(__file__).parent


class Page(NamedTuple):
    """An HTML page and the headers that it is sent with."""

    html: bytes
    headers: dict[str, str]


@cache
def read_page() -> Page:
    """Return the page.

    With these headers a browser runs no script and takes no style but those of the page (by their hashes), loads
    nothing from anywhere, talks to this server only, and does not show the page inside another one.
    `trusted-types 'none'` makes it refuse to turn any text into HTML (https://www.w3.org/TR/trusted-types).
    """
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def put_in(found: re.Match) -> str:
        kind = "style" if found[1] else "script"
        text = "\n" + (HERE / (found[1] or found[2])).read_text(encoding="utf8")
        hashes[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
        return f"<{kind}>{text}</{kind}>"

    html = PART.sub(put_in, (HERE / "page.html").read_text(encoding="utf8"))
    policy = {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:"}
    policy |= {"script-src": " ".join(hashes["script"]), "style-src": " ".join(hashes["style"])}
    policy |= {"base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}
    policy |= {"trusted-types": "'none'", "require-trusted-types-for": "'script'"}
    headers = {"Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items())}
    headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Page(html.encode(), headers)

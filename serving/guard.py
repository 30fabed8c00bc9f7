"""Who may talk to a server: the name it is called by, the page a request comes from, the key."""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from serving.api_requests import ApiError

OPEN_PATHS = ("/health", "/")  # without a key
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable], Callable[[Any], Awaitable]], Awaitable[None]]


@dataclass
class Guard:
    """An ASGI application around another one, which lets no request through that should not come in.

    A page of another site can let a browser send requests here, under a name of its own that it points at this machine
    (DNS rebinding). So a request has to name an IP address, localhost or one of `hosts` in its header Host, and a
    request of a page (header Origin) has to come from here or from one of `origins`.
    """

    app: App
    api_key: str | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http":
            try:
                self.check(scope)
            except ApiError as error:
                return await send_error(send, error)
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raise ApiError for a request that may not come in."""
        headers = {name: value.decode("latin1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self.is_known(host_name(host)):
            raise ApiError(403, f"this server is not called {host_name(host)!r}: add the name to --hosts", code="host")
        if origin is not None and not self.may_ask(origin, host):
            message = f"pages of {origin} may not use this server: add the origin to --cors_origins"
            raise ApiError(403, message, code="origin")
        if self.api_key is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode("latin1"), self.api_key.encode()):
                message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")

    def is_known(self, name: str) -> bool:
        """Return whether a name in the header Host is one of this server; "" where there is no such header."""
        if name in ("", "localhost", *self.hosts):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def may_ask(self, origin: str, host: str) -> bool:
        """Return whether a page of `origin` may send requests."""
        return origin in self.origins or "*" in self.origins or urlsplit(origin).netloc == host


def host_name(host: str) -> str:
    """Return the name in a header Host, in lower case, without port and brackets; an unreadable one as it is."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return host


async def send_error(send: Callable, error: ApiError) -> None:
    """Answer a request with an error."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

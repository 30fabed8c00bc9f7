"""Connections of the HTTP server: uvicorn's, except for what is no HTTP and for clients that say nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.api_requests import ApiError

SECONDS_FOR_REQUEST = 60.0  # from the beginning of a connection to the end of its first request's head
SECONDS_TO_READ = 2.0  # for an error, before the connection is closed


class Connection(H11Protocol):
    """One connection of a client."""

    refused = False  # nothing more is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if getattr(self.server_state, "closing", False):  # accepted just before the end: uvicorn would wait for it
            self.shutdown()
        else:
            self.loop.call_later(SECONDS_FOR_REQUEST, self.close_silent)

    def close_silent(self) -> None:
        """End the connection where no request has come."""
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with an error of the API, unless an answer is under way; then end the connection."""
        self.refused = True
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.close()
        error = JSONResponse(ApiError(400, msg).body, 400, {"connection": "close"})
        start = h11.Response(status_code=400, headers=error.raw_headers, reason=b"Bad Request")
        for event in (start, h11.Data(data=error.body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        # to close while bytes wait to be read would make the system throw the answer away
        self.transport.write_eof()
        self.loop.call_later(SECONDS_TO_READ, self.transport.close)


class Server(uvicorn.Server):
    """A server for one application; `options` are uvicorn's."""

    def __init__(self, app: Any, **options: Any) -> None:
        fixed = {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False, "ws": "none"}
        super().__init__(uvicorn.Config(app, http=Connection, **fixed, **options))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.closing = True  # type: ignore[attr-defined]
        await super().shutdown(sockets)

"""The HTTP server: OpenAI's API over the engine, with FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from serving.api_reply import ChatReply, CompletionReply, Reply
from serving.api_requests import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    plain_message,
    read_body,
)
from serving.guard import Guard
from serving.page import read_page
from serving.service import Service
from serving.terminal import read_examples

MOST_BODY = 16 << 20  # bytes of a request
SECONDS_FOR_BODY = 60.0


def make_app(
    services: Sequence[Service],
    api_key: str | None = None,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
) -> FastAPI:
    """Return the application; it starts the engines, and ends them when all requests are answered.

    services: models of different names, which share their metrics; a request that names none is for the first.

    api_key: what a client has to send (None: nothing). hosts, origins: see `Guard`; pages of the origins may read the
    answers, too (CORS).
    """

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        for service in services:
            service.engine.start(asyncio.get_running_loop())
        yield
        for service in services:
            await asyncio.to_thread(service.engine.close)

    app = FastAPI(lifespan=life, openapi_url=None)
    app.state.services = {service.name: service for service in services}
    for path, method, function in ROUTES:
        app.add_api_route(path, function, methods=[method])
    for kind, handler in {ApiError: tell_error, HTTPException: tell_status, Exception: tell_mistake}.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Guard, api_key=api_key, hosts=hosts, origins=origins)
    if origins:
        headers = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), **headers)
    return app


def services_of(request: Request) -> list[Service]:
    return list(request.app.state.services.values())


def service_of(request: Request, name: str | None) -> Service:
    """Return the model that a request names, the first where it names none. Raises ApiError for an unknown name."""
    found = request.app.state.services.get(name) if name else services_of(request)[0]
    if found is None:
        names = ", ".join(request.app.state.services)
        raise ApiError(404, f"there is no model {name!r} here: there is {names}", "model", "model_not_found")
    return found


async def body_of(request: Request) -> bytes:
    """Return the body of a request. Raises ApiError where it is too large, or does not come."""
    too_large = ApiError(413, f"the body of a request has at most {MOST_BODY >> 20} MB", code="too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MOST_BODY:
        raise too_large
    raw = bytearray()

    async def read() -> None:
        async for part in request.stream():
            raw.extend(part)
            if len(raw) > MOST_BODY:
                raise too_large

    try:
        await asyncio.wait_for(read(), SECONDS_FOR_BODY)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body of the request did not come within {SECONDS_FOR_BODY:.0f} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away before the end of its request") from None
    return bytes(raw)


async def answer(request: Request, kind: type, reply: type[Reply], choices: Callable[[Service, Any], list]) -> Response:
    """Read a request, put its jobs into the queue, and return the response that waits for them."""
    came, raw = time.monotonic(), await body_of(request)

    def prepare() -> Reply:
        body = read_body(kind, raw)
        service = service_of(request, body.model)
        return reply(service, body, choices(service, body), request.url.path)

    # in a thread: a long prompt is encoded for a while, and nobody else should wait for it
    made = await asyncio.to_thread(prepare) if len(raw) > 10_000 else prepare()
    for choice in made.choices:
        choice.job.times["came"] = came
    made.submit()
    return made


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions"""
    return await answer(request, ChatRequest, ChatReply, Service.chat)


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    return await answer(request, CompletionRequest, CompletionReply, Service.completion)


def model_card(service: Service) -> dict[str, Any]:
    """Return what OpenAI's API tells of a model, and what the page needs besides."""
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "little-llama"}
    assistant = service.assistant
    more = {"has_template": assistant.template is not None, "sampling": vars(service.defaults)}
    return card | {"max_model_len": service.context} | more | {"examples": read_examples(assistant)}


async def models(request: Request) -> Response:
    """GET /v1/models"""
    return JSONResponse({"object": "list", "data": [model_card(service) for service in services_of(request)]})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME"""
    return JSONResponse(model_card(service_of(request, request.path_params["name"])))


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings"""
    raise ApiError(400, "embeddings are not offered: this model writes texts; use one that is made for embeddings")


async def tokenize(request: Request) -> Response:
    """POST /tokenize"""
    body = read_body(TokenizeRequest, await body_of(request))
    service = service_of(request, body.model)
    text = body.prompt if body.prompt is not None else body.content
    if body.messages is not None:
        ids = service.prompt_of([plain_message(i, message) for i, message in enumerate(body.messages)])
    elif text is not None:
        ids = service.encode(text, body.add_special_tokens is False)
    else:
        raise ApiError(400, "prompt is missing: give a text as prompt, or a conversation as messages", "prompt")
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.context})


async def detokenize(request: Request) -> Response:
    """POST /detokenize"""
    body = read_body(DetokenizeRequest, await body_of(request))
    tokenizer = service_of(request, body.model).assistant.tokenizer
    wrong = next((id for id in body.tokens if id >= tokenizer.vocab_size), None)
    if wrong is not None:
        message = f"tokens: the vocabulary has ids 0..{tokenizer.vocab_size - 1}, found {wrong}"
        raise ApiError(400, message, "tokens")
    text = tokenizer.decode(body.tokens, skip_special=False)
    return JSONResponse({"prompt": text, "content": text})


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info: special tokens under the keys of tokenizer_config.json, and the chat template."""
    service = service_of(request, request.query_params.get("model"))
    assistant = service.assistant
    tokenizer, template = assistant.tokenizer, assistant.template
    info = {"vocab_size": tokenizer.vocab_size, "model_max_length": service.context}
    info |= {"add_bos_token": bool(tokenizer.begins), "chat_template": template and template.jinja}
    return JSONResponse(tokenizer.special_names() | info)


async def health(request: Request) -> Response:
    """GET /health"""
    well = all(service.engine.alive for service in services_of(request))
    return JSONResponse({"status": "ok" if well else "the engine has ended"}, 200 if well else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    engines = [service.engine for service in services_of(request)]
    now = {"requests_running": sum(engine.running for engine in engines)}
    now |= {"requests_waiting": sum(engine.waiting for engine in engines)}
    text = services_of(request)[0].metrics.text(**now, rows=sum(engine.rows.n for engine in engines))
    return PlainTextResponse(text)


async def root(request: Request) -> Response:
    """GET /: the page to chat on."""
    page = read_page()
    return HTMLResponse(page.html, headers=page.headers)


async def tell_error(request: Request, error: Exception) -> Response:
    """Answer with an error of ours."""
    assert isinstance(error, ApiError)
    services_of(request)[0].metrics.requests[known_path(request), error.status] += 1
    return JSONResponse(error.body, error.status, error.headers)


async def tell_status(request: Request, error: Exception) -> Response:
    """Answer with an error of the framework: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    messages = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    message = messages.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers)


async def tell_mistake(request: Request, error: Exception) -> Response:
    """Answer with a mistake of the server, whose traceback is on stderr."""
    return JSONResponse(ApiError(500, f"a mistake of the server: {type(error).__name__}").body, 500)


def known_path(request: Request) -> str:
    """Return the path of a request where it is one of ours, else "other": metrics keep no path of a stranger."""
    route = request.scope.get("route")
    return getattr(route, "path", "other")


ROUTES: tuple[tuple[str, str, Callable], ...] = (
    ("/v1/chat/completions", "POST", chat),
    ("/v1/completions", "POST", completions),
    ("/v1/models", "GET", models),
    ("/v1/models/{name:path}", "GET", model),
    ("/v1/embeddings", "POST", embeddings),
    ("/tokenize", "POST", tokenize),
    ("/detokenize", "POST", detokenize),
    ("/tokenizer_info", "GET", tokenizer_info),
    ("/health", "GET", health),
    ("/metrics", "GET", metrics),
    ("/", "GET", root),
)

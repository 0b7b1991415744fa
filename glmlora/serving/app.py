"""The endpoints, over FastAPI: checks of who asks and how much, and the forms of responses."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.resources import files
from itertools import accumulate
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .requests import Asked, Refused, Server, failed
from .schema import (
    ChatRequest,
    ClassifyRequest,
    ClassifyResponse,
    CompletionRequest,
    Failure,
    Health,
    ModelCard,
    ModelList,
)

LOG = logging.getLogger("glmlora.serving")
T = TypeVar("T")
BEARER = HTTPBearer(auto_error=False, description="An API key, where the server has some.")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "json": "application/json",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": about}
    for status, about in {
        400: "A field is wrong, or not supported",
        401: "No API key, or a wrong one",
        404: "No such model",
        408: "It took too long",
        413: "The body is too large",
        429: "Too many requests wait",
        500: "The model failed",
        503: "The server is ending",
    }.items()
}


class Limited:
    """In front of the app: bodies of at most so many bytes, read whole, else 413."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        too_long = stated.isdigit() and int(stated) > self.most
        body, read, more = bytearray(), 0, True
        # One who still sends would not see the answer: what is too long is read, too, and dropped.
        while more and read <= 4 * self.most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            read += len(message.get("body", b""))
            too_long = too_long or read > self.most
            body = body if too_long else body + message.get("body", b"")
            more = bool(message.get("more_body"))
        if too_long:
            error = Refused(413, f"the body is longer than {self.most} bytes", None, "too_large")
            response = JSONResponse(error.body(), 413, {"Connection": "close"})
            await response(scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            message, whole = whole, None
            return await receive() if message is None else message

        await self.app(scope, replay, send)


def _wrong(error: Any, body: Any) -> tuple[str, str]:
    """(field, what is wrong) of one of pydantic's errors: `messages[0].content`, without the names
    of alternatives that stand in its path.
    """
    field, at = "", body
    path = error["loc"][1:]
    for number, part in enumerate(path):
        if isinstance(at, list) and isinstance(part, int) and part < len(at):
            at, field = at[part], f"{field}[{part}]"
        elif isinstance(at, dict) and isinstance(part, str):
            last = number == len(path) - 1 and error["type"] in ("missing", "extra_forbidden")
            if part in at or last:
                at, field = at.get(part), f"{field}.{part}" if field else part
    said = error["msg"].replace("Input should be", "expected").replace("Input should", "should")
    if error["type"] == "extra_forbidden":
        said = "is not supported"
    elif error["type"] == "missing":
        said = "is missing"
    elif error["type"] == "json_invalid":
        said, field = f"expected JSON: {error.get('ctx', {}).get('error', said)}", ""
    else:
        said += f", got {error.get('input')!r:.60}"
    return field, said


def create_app(
    server: Server,
    keys: Sequence[str] = (),
    body_bytes: int = 4 << 20,
    log_prompts: bool = False,
) -> FastAPI:
    """The app. keys: API keys, any of which is asked for; (): none is. body_bytes: of a request."""
    app = FastAPI(
        title="glmlora",
        summary="GLM models and their adapters, as OpenAI's endpoints have it",
        docs_url=None,
        redoc_url=None,
    )
    engine = server.engine

    async def allowed(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
    ) -> None:
        given = credentials.credentials.encode() if credentials else b""
        if keys and not any([hmac.compare_digest(given, key.encode()) for key in keys]):
            raise Refused(401, "a valid API key is needed", None, "invalid_api_key")

    _errors(app)
    _page(app)
    guarded = {"dependencies": [Depends(allowed)], "responses": ERRORS}

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Any:
        """Whether the server takes requests."""
        status = "failed" if engine.failed else "draining" if engine.draining else "ok"
        state = Health(status=status, running=engine.running, waiting=engine.waiting)
        return JSONResponse(state.model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse, **_only(guarded, 401))
    async def metrics() -> str:
        """Counts and times in Prometheus' text format."""
        return engine.metrics.text(
            running=engine.running, waiting=engine.waiting, rows=engine.limits.rows
        )

    def card(name: str) -> ModelCard:
        kept = server.model(name)
        base, task = next(iter(engine.models)), kept.task
        return ModelCard(
            id=name,
            created=server.created,
            parent=None if name == base else base,
            adapters=[] if name != base else [n for n in engine.models if n != base],
            max_model_len=engine.limits.context,
            labels=[*map(str, task.answers)] if task is not None and task.labels else None,
            template=None if task is None else task.question,
        )

    @app.get("/v1/models", response_model=ModelList, **_only(guarded, 401))
    async def models() -> ModelList:
        """The base, then its adapters."""
        return ModelList(data=[card(name) for name in engine.models])

    @app.get("/v1/models/{model}", response_model=ModelCard, **_only(guarded, 401, 404))
    async def model(model: str) -> ModelCard:
        """One of them."""
        return card(model)

    @app.post("/v1/chat/completions", **_streams(guarded))
    async def chat(request: Request, body: ChatRequest) -> Response:
        """A conversation's next message, whole or, with `stream`, as it comes."""
        asked = await run_in_threadpool(server.chat, body, _caller(request))
        return await respond(request, body, [asked], "chat.completion")

    @app.post("/v1/completions", **_streams(guarded))
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """How a text goes on."""
        asked = await run_in_threadpool(server.complete, body, _caller(request))
        return await respond(request, body, asked, "text_completion")

    @app.post("/v1/classify", response_model=ClassifyResponse, **guarded)
    async def classify(request: Request, body: ClassifyRequest) -> Any:
        """The probability of each label as the answer to each input; nothing is drawn."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def end(found: Any) -> None:
            loop.call_soon_threadsafe(lambda: done.done() or done.set_result(found))

        labels, item = await run_in_threadpool(server.weigh, body, _caller(request), end)
        try:
            engine.submit(item)
        except RuntimeError as error:
            status = 503 if engine.draining or engine.failed else 429
            raise Refused(status, str(error), None, "queue_full", "server_error") from None
        request.state.log = {"model": body.model, "rows": len(body.input)}
        found = await _unless_gone(request, done, lambda: engine.cancel(item))
        if isinstance(found, Exception):
            raise failed(found)
        if isinstance(found, str):
            return Response(status_code=499)
        return server.classified(body, labels, item, found)

    async def respond(
        request: Request,
        body: ChatRequest | CompletionRequest,
        asked: list[Asked],
        kind: str,
    ) -> Response:
        begun: list[Asked] = []
        try:
            for one in asked:
                one.begin()
                begun.append(one)
        except Refused:
            for one in begun:
                one.cancel()
            raise
        request.state.log = {"model": body.model, "asked": asked}
        if log_prompts:
            request.state.log["request"] = body.model_dump(exclude_none=True, by_alias=True)
        form = Form(server, body, asked, kind)
        if body.stream:
            events = form.stream()
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        whole = asyncio.ensure_future(form.whole())
        found = await _unless_gone(request, whole, lambda: [one.cancel() for one in asked])
        return Response(status_code=499) if found is None else JSONResponse(found)

    app.add_middleware(Logged, server=server)
    app.add_middleware(Limited, most=body_bytes)
    _describe(app, bool(keys))
    return app


def _only(guarded: dict[str, Any], *statuses: int) -> dict[str, Any]:
    return {**guarded, "responses": {status: ERRORS[status] for status in statuses}}


def _streams(guarded: dict[str, Any]) -> dict[str, Any]:
    about = "Whole, or with `stream` as server-sent events"
    content = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    found = {200: {"description": about, "content": content}}
    return {**guarded, "responses": {**guarded["responses"], **found}}


def _caller(request: Request) -> str:
    """Who asks, for the fair queue: the API key, else the address."""
    key = request.headers.get("authorization")
    return key or (request.client.host if request.client else "")


async def _unless_gone(
    request: Request, result: asyncio.Future[T], cancel: Callable[[], object]
) -> T | None:
    """The result; None, with `cancel` called, where the caller goes away before it is there."""

    async def gone() -> None:
        while not (await request.receive())["type"] == "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({watch, result}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        cancel()
        result.cancel()
        return None
    finally:
        watch.cancel()


class Form:
    """Responses to chats and completions, whole or in chunks."""

    def __init__(
        self,
        server: Server,
        body: ChatRequest | CompletionRequest,
        asked: list[Asked],
        kind: str,
    ):
        self.tokenizer, self.body, self.asked = server.tokenizer, body, asked
        self.chat = isinstance(body, ChatRequest)
        self.kind = kind + ".chunk" if body.stream and self.chat else kind
        self.offsets: dict[int, int] = {}  # of a choice's next token in its text
        self.head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12),
            "object": self.kind,
            "created": int(time.time()),
            "model": body.model,
        }

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and answers."""
        each = [one.usage for one in self.asked]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        total: dict[str, Any] = {n: sum(getattr(u, n) for u in each) for n in names}
        cached = sum((u.prompt_tokens_details or {}).get("cached_tokens", 0) for u in each)
        return {**total, "prompt_tokens_details": {"cached_tokens": cached}}

    async def whole(self) -> dict[str, Any]:
        """The response."""
        choices = []
        for number, asked in enumerate(self.asked):
            n = len(asked.jobs)
            seen: list[list[Any]] = [[] for _ in range(n)]
            ends = [""] * n
            async for index, what in asked.events():
                if "logprobs" in what:
                    seen[index].append(what["logprobs"])
                ends[index] = what.get("end", ends[index])
            for index, answer in enumerate(asked.answers):
                choice: dict[str, Any] = {"index": number * n + index, "finish_reason": ends[index]}
                if self.chat:
                    calls = answer.tool_calls()
                    text = answer.content
                    message = {"role": "assistant", "content": None if calls else text}
                    if answer.thought:
                        message["reasoning_content"] = answer.thought
                    choice["message"] = {**message, **({"tool_calls": calls} if calls else {})}
                else:
                    choice["text"] = answer.content
                logprobs = self._logprobs(seen[index], number * n + index)
                choices.append({**choice, "logprobs": logprobs})
        return {**self.head, "choices": choices, "usage": self.usage}

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events."""
        counts = bool(self.body.stream_options and self.body.stream_options.include_usage)

        def chunk(choices: list[Any], **more: Any) -> bytes:
            found = {**self.head, "choices": choices, **more}
            if counts and "usage" not in more:
                found["usage"] = None
            return b"data: " + json.dumps(found, ensure_ascii=False).encode() + b"\n\n"

        try:
            for number, asked in enumerate(self.asked):
                n = len(asked.jobs)
                if self.chat:
                    for index in range(n):
                        delta = {"role": "assistant", "content": ""}
                        yield chunk([{"index": index, "delta": delta, "finish_reason": None}])
                async for index, what in asked.events():
                    place = number * n + index
                    for choice in self._parts(asked.answers[index], what, place):
                        yield chunk([{"index": place, **choice}])
            if counts:
                yield chunk([], usage=self.usage)
            yield b"data: [DONE]\n\n"
        except Refused as error:
            yield b"data: " + json.dumps(error.body(), ensure_ascii=False).encode() + b"\n\n"
        finally:
            for asked in self.asked:
                asked.cancel()

    def _parts(self, answer: Any, what: dict[str, Any], place: int) -> list[dict[str, Any]]:
        """The choices, at a place among them, of what came."""
        end, parts = what.get("end"), []
        logprobs = self._logprobs([what["logprobs"]], place) if "logprobs" in what else None
        if not self.chat:
            if text := what.get("content", ""):
                parts.append({"text": text, "finish_reason": None, "logprobs": logprobs})
            if end:
                parts.append({"text": "", "finish_reason": end, "logprobs": None})
            return parts
        delta = {name: what[name] for name in ("reasoning_content", "content") if name in what}
        if calls := answer.tool_calls() if end else None:
            delta = {"tool_calls": [{"index": 0, **calls[0]}]}
        if delta or logprobs:
            parts.append({"delta": delta, "finish_reason": None, "logprobs": logprobs})
        if end:
            parts.append({"delta": {}, "finish_reason": end, "logprobs": None})
        return parts

    def _logprobs(self, seen: list[Any], place: int) -> dict[str, Any] | None:
        if not seen:
            return None
        shown = [
            (self._token(token), value, [(self._token(i), v) for i, v in best])
            for token, value, best in seen
        ]
        if not self.chat:
            begun = self.offsets.get(place, 0)
            ends = list(accumulate((len(text) for text, _, _ in shown), initial=begun))
            self.offsets[place] = ends[-1]
            return {
                "tokens": [text for text, _, _ in shown],
                "token_logprobs": [value for _, value, _ in shown],
                "top_logprobs": [dict(best) for _, _, best in shown],
                "text_offset": ends[:-1],
            }

        def one(text: str, value: float) -> dict[str, Any]:
            value = max(value, -9999.0)  # JSON has no infinity; OpenAI's least
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            "content": [
                {**one(text, value), "top_logprobs": [one(*b) for b in best]}
                for text, value, best in shown
            ],
            "refusal": None,
        }

    def _token(self, token: int) -> str:
        return self.tokenizer.decode([token])


def _errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # Of what is wrong with each alternative, that which got furthest.
        found = [_wrong(one, error.body) for one in error.errors()]
        field, said = max(found, key=lambda one: len(one[0]))
        message = f"{field}: {said}" if field else f"the body: {said}"
        return JSONResponse(Refused(400, message, field or None).body(), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        found = Refused(error.status_code, f"{request.url.path}: {error.detail}")
        return JSONResponse(found.body(), error.status_code, error.headers)


def _page(app: FastAPI) -> None:
    """The static page, where the package has it."""
    folder = files("glmlora.serving").joinpath("page")
    headers = {
        "Content-Security-Policy": CSP,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    def serve(name: str) -> Response:
        found = folder.joinpath(name)
        kind = PAGE_TYPES.get(name.rpartition(".")[2])
        if kind is None or "/" in name or "\\" in name or not found.is_file():
            raise Refused(404, f"/page/{name}: there is no such file")
        return Response(found.read_bytes(), headers=headers, media_type=kind)

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return serve("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    def page(name: str) -> Response:
        return serve(name)


class Logged:
    """One line of JSON for every request, without what was asked unless the server logs prompts."""

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            self._tell(scope, status, time.monotonic() - begun)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        metrics = self.server.engine.metrics
        metrics.add("requests", path=path, status=status)
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "method": scope["method"],
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 1),
        }
        found = scope["state"].get("log", {})
        line |= {k: v for k, v in found.items() if k != "asked"}
        jobs = [job for asked in found.get("asked", ()) for job in asked.jobs]
        if jobs:
            metrics.observe("request_seconds", seconds)
            first = jobs[0]
            line["prompt_tokens"] = len(first.ids)
            line["cached_tokens"] = first.reused
            line["new_tokens"] = sum(j.request.index for j in jobs if j.request is not None)
            for name, when in (("queue_ms", first.placed), ("first_token_ms", first.first)):
                line[name] = None if when is None else round(1000 * (when - first.begun), 1)
        LOG.info(json.dumps(line, ensure_ascii=False))


def _describe(app: FastAPI, keys: bool) -> None:
    """`/openapi.json` as it is: what is wrong about a request is 400, not FastAPI's 422."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = make()
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if not keys:
                        operation.pop("security", None)
            for name in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(name, None)
            if not keys:
                found["components"].pop("securitySchemes", None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

"""The paths of the server, and what goes wrong on them."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from bitfold.errors import BitfoldError
from bitfold.serving.answers import Answer, event
from bitfold.serving.errors import ApiError, api_error
from bitfold.serving.job import Job, Piece
from bitfold.serving.metrics import CONTENT_TYPE, Metrics
from bitfold.serving.preparing import Preparer
from bitfold.serving.requests import NAMES, ChatRequest, CompletionRequest, read
from bitfold.serving.scheduler import Scheduler

_LOG = logging.getLogger("bitfold.serving")
_LETTERS = 64  # bytes of a request for each token of the context, at most
_SMALL = 1 << 20  # bytes that a request may always have

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


@dataclass
class Service:
    """What the paths work with.

    Args:
        name: of the model, as clients call it.
        tokenizer: of transformers.
        preparer: makes texts of requests.
        scheduler: runs them.
        metrics: counts.
        context: tokens of a text, prompt included.
        key: that clients must send; None: none.
        origins: of web pages that may ask; "*": any.
    """

    name: str
    tokenizer: Any
    preparer: Preparer
    scheduler: Scheduler
    metrics: Metrics
    context: int
    key: str | None = None
    origins: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))


def make_app(service: Service) -> FastAPI:
    """The application, for uvicorn."""
    app = FastAPI(title="bitfold", docs_url=None, redoc_url=None, openapi_url=None)
    paths = _Paths(service)
    for path, handler in (("/v1/chat/completions", paths.chat), ("/v1/completions", paths.completions)):
        app.add_api_route(path, handler, methods=["POST"])
    app.add_api_route("/v1/models", paths.models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", paths.model, methods=["GET"])
    app.add_api_route("/health", paths.health, methods=["GET"])
    app.add_api_route("/metrics", paths.metrics, methods=["GET"])
    if service.origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.origins), allow_methods=["*"], allow_headers=["*"]
        )

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    return app


class _Paths:
    """One method each."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # Tokenizers and templates of large requests take time; one at a time, beside the thread that answers.
        self._preparing = ThreadPoolExecutor(1, "bitfold-preparing")

    async def health(self) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> PlainTextResponse:
        return PlainTextResponse(self._service.metrics.exposition(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        async def answer(_: Request) -> Response:
            return JSONResponse({"object": "list", "data": [self._model()]})

        return await self._guarded(request, answer)

    async def model(self, request: Request, model: str) -> Response:
        async def answer(_: Request) -> Response:
            self._require_model(model)
            return JSONResponse(self._model())

        return await self._guarded(request, answer)

    async def chat(self, request: Request) -> Response:
        return await self._guarded(request, self._chat)

    async def completions(self, request: Request) -> Response:
        return await self._guarded(request, self._completions)

    async def _guarded(self, request: Request, handler: Handler) -> Response:
        """With the key asked for, errors in OpenAI's form, and counted."""
        try:
            self._require_origin(request)
            self._require_key(request)
            response = await handler(request)
        except Exception as error:
            found = api_error(error, NAMES)
            if not isinstance(error, (ApiError, BitfoldError)):
                _LOG.exception("a request failed")
            response = _refusal(found)
        self._service.metrics.answered(request.scope["route"].path, response.status_code)
        return response

    def _require_origin(self, request: Request) -> None:
        """Web pages of others must not use a server that listens on this machine."""
        origin, allowed = request.headers.get("origin"), self._service.origins
        if origin is not None and "*" not in allowed and origin not in allowed:
            raise ApiError(403, f"web pages of {origin[:200]} may not ask (--allow-origin)", code="origin_not_allowed")

    def _require_key(self, request: Request) -> None:
        key = self._service.key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    def _require_model(self, name: str) -> None:
        if name != self._service.name:
            message = f"The model `{name[:200]}` does not exist: this server has `{self._service.name}`."
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model(self) -> dict[str, Any]:
        more = {"owned_by": "bitfold", "max_model_len": self._service.context}
        return {"id": self._service.name, "object": "model", "created": self._service.created, **more}

    async def _body(self, request: Request) -> bytes:
        most, found = max(_SMALL, _LETTERS * self._service.context), bytearray()
        async for part in request.stream():
            found += part
            if len(found) > most:
                raise ApiError(413, f"the request is larger than {most} bytes", code="request_too_large")
        return bytes(found)

    async def _chat(self, request: Request) -> Response:
        asked: ChatRequest = read(ChatRequest, await self._body(request))
        self._require_model(asked.model)
        inbox = _Inbox(1)
        jobs = [await self._prepare(self._service.preparer.chat, asked, inbox.receiver(0))]
        return await self._answer(request, asked, jobs, inbox)

    async def _completions(self, request: Request) -> Response:
        asked: CompletionRequest = read(CompletionRequest, await self._body(request))
        self._require_model(asked.model)
        inbox = _Inbox(len(asked.prompts))
        receivers = [inbox.receiver(i) for i in range(len(asked.prompts))]
        jobs = await self._prepare(self._service.preparer.completions, asked, receivers)
        if not jobs:
            raise ApiError(400, "there is no prompt", param="prompt", code="invalid_value")
        return await self._answer(request, asked, jobs, inbox)

    async def _prepare(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work, *args)

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, jobs: Sequence[Job], inbox: _Inbox
    ) -> Response:
        answer = Answer(self._service.name, self._service.tokenizer, chat=isinstance(asked, ChatRequest))
        self._service.scheduler.submit(*jobs)
        if asked.stream:
            events = self._events(asked, answer, jobs, inbox)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        found: list[list[Piece]] = [[] for _ in jobs]
        gone = asyncio.ensure_future(_gone(request))
        try:
            async for index, piece in inbox.pieces(gone):
                if piece.error is not None:
                    raise piece.error
                found[index].append(piece)
        finally:
            gone.cancel()
            self._cancel(jobs)
        if any(not pieces or pieces[-1].finish is None for pieces in found):
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer.whole(jobs, found))

    async def _events(
        self, asked: ChatRequest | CompletionRequest, answer: Answer, jobs: Sequence[Job], inbox: _Inbox
    ) -> AsyncIterator[bytes]:
        sent = [0] * len(jobs)
        try:
            if isinstance(asked, ChatRequest):
                yield event(answer.first())
            async for index, piece in inbox.pieces():
                if piece.error is not None:
                    yield event(api_error(piece.error).to_dict())
                    return
                yield event(answer.piece(index, piece, sent[index]))
                sent[index] += len(piece.text)
            if asked.usage_wanted:
                yield event(answer.last(jobs))
            yield b"data: [DONE]\n\n"
        finally:  # also when the client has gone
            self._cancel(jobs)

    def _cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._service.scheduler.cancel(job)


class _Inbox:
    """Pieces of some texts, from the scheduler's thread to the one that answers."""

    def __init__(self, texts: int) -> None:
        self._open = texts
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def receiver(self, index: int) -> Callable[[Piece], None]:
        """For the pieces of one text."""

        def receive(piece: Piece) -> None:
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))
            except RuntimeError:
                _LOG.debug("the server has stopped before a text ended")

        return receive

    async def pieces(self, gone: asyncio.Future[None] | None = None) -> AsyncIterator[tuple[int, Piece]]:
        """As they come, until every text has ended, or `gone` is there."""
        while self._open:
            piece = asyncio.ensure_future(self._queue.get())
            waited: set[asyncio.Future[Any]] = {piece} if gone is None else {piece, gone}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                piece.cancel()
                return
            index, found = piece.result()
            self._open -= found.finish is not None or found.error is not None
            yield index, found


async def _gone(request: Request) -> None:
    """Ends when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(error.to_dict(), status_code=error.status, headers=headers)

"""The HTTP application: memories, and completions that read them."""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..memory.written import GradMemMemory
from ..template import Template, get_template
from .engine import Engine, Job, Piece, QueueFullError, Read, Recite, Write
from .invalid import invalid_body
from .limits import BodyLimit, HostLimit
from .prompts import chat_prompt, room_for_answer, text_prompt
from .schema import ChatCompletion, Completion, NewMemory, error_body
from .shelf import Shelf

_BUSY = "The server is busy: its queue is full. Try again in a moment."


def make_app(
    engine: Engine,
    shelf: Shelf,
    *,
    model_name: str,
    token: str | None = None,
    hosts: Sequence[str] = ("*",),
    max_body: int = 1 << 20,
    timeout: float = 300.0,
    max_new_tokens: int = 64,
) -> FastAPI:
    """The application around an engine and its memories. The engine is closed when the application ends.

    Args:
        engine: that answers.
        shelf: of memories.
        model_name: that requests name.
        token: that requests carry as a bearer token; none is asked for when `None`.
        hosts: names by which requests may call the server; a page in a browser could call it by another.
        max_body: most bytes of a request.
        timeout: seconds until a request is given up.
        max_new_tokens: of an answer, where a request does not say.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    known = [] if token is None else _token_bytes(token)

    async def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # as it was sent
        if known and not any(hmac.compare_digest(given, each) for each in known):
            raise HTTPException(401, "A bearer token is needed, in the header Authorization.")

    app = FastAPI(title="hf_gradmem", lifespan=lifespan, dependencies=[Depends(check_token)], openapi_url=None)
    app.add_middleware(BodyLimit, max_body=max_body)
    app.add_middleware(HostLimit, hosts=hosts)
    app.add_exception_handler(HTTPException, _tell_http_error)  # type: ignore[arg-type] # its own kind of exception
    app.add_exception_handler(RequestValidationError, _tell_invalid)  # type: ignore[arg-type] # likewise
    app.add_exception_handler(Exception, _tell_failure)
    served = _Served(engine, shelf, model_name, timeout, max_new_tokens)
    app.add_api_route("/health", served.health)
    app.add_api_route("/v1/models", served.models)
    app.add_api_route("/v1/memories", served.list_memories)
    app.add_api_route("/v1/memories", served.write, methods=["POST"], status_code=201)
    app.add_api_route("/v1/memories/{name:path}", served.describe)
    app.add_api_route("/v1/memories/{name:path}", served.delete, methods=["DELETE"])
    app.add_api_route("/v1/completions", served.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", served.chat, methods=["POST"], response_model=None)
    return app


def _token_bytes(token: str) -> list[bytes]:
    """The header with a token, as clients send it: in UTF-8, or in Latin-1 where that has all of its letters."""
    header = f"Bearer {token}"
    found = [header.encode("utf-8", "surrogateescape")]  # a variable of the environment may hold any bytes
    with contextlib.suppress(UnicodeEncodeError):
        found.append(header.encode("latin-1"))
    return found


async def _tell_http_error(_: Request, error: HTTPException) -> JSONResponse:
    kinds = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error", 504: "timeout_error"}
    kind = kinds.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
    return JSONResponse(error_body(error.detail, kind), error.status_code, headers=error.headers)


async def _tell_failure(_: Request, error: Exception) -> JSONResponse:
    """What nobody foresaw, such as a full disk: in the form of all errors, without what it says of this machine."""
    return JSONResponse(error_body(f"The server failed ({type(error).__name__}).", "server_error"), 500)


async def _tell_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse(invalid_body(error, request.headers.get("content-type")), 400)


class _Served:
    """What each route does."""

    def __init__(self, engine: Engine, shelf: Shelf, model_name: str, timeout: float, max_new_tokens: int) -> None:
        self.engine, self.shelf, self.model_name = engine, shelf, model_name
        self.timeout, self.max_new_tokens = timeout, max_new_tokens

    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "waiting": self.engine.num_waiting, "running": self.engine.num_running}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.model_name, "object": "model", "owned_by": "hf_gradmem"}]}

    async def list_memories(
        self, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> dict[str, Any]:
        ids = await asyncio.to_thread(self.shelf.ids)
        if after is not None and after not in ids:
            raise HTTPException(404, f"There is no memory {after!r}.")
        begin = 0 if after is None else ids.index(after) + 1
        shown = ids[begin : begin + limit]
        data = [{"id": name, "object": "memory"} for name in shown]
        return {"object": "list", "data": data, "has_more": begin + len(shown) < len(ids)}

    async def describe(self, name: str) -> dict[str, Any]:
        return _described(name, await self._memory(name))

    async def delete(self, name: str) -> dict[str, Any]:
        try:
            await asyncio.to_thread(self.shelf.delete, name)
        except KeyError:
            raise HTTPException(404, f"There is no memory {name!r}.") from None
        except ValueError as error:
            raise HTTPException(409, str(error)) from None
        return {"id": name, "object": "memory.deleted", "deleted": True}

    async def write(self, body: NewMemory, request: Request) -> dict[str, Any]:
        name = body.id if body.id is not None else f"memory-{uuid.uuid4().hex[:12]}"
        texts = [body.context] if isinstance(body.context, str) else body.context
        if not texts or not all(text.strip() for text in texts):
            raise HTTPException(400, "context: an empty text cannot be written.")
        for check, status in ((self.shelf.check_id, 400), (self.shelf.check_new, 409)):
            try:
                check(name)
            except ValueError as error:
                raise HTTPException(status, str(error)) from None
        async with self._pieces(lambda tell: Write(tell, body.context), request) as pieces:
            memory = (await anext(pieces)).memory
        assert memory is not None
        try:
            await asyncio.to_thread(self.shelf.add, name, memory)
        except ValueError as error:  # another request was faster
            raise HTTPException(409, str(error)) from None
        return _described(name, memory)

    async def complete(self, body: Completion, request: Request) -> Response | dict[str, Any]:
        async def prompt(_: GradMemMemory) -> list[int]:
            return await asyncio.to_thread(text_prompt, self.engine.model, body.prompt)

        return await self._continue(body, prompt, body.max_tokens, request, _COMPLETION)

    async def chat(self, body: ChatCompletion, request: Request) -> Response | dict[str, Any]:
        words = get_template(self.engine.model.config.template, self.engine.model.tokenizer)

        async def prompt(memory: GradMemMemory) -> list[int]:
            before = await self._recited(memory, request) if words.recites else None
            return await asyncio.to_thread(chat_prompt, self.engine.model, body.messages, before)

        return await self._continue(body, prompt, body.max_completion_tokens or body.max_tokens, request, _CHAT, words)

    async def _recited(self, memory: GradMemMemory, request: Request) -> str:
        async with self._pieces(lambda tell: Recite(tell, memory), request) as pieces:
            return "".join([piece.text async for piece in pieces])

    async def _memory(self, name: str) -> GradMemMemory:
        try:
            return await asyncio.to_thread(self.shelf.__getitem__, name)
        except KeyError:
            raise HTTPException(404, f"There is no memory {name!r}. GET /v1/memories lists them.") from None

    async def _continue(
        self,
        body: Completion | ChatCompletion,
        make_prompt: Callable[[GradMemMemory], Awaitable[list[int]]],
        most: int | None,
        request: Request,
        shape: "_Shape",
        words: Template | None = None,
    ) -> Response | dict[str, Any]:
        if body.model != self.model_name:
            raise HTTPException(404, f"There is no model {body.model!r} here, but {self.model_name!r}.")
        memory = await self._memory(body.memory)
        try:
            prompt = await make_prompt(memory)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

        most_new = int(min(most or self.max_new_tokens, room_for_answer(self.engine.model, prompt)))

        def job(tell: Any) -> Read:
            return Read(tell, memory, prompt, most_new, body.sampling, body.stops, words)

        facts = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model_name}
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.get("include_usage"))
            opened = contextlib.AsyncExitStack()
            pieces = await opened.enter_async_context(self._pieces(job, request))
            events = _events(opened, pieces, shape, facts, body.memory, len(prompt) if usage else None)
            return StreamingResponse(events, media_type="text/event-stream")
        text, last = "", Piece()
        async with self._pieces(job, request) as pieces:
            async for last in pieces:
                text += last.text
        choice = {"index": 0, "finish_reason": last.finish_reason, "logprobs": None} | shape.whole(text)
        usage_facts = _usage(len(prompt), last.num_tokens)
        return facts | {"object": shape.name, "choices": [choice], "usage": usage_facts} | _source(body.memory, last)

    @contextlib.asynccontextmanager
    async def _pieces(self, make_job: Any, request: Request) -> AsyncIterator[AsyncIterator[Piece]]:
        """Put a job into the queue; what it is told, until it ends, the time is over, or the client has gone."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        job: Job = make_job(lambda piece: loop.call_soon_threadsafe(queue.put_nowait, piece))
        try:
            self.engine.submit(job)  # type: ignore[arg-type] # one of the two kinds there are
        except QueueFullError:
            raise HTTPException(503, _BUSY, {"Retry-After": "1"}) from None
        if not hasattr(request.state, "until"):  # of all its jobs: a chat that recites first has two
            request.state.until = loop.time() + self.timeout
        try:
            yield _told(queue, request.state.until, request, self.timeout)
        finally:
            job.cancelled.set()


async def _told(queue: asyncio.Queue[Piece], until: float, request: Request, timeout: float) -> AsyncIterator[Piece]:
    while True:
        piece = await _next_piece(queue, until, request, timeout)
        if isinstance(piece.error, QueueFullError):
            raise HTTPException(503, "The server is stopping.")
        if isinstance(piece.error, ValueError):
            raise HTTPException(400, str(piece.error))
        if piece.error is not None:
            raise HTTPException(500, f"{type(piece.error).__name__}: {piece.error}")
        yield piece
        if piece.finish_reason is not None or piece.memory is not None:
            return


async def _next_piece(queue: asyncio.Queue[Piece], until: float, request: Request, timeout: float) -> Piece:
    loop = asyncio.get_running_loop()
    while True:
        left = until - loop.time()
        if left <= 0:
            raise HTTPException(504, f"This took more than {timeout:g} seconds.")
        try:
            return await asyncio.wait_for(queue.get(), min(left, 1.0))
        except TimeoutError:
            if await request.is_disconnected():
                raise HTTPException(499, "The client has gone.") from None


class _Shape:
    """How completions and chat completions differ in what they send."""

    def __init__(self, name: str, chunk: str, prefix: str, chat: bool) -> None:
        self.name, self.chunk, self.prefix, self.chat = name, chunk, prefix, chat

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}

    def part(self, text: str) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if text else {}} if self.chat else {"text": text}


_COMPLETION = _Shape("text_completion", "text_completion", "cmpl", chat=False)
_CHAT = _Shape("chat.completion", "chat.completion.chunk", "chatcmpl", chat=True)


async def _events(
    opened: contextlib.AsyncExitStack,
    pieces: AsyncIterator[Piece],
    shape: _Shape,
    facts: dict[str, Any],
    memory: str,
    prompt_tokens: int | None,
) -> AsyncIterator[str]:
    """A stream of server-sent events, of which the one that ends the answer names its memory, quote and confidence.

    An error after the first one is an event as well.
    """
    facts = facts | {"object": shape.chunk}
    async with opened:
        try:
            last = Piece()
            async for last in pieces:
                choice = {"index": 0, "finish_reason": last.finish_reason, "logprobs": None} | shape.part(last.text)
                source = _source(memory, last) if last.finish_reason else {}
                yield _event(facts | {"choices": [choice]} | source)
            if prompt_tokens is not None:
                yield _event(facts | {"choices": [], "usage": _usage(prompt_tokens, last.num_tokens)})
        except HTTPException as error:
            yield _event(error_body(error.detail, "server_error"))
        yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _source(memory: str, last: Piece) -> dict[str, Any]:
    """What an answer rests on: its memory, what it quotes from there, and how likely it is right."""
    return {"memory": memory, "quote": last.quote, "confidence": last.confidence}


def _usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _described(name: str, memory: GradMemMemory) -> dict[str, Any]:
    losses = memory.write_losses[0]
    return {
        "id": name,
        "object": "memory",
        "num_context_tokens": int(memory.num_context_tokens[0]),
        "num_memory_tokens": memory.embeddings.shape[1],
        "write_steps": len(losses),
        "write_losses": [float(loss) for loss in losses if loss == loss],  # NaN: it had stopped before
    }

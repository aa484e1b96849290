"""What is asked of every request: the most that it may hold, and by which names it may call the server."""

from collections.abc import Sequence
from typing import Any

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .schema import error_body


class BodyLimit:
    """Answers 413 where the body is longer than `max_body` bytes, counted as they arrive: a header need not be true."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        taken: list[Message] = []
        size = 0
        while True:
            message = await receive()
            taken.append(message)
            size += len(message.get("body", b""))
            if size > self.max_body:
                told = f"The body is longer than {self.max_body} bytes, which is the most that is taken."
                await JSONResponse(error_body(told, "invalid_request_error"), 413)(scope, receive, send)
                return
            if message["type"] != "http.request" or not message.get("more_body"):
                break

        async def again() -> Message:
            return taken.pop(0) if taken else await receive()

        await self.app(scope, again, send)


class HostLimit:
    """Answers 400 where the server is called by another name than `hosts`; Starlette's own does so in plain text."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, list(dict.fromkeys(hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every ASGI application."""
        known = False

        async def let_in(*_: Any) -> None:
            nonlocal known
            known = True

        async def drop(_: Message) -> None:
            """What Starlette would answer."""

        await TrustedHostMiddleware(let_in, self.hosts, www_redirect=False)(scope, receive, drop)
        told = f"The header Host names another server. This one is called by {', '.join(self.hosts)}."
        answer = self.app if known else JSONResponse(error_body(told, "invalid_request_error"), 400)
        await answer(scope, receive, send)

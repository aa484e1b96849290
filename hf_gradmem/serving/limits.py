"""The most that a request may hold, counted as it arrives: a length that a header claims need not be true."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .schema import error_body


class BodyLimit:
    """Answers 413 where the body is longer than `max_body` bytes."""

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

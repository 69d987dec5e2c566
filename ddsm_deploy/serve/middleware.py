"""What every request passes before and after the routes: lingering, observing, and the token.

They stand around the whole FastAPI application, so that its own answers (404, 405, a bug's 500, the docs) pass as well.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddsm_deploy.serve.metrics import Metrics

OPEN_PATH = "/healthz"
"""The only path that needs no token."""

ID_HEADER = "X-Request-ID"

_OTHER = "other"
_LINGER_SECONDS = 5.0


class Linger:
    """Where the answer comes before the whole request has, the rest is read and dropped for some seconds.

    Closing at once would make the kernel reset the connection, and a client that is still sending would lose the
    answer that says why. The answer is complete for the client as its length is known; then the connection is closed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

        async def receiving() -> Message:
            nonlocal complete
            message = await receive()
            complete = complete or message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if complete:
                await send(message)
            elif message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
                await send(message)
            elif message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                await self._drop_rest(receive)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self.app(scope, receiving, sending)

    async def _drop_rest(self, receive: Receive) -> None:
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return


class Observe:
    """Gives each request an id and its answer the time it took, and counts it.

    Args:
        app: what is inside.
        metrics: where it is counted.
        paths: those that have a label of their own; others could be any number.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.perf_counter()
        route = scope["path"] if scope["path"] in self.paths else _OTHER
        request_id = _request_id(Headers(scope=scope).get(ID_HEADER, ""))
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[ID_HEADER] = request_id
                headers.append("Server-Timing", f"total;dur={(time.perf_counter() - begun) * 1e3:.1f}")
            elif not message.get("more_body", False):
                self.metrics.seconds.labels(route).observe(time.perf_counter() - begun)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            self.metrics.requests.labels(route, str(status)).inc()


class Guard:
    """Lets nobody past without the token, to whatever path, but for `OPEN_PATH`."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.token is None or scope["path"] == OPEN_PATH or self._knows(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        detail = "a token is needed: Authorization: Bearer TOKEN"
        refusal = JSONResponse({"detail": detail}, 401, headers={"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        assert self.token is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # bytes, as compare_digest takes no text beyond ASCII; the time that it takes tells the length alone
        same = hmac.compare_digest(given.strip().encode(), self.token.encode())
        return same and scheme.lower() == "bearer"


def _request_id(given: str) -> str:
    """The client's own, where it is one that can be written into a log."""
    return given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex

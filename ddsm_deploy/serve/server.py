"""Listening, loading and shutting down: uvicorn, with our own signals and a time limit on a request's head."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.runtime.pipeline import calm_opencv
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.serve.app import ABORT, make_app
from ddsm_deploy.serve.limits import ServeOptions
from ddsm_deploy.serve.service import Service

CONNECTIONS = 1000
"""Open connections at most; uvicorn answers 503 to requests on further ones."""

_LINGER_SECONDS = 10.0

_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    # both warn of each malformed request, which would let anybody fill the log
    "loggers": {name: {"level": "ERROR"} for name in ("uvicorn", "python_multipart")},
}


def serve(open_model: Callable[[], Segmenter], options: ServeOptions, *, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C; then finishes the requests in hand.

    It listens before the model is loaded, so that a port in use is told at once, and /readyz tells the rest.

    Args:
        open_model: called once, in a thread; see `open_for_batch`.
        options: where to listen, and within which limits.
        say: called with one line when it listens (``listening at http://…``), and with one when the model is loaded.

    Raises:
        ConfigError: it can't listen there.
        DdsmError: the model can't be opened.
        KeyboardInterrupt: it was ended by Ctrl-C.
    """
    with contextlib.closing(_listen(options)) as listening, calm_opencv():
        last = asyncio.run(_run(open_model, options, listening, say))
    if last == signal.SIGINT:
        raise KeyboardInterrupt


async def _run(
    open_model: Callable[[], Segmenter], options: ServeOptions, listening: socket.socket, say: Callable[[str], None]
) -> signal.Signals | None:
    """Returns the signal that ended it."""
    service = Service(options.limits)
    server = _Server(_config(service, options), service)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop, number)
    say(f"listening at {_url(listening)}")
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        await asyncio.to_thread(lambda: service.begin(open_model()))
        running = service.segmenter
        say(f"ready: {running.spec.name} on {running.choice}; {options.limits.threads} threads")
        await serving
    finally:
        server.should_exit = True
        await serving
        await asyncio.to_thread(service.close)
    return server.stopped_by


class _Server(uvicorn.Server):
    """Without uvicorn's handling of signals, which ends the process by the signal itself in place of an exit code."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.stopped_by: signal.Signals | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self, number: signal.Signals) -> None:
        """The first signal drains; a further Ctrl-C waits for no client any more."""
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.service.draining = self.should_exit = True
        self.stopped_by = self.stopped_by or number


class _Protocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, on connections that may not take for ever to send a request's head."""

    def __init__(self, *, head_seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.head_seconds = head_seconds
        self.head_timer: asyncio.TimerHandle | None = None
        self.app_state = {**self.app_state, ABORT: lambda: self.transport.abort()}  # uvicorn copies it to each request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self.head_timer is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        # uvicorn's handler for idle connections closes this one as well
        self.head_timer = self.loop.call_later(self.head_seconds, self.timeout_keep_alive_handler)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None


def _config(service: Service, options: ServeOptions) -> uvicorn.Config:
    limits = options.limits
    settings: dict[str, Any] = {
        "http": functools.partial(_Protocol, head_seconds=limits.upload_seconds),
        "loop": "asyncio",
        "ws": "none",
        "lifespan": "off",
        "log_config": _LOGGING,
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        "limit_concurrency": CONNECTIONS,
        # upload, work and sending have limits of their own; past their sum a client has stalled
        "timeout_graceful_shutdown": int(limits.upload_seconds + 2 * limits.seconds + _LINGER_SECONDS),
    }
    return uvicorn.Config(make_app(service, token=options.token), **settings)


def _listen(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as exc:
        place = f"{options.host}, port {options.port}"
        raise ConfigError(f"can't listen at {place} ({exc.strerror or exc}); take another --host or --port") from exc


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""A real `ddsm serve` in a process of its own, and clients that behave and that don't."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

COMMAND = [sys.executable, "-m", "ddsm_deploy", "serve", "--backend", "onnxruntime"]
MAX_BYTES = 100_000
MAX_PIXELS = 200_000
"""Limits of the service that the fixture `server` starts."""

PATIENCE = 120.0
"""Seconds after which something that must happen counts as not happening; never reached where all is well."""


@dataclasses.dataclass
class Reply:
    """An answer, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]


class Server:
    """A running service."""

    def __init__(self, process: subprocess.Popen[str], port: int, said: str) -> None:
        self.process = process
        self.port = port
        self.said = said
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        """One request on a connection of its own; names of headers with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, named)
            return read_reply(connection.getresponse())

    def segment(self, body: bytes, query: str = "", **headers: str) -> Reply:
        return self.ask("POST", f"/v1/segment{query}", body, **{"content_type": "image/png", **headers})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def begin_upload(self, *, length: int, sent: bytes = b"", path: str = "/v1/segment") -> socket.socket:
        """A connection on which so many bytes of a body are announced, and some of them sent."""
        client = self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
        client.sendall(head.encode() + sent)
        return client

    def figure(self, name: str) -> float:
        """A figure of /metrics, 0 where it is not there; of those with labels, `name` holds them."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.ask("GET", "/metrics").body.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, name: str, value: float) -> None:
        wait_until(lambda: self.figure(name) == value, f"{name} to be {value}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def encoded(image: npt.NDArray[np.uint8]) -> bytes:
    """As PNG."""
    return cv2.imencode(".png", image)[1].tobytes()


def read_reply(response: http.client.HTTPResponse) -> Reply:
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def reply_on(client: socket.socket) -> Reply:
    """The answer that comes on a raw connection."""
    response = http.client.HTTPResponse(client, method="POST")
    response.begin()
    return read_reply(response)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def started(model: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """The command on a free port, once it says that it is ready; however it ends, nothing is left running."""
    with subprocess.Popen(
        [*COMMAND, "--model", str(model), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as process:
        assert process.stdout is not None
        try:
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("ready: "):
                    break
            port = re.search(r"^listening at http://\S+:(\d+)\n", said, re.MULTILINE)
            assert port is not None, said
            yield Server(process, int(port[1]), said)
        finally:
            process.kill()


@contextlib.contextmanager
def running(model: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """As `started`, for tests in which the service must be well to the end."""
    with started(model, *options, environment=environment) as server:
        yield server
        code = server.process.poll()
        assert code is None, f"the service ended with {code}"
        assert server.stop() == 0
        assert server.process.stdout is not None
        said = [line for line in server.process.stdout if not line.startswith("libpng ")]  # of damaged pictures
        assert not said, said  # neither a traceback nor anything else

"""The clients of `serve_load.py`: good ones, and those that a service meets in the open."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import statistics
import time
from collections import Counter
from typing import Any

MAX_BYTES = 2_000_000
UPLOAD_SECONDS = 2.0

MAY_GET = {
    "good": {"200", "503", "504"},
    "garbage": {"422", "503", "504"},
    "oversize": {"413", "503"},
    "chunked oversize": {"413", "408", "503"},
    "slow": {"408", "503"},
    "vanish": {"gone"},
}
SHARES = {"good": 70, "garbage": 8, "oversize": 4, "chunked oversize": 4, "slow": 6, "vanish": 8}


@dataclasses.dataclass
class Tally:
    """What the clients of one phase saw.

    Attributes:
        answers: how often, by kind of request and status; ``lost`` is a connection that broke before an answer.
        latencies: of good requests, seconds.
        seconds: how long the phase took.
        cpu: processor seconds of what was measured: the service, or the direct calls.
        client_cpu: those that the clients took from the service.
    """

    answers: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    latencies: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0
    client_cpu: float = 0.0

    def add(self, other: Tally) -> None:
        self.answers += other.answers
        self.latencies += other.latencies
        self.seconds += other.seconds
        self.cpu += other.cpu
        self.client_cpu += other.client_cpu

    def wrong(self) -> list[str]:
        return [f"{count} x {kind}: {got}" for (kind, got), count in self.answers.items() if got not in MAY_GET[kind]]

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds

    def to_json(self) -> dict[str, Any]:
        table: dict[str, dict[str, int]] = {}
        for (kind, got), count in sorted(self.answers.items()):
            table.setdefault(kind, {})[got] = count
        return {
            "seconds": self.seconds,
            "images_a_second": self.rate,
            "p50_ms": _percentile(self.latencies, 50),
            "p99_ms": _percentile(self.latencies, 99),
            "cpu_ms_an_image": self.cpu * 1e3 / max(len(self.latencies), 1),
            "answers": table,
            "client_cpu_seconds": self.client_cpu,
        }


class Client:
    """One connection, kept while the service keeps it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, data: bytes) -> None:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[str, dict[str, str]]:
        assert self.reader is not None
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return status.split()[1], headers

    def close(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
        self.reader = self.writer = None


def _head(length: int | None) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST /v1/segment HTTP/1.1\r\nHost: bench\r\nContent-Type: image/jpeg\r\n{size}\r\n\r\n".encode()


async def _request(kind: str, client: Client, image: bytes) -> tuple[str, dict[str, str]]:
    """Sends one request of a kind; returns the status and headers of its answer."""
    match kind:
        case "good":
            await client.send(_head(len(image)) + image)
        case "garbage":
            await client.send(_head(10_000) + random.randbytes(10_000))
        case "oversize":
            await client.send(_head(MAX_BYTES * 100) + bytes(100_000))
        case "chunked oversize":
            await client.send(_head(None))
            for _ in range(MAX_BYTES // 100_000 + 1):
                await client.send(b"186a0\r\n" + bytes(100_000) + b"\r\n")
        case "slow":
            client.close()
            await client.send(_head(len(image)) + image[:1000])
            trickle = asyncio.create_task(_trickle(client))
            try:
                return await client.answer()
            finally:
                trickle.cancel()
        case "vanish":
            await client.send(_head(len(image)) + image[: random.choice((len(image) // 2, len(image)))])
            await asyncio.sleep(random.uniform(0, 0.05))
            client.close()
            return "gone", {}
    return await client.answer()


async def _trickle(client: Client) -> None:
    with contextlib.suppress(OSError):
        while client.writer is not None:
            await asyncio.sleep(0.2)
            await client.send(b"x")


async def _one(port: int, images: list[bytes], shares: dict[str, int], end: float, tally: Tally) -> None:
    client = Client(port)
    kinds, weights = list(shares), list(shares.values())
    while time.perf_counter() < end:
        kind = random.choices(kinds, weights)[0]
        begun = time.perf_counter()
        try:
            status, headers = await _request(kind, client, random.choice(images))
        except (OSError, asyncio.IncompleteReadError):
            status, headers = "lost", {}
            client.close()
        if status == "200":
            tally.latencies.append(time.perf_counter() - begun)
        tally.answers[kind, status] += 1
        if status == "503":
            await asyncio.sleep(int(headers["retry-after"]) * random.uniform(0.5, 1.5))
    client.close()


async def run_clients(port: int, images: list[bytes], shares: dict[str, int], count: int, seconds: float) -> Tally:
    tally = Tally()
    begun, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(_one(port, images, shares, begun + seconds, tally))
    tally.seconds, tally.client_cpu = time.perf_counter() - begun, time.process_time() - cpu
    return tally


def _percentile(values: list[float], percent: int) -> float | None:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] * 1e3 if len(values) > 1 else None

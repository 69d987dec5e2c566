"""What the service does where there is too much of it all: full, slow, too late, gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, encoded, reply_on, running

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.serve.answers import Wanted, negotiate
from ddsm_deploy.serve.limits import Limits, ServeOptions, parse_bytes, read_token

HELD = 1000
"""Length of bodies that are announced and held back."""

GONE = 'ddsm_requests_total{route="/v1/segment",status="499"}'
INFERRED = "ddsm_inference_seconds_count"


@pytest.fixture(scope="module")
def narrow(colour_onnx: Path) -> Iterator[Server]:
    """One worker, one more place, and all the time in the world."""
    with running(colour_onnx, "--workers", "1", "--queue", "1", "--upload-timeout", "120") as service:
        yield service


@pytest.fixture(scope="module")
def hasty(colour_onnx: Path) -> Iterator[Server]:
    """A short time for uploads, and none for work."""
    with running(colour_onnx, "--upload-timeout", "2", "--timeout", "0.001") as service:
        yield service


@pytest.fixture(scope="module")
def long_work() -> bytes:
    """A picture that takes long to decode and to encode, and little to send."""
    return encoded(np.zeros((4900, 5000, 3), np.uint8))


def test_full(narrow: Server, picture: np.ndarray) -> None:
    """Places are taken before bodies are read, and free again once the clients have gone."""
    with narrow.begin_upload(length=HELD), narrow.begin_upload(length=HELD):
        narrow.wait_for("ddsm_in_flight", 2)
        reply = narrow.segment(encoded(picture))
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert "busy" in json.loads(reply.body)["detail"]
        assert narrow.ask("GET", "/healthz").status == narrow.ask("GET", "/readyz").status == 200
    narrow.wait_for("ddsm_in_flight", 0)
    assert narrow.segment(encoded(picture)).status == 200


def test_no_place_is_taken_by_what_the_head_rules_out(narrow: Server, picture: np.ndarray) -> None:
    with narrow.begin_upload(length=HELD), narrow.begin_upload(length=HELD):
        narrow.wait_for("ddsm_in_flight", 2)
        assert narrow.segment(encoded(picture), content_type="text/plain").status == 415
        with narrow.begin_upload(length=10**9) as client:
            assert reply_on(client).status == 413
    narrow.wait_for("ddsm_in_flight", 0)


def test_a_client_that_goes_while_it_uploads(narrow: Server) -> None:
    before = narrow.figure(GONE)
    narrow.begin_upload(length=HELD, sent=b"some of it").close()
    narrow.wait_for(GONE, before + 1)
    narrow.wait_for("ddsm_in_flight", 0)


def test_work_that_nobody_waits_for_is_not_begun(narrow: Server, long_work: bytes, picture: np.ndarray) -> None:
    """The second of two requests goes while the one worker has the first in hand."""
    gone, inferred = narrow.figure(GONE), narrow.figure(INFERRED)
    with narrow.begin_upload(length=len(long_work), path="/v1/segment?format=overlay") as first:
        second = narrow.begin_upload(length=len(encoded(picture)))
        narrow.wait_for("ddsm_in_flight", 2)
        first.sendall(long_work)
        second.sendall(encoded(picture))
        second.close()
        assert reply_on(first).status == 200
    narrow.wait_for(GONE, gone + 1)
    narrow.wait_for("ddsm_in_flight", 0)
    assert narrow.figure("ddsm_queue_depth") == 0
    assert narrow.figure(INFERRED) == inferred + 1


def test_slow_clients(hasty: Server) -> None:
    """Side by side, as each takes its time: a body that does not come, no head, half a head, and half a second head."""
    with contextlib.ExitStack() as stack:
        body, silent, half, kept = (stack.enter_context(hasty.connect()) for _ in range(4))
        body.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\na")
        half.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reply_on(kept).status == 200
        kept.sendall(b"GET /he")
        reply = reply_on(body)
        assert reply.status == 408
        assert "2 s" in json.loads(reply.body)["detail"]
        assert reply.headers["connection"] == "close"
        for client in (silent, half, kept):
            assert client.recv(1) == b""  # closed by the service, or this times out
    hasty.wait_for("ddsm_in_flight", 0)


def test_too_late(hasty: Server, long_work: bytes) -> None:
    """The place is kept until the thread has ended, and free then."""
    reply = hasty.segment(long_work)
    assert reply.status == 504
    assert "0.001 s" in json.loads(reply.body)["detail"]
    hasty.wait_for("ddsm_in_flight", 0)


def test_an_answer_that_is_not_taken() -> None:
    """It waits slice by slice, and not for ever: then the connection is cut."""
    from ddsm_deploy.serve.app import ABORT, Sliced

    sent: list[bytes] = []
    cut: list[bool] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body", b""))
        if len(sent) == 3:  # head, a slice, and one that nobody takes
            await asyncio.Event().wait()

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    answer = Sliced(bytes(10**6), "image/png", headers={}, seconds=0.05)
    asyncio.run(answer({"type": "http", "state": {ABORT: lambda: cut.append(True)}}, receive, send))
    assert cut == [True]
    assert 0 < len(sent[1]) < 10**5


def test_memory_holds_no_more_than_the_places(narrow: Server, missing) -> None:
    """A hundred clients that announce 10 MB each and send most of it: two of them have a place."""
    status = Path(f"/proc/{narrow.process.pid}/status")
    if not status.is_file():
        missing("procfs", "there is none here to read the memory from")

    def resident() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    before = resident()
    size, clients = 10_000_000, 100
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(narrow.begin_upload(length=size, sent=b"x" * (size - 1)))
        narrow.wait_for("ddsm_in_flight", 2)
        for _ in range(clients):
            client = stack.enter_context(narrow.begin_upload(length=size))
            client.settimeout(None)
            assert reply_on(client).status == 503
        assert resident() - before < 100_000_000  # the hundred would take 1000 MB


def test_negotiation() -> None:
    assert negotiate("") == "mask"
    assert negotiate("image/png;q=0, image/*") == "overlay"
    assert negotiate("application/json;q=0.2, image/png;q=0.1") == "json"
    assert negotiate("text/html") is None
    assert negotiate("image/png;q=nonsense, application/json") == "json"
    assert Wanted(format="overlay").media_type == "image/jpeg"


@pytest.mark.parametrize(
    ("text", "count"), [("20MB", 20_000_000), ("1.5 kB", 1500), ("2MiB", 2 << 20), ("77", 77), (" 1 gb ", 10**9)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1", "20 parsecs", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "wrong",
    [{"max_bytes": 0}, {"max_pixels": 0}, {"workers": 0}, {"queue": -1}, {"seconds": 0}, {"upload_seconds": -1}],
)
def test_limits_that_are_none(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDSM_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("DDSM_TOKEN", "of-the-environment")
    assert read_token(None) == "of-the-environment"
    (tmp_path / "token").write_text("of-the-file\n")
    assert read_token(tmp_path / "token") == "of-the-file"


@pytest.mark.parametrize("data", [b"", b"\n", b"two words", b"\xff\xfe", "tökén".encode()])
def test_what_is_no_token(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "token").write_bytes(data)
    with pytest.raises(ConfigError, match="token"):
        read_token(tmp_path / "token")


def test_no_file_with_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read_token(tmp_path / "none")


@pytest.mark.parametrize(
    ("host", "token", "is_open"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("192.168.1.7", None, True),
        ("robot.local", None, True),
        ("0.0.0.0", "secret", False),
    ],
)
def test_open_to_others(host: str, token: str | None, is_open: bool) -> None:
    assert ServeOptions(host=host, token=token).open_to_others is is_open

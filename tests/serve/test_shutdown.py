"""Starting and stopping: exit codes, what is in hand, and what can't start."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from serving import COMMAND, PATIENCE, Server, encoded, reply_on, started, wait_until

from ddsm_deploy import Segmenter


def refuses_connections(server: Server) -> bool:
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def test_sigterm_finishes_what_is_in_hand(colour_onnx: Path, picture: np.ndarray) -> None:
    """An upload that had begun is read to its end, segmented and answered, while nobody else is let in."""
    data = encoded(picture)
    with started(colour_onnx) as server, server.begin_upload(length=len(data), sent=data[:100]) as client:
        server.wait_for("ddsm_in_flight", 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses_connections(server), "the service to refuse connections")
        client.sendall(data[100:])
        reply = reply_on(client)
        assert server.process.wait(PATIENCE) == 0
    with Segmenter.open(colour_onnx, backend="onnxruntime") as segmenter:
        expected = segmenter.predict(picture).mask
    assert reply.status == 200
    assert np.array_equal(cv2.imdecode(np.frombuffer(reply.body, np.uint8), cv2.IMREAD_UNCHANGED), expected)


def test_ctrl_c_and_a_warning(colour_onnx: Path) -> None:
    with started(colour_onnx, "--host", "0.0.0.0") as server:
        assert "warning: 0.0.0.0 lets other machines in" in server.said
        assert server.stop(signal.SIGINT) == 130
        assert server.process.stdout is not None
        assert server.process.stdout.read() == "ddsm: interrupted\n"


def failed(*options: str) -> str:
    """The one line that a service that can't start ends with."""
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: ")
    return line


def test_a_port_in_use(colour_onnx: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in failed("--model", str(colour_onnx), "--port", port)


def test_no_such_model() -> None:
    """Told after the port is open, for loading takes time; the service ends all the same."""
    assert "no model 'nonesuch'" in failed("--model", "nonesuch", "--port", "0")


def ask(app: Any, path: str) -> tuple[int, dict[str, Any]]:
    """GET, without a server between."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [], "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("x", 80)}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


def test_readiness(colour_onnx: Path) -> None:
    """Not before the model is loaded, and not while it shuts down; alive all the time."""
    from ddsm_deploy.serve.app import make_app
    from ddsm_deploy.serve.limits import Limits
    from ddsm_deploy.serve.service import Service

    service = Service(Limits(workers=1))
    app = make_app(service)
    try:
        assert ask(app, "/readyz") == (503, {"detail": "the model is still being loaded"})
        assert ask(app, "/v1/model")[0] == 503
        service.begin(Segmenter.open(colour_onnx, backend="onnxruntime"))
        assert ask(app, "/readyz") == (200, {"ready": True})
        assert ask(app, "/v1/model")[0] == 200
        service.draining = True
        assert ask(app, "/readyz") == (503, {"detail": "shutting down"})
        assert ask(app, "/healthz") == (200, {"alive": True})
    finally:
        service.close()

"""With a token, nothing but /healthz is reached without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import Server, encoded, running

for module in ("fastapi", "prometheus_client", "python_multipart"):  # routes are listed while tests are collected
    pytest.importorskip(module, reason=f"{module}: it is not installed here")

from ddsm_deploy.serve.app import make_api  # noqa: E402
from ddsm_deploy.serve.limits import Limits  # noqa: E402
from ddsm_deploy.serve.service import Service  # noqa: E402

TOKEN = "s3cret-of-the-tests"
OPEN = "/healthz"


@pytest.fixture(scope="module")
def guarded(colour_onnx: Path) -> Iterator[Server]:
    with running(colour_onnx, "--host", "0.0.0.0", environment={"DDSM_TOKEN": TOKEN}) as service:
        assert "warning" not in service.said
        yield service


def routes() -> list[tuple[str, str]]:
    """Method and path of all there are, so that a new one is tested as well."""
    service = Service(Limits(workers=1))
    found = [
        (method, route.path)  # type: ignore[attr-defined]
        for route in make_api(service, needs_token=True).routes
        for method in sorted(getattr(route, "methods", None) or ["GET"])
    ]
    service.close()
    return found


def test_the_routes_are_those_that_we_know() -> None:
    assert {"/v1/segment", "/v1/model", OPEN, "/readyz", "/metrics", "/docs", "/openapi.json"} <= {
        p for _, p in routes()
    }


@pytest.mark.parametrize(
    ("method", "path"), [*routes(), ("GET", "/nowhere"), ("GET", f"{OPEN}/"), ("GET", f"{OPEN}/..")]
)
def test_without_the_token(guarded: Server, method: str, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer tök"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
    ):
        reply = guarded.ask(method, path, **headers)
        if path == OPEN:
            assert reply.status != 401
        else:
            assert reply.status == 401, headers
            assert reply.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or b"token" in reply.body


@pytest.mark.parametrize(("method", "path"), routes())
def test_with_the_token(guarded: Server, method: str, path: str) -> None:
    assert guarded.ask(method, path, authorization=f"Bearer {TOKEN}").status not in (401, 403)


def test_segmenting_with_the_token(guarded: Server, picture: np.ndarray) -> None:
    assert guarded.segment(encoded(picture)).status == 401
    assert guarded.segment(encoded(picture), authorization=f"bearer {TOKEN}").status == 200


def test_the_token_is_not_told(guarded: Server) -> None:
    for path in ("/openapi.json", "/metrics", "/v1/model", "/docs"):
        assert TOKEN.encode() not in guarded.ask("GET", path, authorization=f"Bearer {TOKEN}").body


def test_the_document_says_so(guarded: Server) -> None:
    document = json.loads(guarded.ask("GET", "/openapi.json", authorization=f"Bearer {TOKEN}").body)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([] if path == OPEN else [{"token": []}])
            assert ("401" in operation["responses"]) is (path != OPEN)

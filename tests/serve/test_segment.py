"""POST /v1/segment as a client meets it: every form of the answer, and every refusal of one request alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from serving import MAX_BYTES, MAX_PIXELS, Reply, Server, encoded, reply_on

from ddsm_deploy import Segmenter
from ddsm_deploy.runtime.outputs import geojson, overlay_jpeg
from ddsm_deploy.runtime.segmentation import Segmentation


@pytest.fixture(scope="module")
def expected(colour_onnx: Path, picture: np.ndarray) -> Iterator[Segmentation]:
    """What the same model says when it is called directly."""
    with Segmenter.open(colour_onnx, backend="onnxruntime") as segmenter:
        yield segmenter.predict(picture)


def pixels(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def refused(reply: Reply, status: int, *words: str) -> None:
    assert reply.status == status, reply
    assert reply.kind == "application/json"
    detail = json.loads(reply.body)["detail"]
    assert "\n" not in detail
    for word in words:
        assert word in detail


def form(name: str, data: bytes, *, filename: str | None = "x.png") -> tuple[bytes, str]:
    """A form with one part, and its content type."""
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--limit\r\nContent-Disposition: form-data; name="{name}"{file}\r\nContent-Type: image/png\r\n\r\n'
    return head.encode() + data + b"\r\n--limit--\r\n", "multipart/form-data; boundary=limit"


def test_the_mask_is_that_of_a_direct_call(server: Server, picture: np.ndarray, expected: Segmentation) -> None:
    reply = server.segment(encoded(picture))
    assert (reply.status, reply.kind) == (200, "image/png")
    assert np.array_equal(pixels(reply.body), expected.mask)
    assert len(np.unique(expected.mask)) == 3  # so that equal is not equally empty


def test_another_size_comes_back_at_that_size(server: Server, picture: np.ndarray, colour_onnx: Path) -> None:
    larger = cv2.resize(picture, (151, 99))
    with Segmenter.open(colour_onnx, backend="onnxruntime") as segmenter:
        mask = segmenter.predict(larger).mask
    assert np.array_equal(pixels(server.segment(encoded(larger)).body), mask)


def test_in_colour(server: Server, picture: np.ndarray, expected: Segmentation) -> None:
    reply = server.segment(encoded(picture), "?format=color")
    assert (reply.status, reply.kind) == (200, "image/png")
    assert np.array_equal(pixels(reply.body), expected.color())


def test_overlay(server: Server, picture: np.ndarray, expected: Segmentation) -> None:
    reply = server.segment(encoded(picture), "?format=overlay")
    assert (reply.status, reply.kind) == (200, "image/jpeg")
    assert np.array_equal(pixels(reply.body), pixels(overlay_jpeg(expected, picture)))


def test_json(server: Server, picture: np.ndarray, expected: Segmentation) -> None:
    reply = server.segment(encoded(picture), "?format=json")
    assert (reply.status, reply.kind) == (200, "application/json")
    found = json.loads(reply.body)
    assert (found["width"], found["height"], found["polygons"]) == (96, 64, None)
    assert [entry["name"] for entry in found["classes"]] == list(expected.classes)
    assert [tuple(entry["color"]) for entry in found["classes"]] == list(expected.palette)
    for entry in found["classes"]:
        assert entry["pixels"] == (expected.mask == entry["id"]).sum()
        assert entry["share"] == pytest.approx((expected.mask == entry["id"]).mean())
    assert found["mask"]["encoding"] == "png"
    assert np.array_equal(pixels(base64.b64decode(found["mask"]["data"])), expected.mask)


def test_json_with_run_lengths(server: Server, picture: np.ndarray, expected: Segmentation) -> None:
    found = json.loads(server.segment(encoded(picture), "?format=json&mask=rle").body)["mask"]
    assert (found["encoding"], found["size"]) == ("rle", [64, 96])
    mask = np.full((64, 96), 255, np.uint8)
    for region in found["regions"]:
        flat = np.repeat(np.arange(len(region["counts"])) % 2, region["counts"])
        mask[flat.reshape(96, 64).T == 1] = region["class_id"]
    assert np.array_equal(mask, expected.mask)


def test_json_with_outlines_alone(server: Server, picture: np.ndarray, expected: Segmentation) -> None:
    found = json.loads(server.segment(encoded(picture), "?format=json&mask=none&polygons=true").body)
    assert found["mask"] is None
    assert found["polygons"] == geojson(expected)
    assert found["polygons"]["features"]


def test_json_is_what_the_document_says(server: Server, picture: np.ndarray) -> None:
    from ddsm_deploy.serve.schema import SegmentResult

    for query in ("?format=json&polygons=true", "?format=json&mask=rle", "?format=json&mask=none"):
        SegmentResult.model_validate_json(server.segment(encoded(picture), query).body, strict=True)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("application/json", "application/json"),
        ("image/png;q=0.5, application/json", "application/json"),
        ("text/html, image/jpeg;q=0.1, */*;q=0", "image/jpeg"),
    ],
)
def test_the_accept_header_chooses(server: Server, picture: np.ndarray, accept: str, kind: str) -> None:
    reply = server.segment(encoded(picture), accept=accept)
    assert (reply.status, reply.kind) == (200, kind)


def test_the_query_wins_over_the_accept_header(server: Server, picture: np.ndarray) -> None:
    assert server.segment(encoded(picture), "?format=json", accept="image/png").kind == "application/json"


def test_a_form(server: Server, picture: np.ndarray, expected: Segmentation) -> None:
    body, content_type = form("file", encoded(picture))
    reply = server.segment(body, content_type=content_type)
    assert np.array_equal(pixels(reply.body), expected.mask)


def test_id_and_timing(server: Server, picture: np.ndarray) -> None:
    reply = server.segment(encoded(picture), x_request_id="frame-17")
    assert reply.headers["x-request-id"] == "frame-17"
    made = server.segment(encoded(picture), x_request_id="bad id\twith spaces").headers["x-request-id"]
    assert len(made) == 32
    assert server.ask("GET", "/nowhere").headers["x-request-id"] not in ("", made)


def test_the_timing_names_each_stage(server: Server, picture: np.ndarray) -> None:
    client = server.begin_upload(length=len(encoded(picture)), sent=encoded(picture))
    with client:
        text = client.recv(1 << 16).decode("latin-1")
    for stage in ("upload", "queue", "decode", "prepare", "infer", "finish", "encode", "total"):
        assert f"{stage};dur=" in text


def test_wrong_content_types(server: Server, picture: np.ndarray) -> None:
    refused(server.segment(encoded(picture), content_type="application/octet-stream"), 415, "octet-stream", "image/*")
    refused(server.segment(encoded(picture), content_encoding="gzip"), 415, "gzip")
    assert server.ask("POST", "/v1/segment", encoded(picture)).status == 415  # none at all


def test_what_is_no_image(server: Server, picture: np.ndarray) -> None:
    refused(server.segment(b"no image"), 422, "not an image")
    refused(server.segment(encoded(picture)[:-20]), 422, "truncated")
    refused(server.segment(b""), 422, "empty")


def test_forms_without_the_image(server: Server, picture: np.ndarray) -> None:
    for body, content_type in (
        form("picture", encoded(picture)),
        form("file", encoded(picture), filename=None),
        (b"garbage", "multipart/form-data; boundary=limit"),
        (form("file", encoded(picture))[0], "multipart/form-data"),
        (b"", "multipart/form-data; boundary=limit"),
    ):
        refused(server.segment(body, content_type=content_type), 422, "form")


def test_wrong_queries(server: Server, picture: np.ndarray) -> None:
    refused(server.segment(encoded(picture), "?format=gif"), 422, "format", "overlay")
    refused(server.segment(encoded(picture), "?polygons=perhaps"), 422, "polygons")
    refused(server.segment(encoded(picture), accept="text/html"), 406, "Accept")


def test_too_many_bytes_by_the_head(server: Server) -> None:
    with server.begin_upload(length=MAX_BYTES + 1) as client:  # not one byte of the body is sent
        refused(reply_on(client), 413, str(MAX_BYTES))


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.mark.parametrize("lie", ["", "Content-Length: 10\r\n"], ids=["no-length", "lying-length"])
def test_too_many_bytes_without_a_true_length(server: Server, lie: str) -> None:
    """Counted as they come, and refused while the client would still go on."""
    head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n{lie}Transfer-Encoding: chunked\r\n\r\n"
    with server.connect() as client:
        client.sendall(head.encode() + chunk(b"x" * (MAX_BYTES + 1)))
        refused(reply_on(client), 413, str(MAX_BYTES))


def test_a_length_that_is_too_short_cuts_the_image(server: Server, picture: np.ndarray) -> None:
    data = encoded(picture)
    with server.begin_upload(length=len(data) - 20, sent=data) as client:
        refused(reply_on(client), 422, "truncated")


def test_a_form_with_too_many_bytes(server: Server) -> None:
    body, content_type = form("file", b"x" * MAX_BYTES)
    refused(server.segment(body, content_type=content_type), 413, str(MAX_BYTES))


def test_a_client_that_sends_all_first_still_reads_the_refusal(server: Server) -> None:
    """Far more than the sockets' buffers hold: closing at once would reset the connection while it sends."""
    refused(server.segment(b"x" * 50_000_000), 413, str(MAX_BYTES))


def test_too_many_pixels(server: Server) -> None:
    bomb = encoded(np.zeros((MAX_PIXELS // 400 + 1, 400), np.uint8))
    assert len(bomb) < MAX_BYTES
    refused(server.segment(bomb), 413, f"{MAX_PIXELS} pixels")


def test_other_paths_and_methods(server: Server) -> None:
    refused(server.ask("GET", "/v2/segment"), 404)
    refused(server.ask("POST", "/v1/segment/", b"x", content_type="image/png"), 404)
    refused(server.ask("GET", "/v1/segment"), 405)


def test_the_model(server: Server, colour_onnx: Path) -> None:
    found = json.loads(server.ask("GET", "/v1/model").body)
    assert [entry["name"] for entry in found.pop("classes")] == ["red", "green", "blue"]
    assert found == {
        "name": "colours",
        "size": [64, 96],
        "sha256": hashlib.sha256(colour_onnx.read_bytes()).hexdigest(),
        "backend": "onnxruntime",
        "precision": "fp32",
        "sampling": found["sampling"],
        "fit": "stretch",
    }


def test_health_and_figures(server: Server, picture: np.ndarray) -> None:
    assert server.ask("GET", "/healthz").status == 200
    assert json.loads(server.ask("GET", "/readyz").body) == {"ready": True}
    counted, inferred = 'ddsm_requests_total{route="/v1/segment",status="200"}', "ddsm_inference_seconds_count"
    before = server.figure(counted), server.figure(inferred)
    assert server.segment(encoded(picture)).status == 200
    server.wait_for(counted, before[0] + 1)
    assert server.figure(inferred) == before[1] + 1
    server.wait_for("ddsm_in_flight", 0)
    assert server.figure("ddsm_queue_depth") == 0


def test_paths_that_are_no_routes_share_a_label(server: Server) -> None:
    counted = 'ddsm_requests_total{route="other",status="404"}'
    before = server.figure(counted)
    server.ask("GET", "/a/path/of/its/own")
    server.wait_for(counted, before + 1)
    assert b"/a/path" not in server.ask("GET", "/metrics").body

"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from ddsm_deploy.errors import DdsmError, ImageTooLarge, InputError
from ddsm_deploy.serve import schema
from ddsm_deploy.serve.answers import Format, MaskEncoding, Wanted, negotiate
from ddsm_deploy.serve.metrics import CONTENT_TYPE
from ddsm_deploy.serve.middleware import OPEN_PATH, Guard, Linger, Observe
from ddsm_deploy.serve.service import RETRY_SECONDS, Service, Visit
from ddsm_deploy.serve.upload import check_head, read_upload

_GONE = 499
"""Status of a request whose client went before its answer, as the metrics count it; nobody is there to receive it."""

_SLICE = 1 << 16

ABORT = "abort"
"""In a request's state, where the server puts it: cuts the connection. Closing it would wait for the client to read."""


def make_app(service: Service, *, token: str | None = None) -> ASGIApp:
    """The whole application: `make_api`, with what stands around it."""
    api = make_api(service, needs_token=token is not None)
    paths = [path for route in api.routes if isinstance(path := getattr(route, "path", None), str)]
    return Linger(Observe(Guard(api, token), service.metrics, paths))


def make_api(service: Service, *, needs_token: bool = False) -> FastAPI:
    """The routes and their OpenAPI document."""
    denied = schema.refusals(401) if needs_token else {}
    api = FastAPI(
        title="ddsm-deploy",
        version=version("ddsm-deploy"),
        summary="Semantic segmentation of images.",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    api.state.service = service
    add = api.add_api_route
    add("/v1/segment", segment, methods=["POST"], **_SEGMENT, responses={**_SEGMENT_RESPONSES, **denied})
    add("/v1/model", model, response_model=schema.Model, responses={**schema.refusals(503), **denied})
    add(OPEN_PATH, healthz, response_model=schema.Alive)
    add("/readyz", readyz, response_model=schema.Ready, responses={**schema.refusals(503), **denied})
    add("/metrics", metrics, response_class=_Plain, responses=denied)
    for kind, handle in ((DdsmError, _on_ddsm_error), (ClientDisconnect, _on_gone), (Exception, _on_bug)):
        api.add_exception_handler(kind, handle)
    api.add_exception_handler(RequestValidationError, _on_wrong_query)
    if needs_token:
        _declare_token(api)
    return api


class _Plain(Response):
    media_type = "text/plain"


class Sliced(Response):
    """A body handed over slice by slice, so that no more than one waits in memory for a client that reads slowly."""

    def __init__(self, body: bytes, media_type: str, *, headers: dict[str, str], seconds: float) -> None:
        super().__init__(headers={**headers, "Content-Length": str(len(body))}, media_type=media_type)
        self.whole = body
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                for start in range(0, max(len(self.whole), 1), _SLICE):
                    more = start + _SLICE < len(self.whole)
                    body = self.whole[start : start + _SLICE]
                    await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            if (abort := scope.get("state", {}).get(ABORT)) is not None:
                abort()
                await asyncio.sleep(0)  # until the server has noticed


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _admit(request: Request) -> AsyncIterator[Visit]:
    """A place, from before the body is read until the answer is sent."""
    service = _service(request)
    check_head(request, service.limits)
    visit = service.admit()
    try:
        yield visit
    finally:
        visit.leave()


async def segment(
    request: Request,
    visit: Annotated[Visit, Depends(_admit, scope="request")],
    format: Annotated[Format | None, Query(description="wins over the Accept header")] = None,
    mask: Annotated[MaskEncoding, Query(description="how JSON holds the mask")] = "png",
    polygons: Annotated[bool, Query(description="whether JSON holds outlines")] = False,
) -> Response:
    """Segments an image: a mask of its own size.

    Without `format`, the Accept header chooses: image/png the mask, image/jpeg the overlay, application/json all of it.
    """
    chosen = format or negotiate(", ".join(request.headers.getlist("accept")))
    if chosen is None:
        raise HTTPException(406, "the Accept header takes neither image/png nor image/jpeg nor application/json")
    wanted = Wanted(format=chosen, mask=mask, polygons=polygons)
    limits = _service(request).limits
    begun = time.perf_counter()
    data = await read_upload(request, limits)
    upload = (time.perf_counter() - begun) * 1e3
    answer = await visit.work(data, wanted, request.receive)
    stages = {"upload": upload, **answer.timings}
    headers = {"Server-Timing": ", ".join(f"{stage};dur={spent:.1f}" for stage, spent in stages.items())}
    return Sliced(answer.body, wanted.media_type, headers=headers, seconds=limits.seconds)


_SEGMENT: dict[str, Any] = {"response_class": Response, "openapi_extra": schema.SEGMENT_BODY}
_SEGMENT_RESPONSES = {**schema.SEGMENT_ANSWER, **schema.refusals(406, 408, 413, 415, 422, 500, 503, 504)}


async def model(request: Request) -> dict[str, Any]:
    """The model that runs: classes, palette, size, sha256, backend, precision, sampling."""
    return _service(request).describe()


async def healthz() -> dict[str, bool]:
    """Liveness: the process answers. The only route that needs no token."""
    return {"alive": True}


async def readyz(request: Request) -> dict[str, bool]:
    """Readiness: the model is loaded, and the service is not shutting down."""
    if not _service(request).ready:
        why = "shutting down" if _service(request).draining else "the model is still being loaded"
        raise HTTPException(503, why, headers={"Retry-After": str(RETRY_SECONDS)})
    return {"ready": True}


async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_service(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _on_ddsm_error(_: Request, exc: Exception) -> Response:
    status = 413 if isinstance(exc, ImageTooLarge) else 422 if isinstance(exc, InputError) else 500
    return JSONResponse({"detail": " ".join(str(exc).split())}, status)


def _on_gone(_: Request, exc: Exception) -> Response:
    return Response(status_code=_GONE)


def _on_bug(_: Request, exc: Exception) -> Response:
    """Its traceback goes to the log, not to the client."""
    return JSONResponse({"detail": "a bug in the service; its log has the traceback"}, 500)


def _on_wrong_query(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    texts = (f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
    return JSONResponse({"detail": "; ".join(texts)}, 422)


def _declare_token(api: FastAPI) -> None:
    """Says in the OpenAPI document that every path but one needs the token."""
    document = api.openapi()
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path == OPEN_PATH else [{"token": []}]

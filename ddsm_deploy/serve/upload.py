"""Reading a request's image: counted while it comes in, within a time, and nothing that its head already rules out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ddsm_deploy.serve.limits import Limits

FORM = "multipart/form-data"
FIELD = "file"
"""Name of the form's part that holds the image."""

_OTHER_FIELDS = 16


def check_head(request: Request, limits: Limits) -> None:
    """Refuses what the request's head shows to be none of ours: 415, or 413."""
    media_type = _media_type(request)
    if not media_type.startswith("image/") and media_type != FORM:
        found = media_type or "no content type"
        raise HTTPException(415, f"got {found}; expected an image's bytes as image/*, or {FORM} with a part {FIELD!r}")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise HTTPException(415, f"got a body coded as {coding}; send it as it is")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise _too_large(limits)


async def read_upload(request: Request, limits: Limits) -> bytes:
    """The image's bytes, of at most ``limits.max_bytes``.

    Raises:
        HTTPException: 413 too large, whatever its head says; 408 too slow; 422 a form without the image, or damaged.
        ClientDisconnect: the client has gone.
    """
    try:
        async with asyncio.timeout(limits.upload_seconds):
            if _media_type(request) == FORM:
                return await _file_of_form(request, limits)
            return b"".join([chunk async for chunk in _counted(request, limits)])
    except TimeoutError:
        raise HTTPException(408, f"the upload took longer than {limits.upload_seconds:g} s") from None


async def _counted(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limits.max_bytes:
            raise _too_large(limits)
        yield chunk


async def _file_of_form(request: Request, limits: Limits) -> bytes:
    parser = MultiPartParser(request.headers, _counted(request, limits), max_files=1, max_fields=_OTHER_FIELDS)
    parser.spool_max_size = limits.max_bytes + 1  # never to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as exc:  # starlette 0.49 lets the parser's own pass
        raise HTTPException(422, f"the form can't be read: {exc}") from exc
    part = form.get(FIELD)
    try:
        if not isinstance(part, UploadFile):
            raise HTTPException(422, f"the form has no part {FIELD!r} that is a file")
        return await part.read()
    finally:
        await form.close()


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(413, f"the body is larger than the limit of {limits.max_bytes} bytes")

"""What the OpenAPI document says about bodies and answers.

The models are for that document alone: answers are written in worker threads, and checking megabytes of them against a
model would hold up the event loop. The tests check that they agree.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from ddsm_deploy.serve.middleware import ID_HEADER
from ddsm_deploy.serve.upload import FIELD, FORM

Colour = tuple[int, int, int]


class Refusal(BaseModel):
    """Why there is no other answer."""

    detail: str = Field(description="what happened, and what to do")


class Ready(BaseModel):
    """The service takes requests."""

    ready: Literal[True]


class Alive(BaseModel):
    """The process answers."""

    alive: Literal[True]


class ModelClass(BaseModel):
    """One class of the model."""

    id: int = Field(description="the value of its pixels in a mask")
    name: str
    color: Colour = Field(description="red, green, blue; 0 to 255")


class Model(BaseModel):
    """The model that runs, and how."""

    name: str
    classes: list[ModelClass]
    size: tuple[int, int] | None = Field(description="height and width that the network runs at; null: the image's")
    sha256: str = Field(description="of the model's file")
    backend: str
    precision: str = Field(description="what its arithmetic really runs at")
    sampling: str = Field(description="how dynamic sampling really runs")
    fit: str = Field(description="how images are brought to the network's size")


class FoundClass(ModelClass):
    """One class of the model, and how much of the image it covers."""

    pixels: int
    share: float = Field(ge=0, le=1)


class PngMask(BaseModel):
    """The mask as PNG."""

    encoding: Literal["png"]
    data: str = Field(description="base64 of an 8-bit grey PNG; the pixel is the class id")


class Region(BaseModel):
    """Where one class is."""

    class_id: int
    counts: list[int] = Field(description="runs of other and own pixels in turn, down the columns, as COCO has it")


class RleMask(BaseModel):
    """The mask as run lengths, one entry for each class that is there."""

    encoding: Literal["rle"]
    size: tuple[int, int] = Field(description="height and width")
    regions: list[Region]


class Geometry(BaseModel):
    """Outline and holes."""

    type: Literal["Polygon"]
    coordinates: list[list[tuple[float, float]]] = Field(description="closed rings of x and y in pixels")


class Properties(BaseModel):
    """What a region is."""

    class_id: int
    name: str
    area: float = Field(description="in pixels, without its holes")


class Feature(BaseModel):
    """One connected region of one class."""

    type: Literal["Feature"]
    geometry: Geometry
    properties: Properties


class Polygons(BaseModel):
    """All regions of 16 pixels and more, as GeoJSON in pixel coordinates."""

    type: Literal["FeatureCollection"]
    width: int
    height: int
    features: list[Feature]


class SegmentResult(BaseModel):
    """What is in the image."""

    width: int
    height: int
    classes: list[FoundClass]
    mask: PngMask | RleMask | None
    polygons: Polygons | None


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {FIELD: {"type": "string", "format": "binary", "description": "the image's bytes"}},
        "required": [FIELD],
    }
}

SEGMENT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "an image of any usual kind; of several pages or frames the first is taken",
        "content": {"image/jpeg": _BINARY, "image/png": _BINARY, "image/*": _BINARY, FORM: _FORM},
    }
}

_HEADERS = {
    ID_HEADER: {"description": "the request's own, or one made for it", "schema": {"type": "string"}},
    "Server-Timing": {"description": "milliseconds of each stage", "schema": {"type": "string"}},
}
_REASONS = {
    401: "no token, or another one",
    406: "the Accept header takes nothing that there is",
    408: "the upload took too long",
    413: "too many bytes, or too many pixels",
    415: "neither an image nor a form",
    422: "not a readable image, a damaged form, or a wrong query",
    500: "the backend failed",
    503: "busy, still loading, or shutting down; Retry-After says when to come again",
    504: "not done in time",
}

SEGMENT_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the mask, in colours, over the image, or all about it",
        "model": SegmentResult,
        "content": {"image/png": _BINARY, "image/jpeg": _BINARY},
        "headers": _HEADERS,
    }
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers other than 200 that a route gives."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal, "description": _REASONS[status], "headers": dict(_HEADERS)} for status in statuses
    }
    if 503 in found:
        found[503]["headers"]["Retry-After"] = {"description": "seconds", "schema": {"type": "integer"}}
    return found

"""Where an engine's inputs and outputs lie in one block of memory, and which sizes they may have: arithmetic alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ddsm_deploy.enginefile import Profile
from ddsm_deploy.engines.base import TensorInfo
from ddsm_deploy.errors import InputError

ALIGNMENT = 256
"""Bytes: TensorRT asks that each tensor begins at a multiple of it."""

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One tensor's part of the block.

    Attributes:
        info: name, type and shape of the tensor.
        offset: of its first byte.
        capacity: bytes that it takes at its largest.
    """

    info: TensorInfo
    offset: int
    capacity: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole block: a place for each tensor, none overlapping another, each aligned.

    Attributes:
        places: tensor's name -> its place.
        total: bytes of the block.
    """

    places: Mapping[str, Place]
    total: int


def plan(tensors: Sequence[TensorInfo], largest: Mapping[str, Shape]) -> Plan:
    """Lays tensors out one behind the other.

    Args:
        tensors: inputs and outputs; a shape may have open axes.
        largest: largest shape of each.

    Raises:
        InputError: a largest shape is missing, or does not fit its tensor.
    """
    places, end = {}, 0
    for info in tensors:
        shape = largest.get(info.name)
        if shape is None or not _fits(shape, info.shape) or min(shape, default=1) < 1:
            raise InputError(
                f"the largest shape of {info} is {shape}; expected one of its own form, each axis at least 1"
            )
        capacity = byte_count(info, shape)
        places[info.name] = Place(info=info, offset=end, capacity=capacity)
        end += -(-capacity // ALIGNMENT) * ALIGNMENT
    return Plan(places=places, total=end)


def byte_count(info: TensorInfo, shape: Shape) -> int:
    """Bytes of a tensor at a shape without open axes."""
    return math.prod(shape) * info.dtype.itemsize


def check_sizes(info: TensorInfo, shape: Shape, profile: Profile | None) -> None:
    """Refuses a shape beyond what an engine was built for; of fixed axes `check_feeds` has seen that they fit.

    Raises:
        InputError: an axis is below or above the profile's limits.
    """
    if profile is None:
        return
    if not all(low <= size <= high for low, size, high in zip(profile.min, shape, profile.max, strict=True)):
        limits = "x".join(
            str(low) if low == high else f"({low} to {high})"
            for low, high in zip(profile.min, profile.max, strict=True)
        )
        raise InputError(
            f"input {info.name!r} is {'x'.join(map(str, shape))}; this engine was built for {limits}: "
            "build it with a wider --profile"
        )


def _fits(shape: Shape, form: Sequence[int | None]) -> bool:
    return len(shape) == len(form) and all(want in (None, got) for got, want in zip(shape, form, strict=True))

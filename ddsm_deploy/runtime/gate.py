"""The gate of the automatic choice: whether a candidate's masks are near enough to the float32 reference's.

A few frames must do, and not even of the user's camera, so the yardstick is the reference itself: how many pixels
change class when each pixel of the frame is off by up to `NOISE_LEVELS` of 255. On frames that a network knows they are
few; where its best two classes lie close together they are more, and so are those that rounding changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ddsm_deploy.engines import Engine
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.images import Image, Labels, read_image
from ddsm_deploy.parity import ParityBudget, ParityMeter, ParityResult
from ddsm_deploy.spec import ModelSpec

FLOAT_BUDGET = 1.0
INT8_BUDGET = 3.0
"""Most per cent of the pixels that may change class, on frames that the network knows."""

NOISE_LEVELS = 2
FLOAT_NOISE, INT8_NOISE = 1.0, 2.0
"""Where the noise changes many pixels, so many times that share is allowed instead."""

MAX_NOISE = 10.0
"""Per cent changed by the noise from which nothing can be judged: then only float32 passes."""

OWN_FRAMES = "the package's three drawn street scenes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames:
    """What candidates run on.

    Attributes:
        feeds: each uint8 1×H×W×3, of the network's size and in its channel order.
        digest: hex SHA-256 of the images as they were given; empty for the package's own.
        source: what they are, in words.
    """

    feeds: tuple[Image, ...]
    digest: str
    source: str


def frames_for(spec: ModelSpec, images: Sequence[Image] | None, size: tuple[int, int], *, source: str = "") -> Frames:
    """Readies frames for a model.

    Args:
        spec: gives the channel order.
        images: uint8 H×W×3, BGR, of any size; None for the package's own.
        size: height and width to bring them to.
        source: what they are, in words.

    Raises:
        ConfigError: there are none.
        InputError: one is no image.
    """
    digest = hashlib.sha256()
    own = images is None
    feeds = []
    for image in own_frames() if images is None else images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError("a frame to compare on is no image; expected numpy arrays, uint8 HxWx3 (BGR)")
        digest.update(repr(image.shape).encode() + image.tobytes())
        sized = cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=cv2.INTER_LINEAR)
        ordered = sized if spec.channel_order == "bgr" else cv2.cvtColor(sized, cv2.COLOR_BGR2RGB)
        feeds.append(ordered.astype(np.uint8, copy=False)[np.newaxis])
    if not feeds:
        raise ConfigError("no frame to compare on; give at least one, or None for the package's own")
    source = source or (OWN_FRAMES if own else f"{len(feeds)} frames of the caller's")
    return Frames(feeds=tuple(feeds), digest="" if own else digest.hexdigest(), source=source)


def own_frames() -> list[Image]:
    """The package's own frames: scenes 0 to 2 of ``examples/render_scenes.py``, 360×480."""
    return [read_image(path) for path in sorted((Path(__file__).parent / "frames").glob("*.jpg"))]


class Gate:
    """The reference's masks of all frames, and what they allow.

    Attributes:
        noise: per cent of the reference's pixels that change class when the frames are disturbed.

    Args:
        reference: computes in float32.
        frames: to compare on.
        spec: of the model.
    """

    def __init__(self, reference: Engine, frames: Frames, spec: ModelSpec) -> None:
        self.frames = frames
        self._classes = spec.classes
        self._masks = [_mask(reference, feed) for feed in frames.feeds]
        rng = np.random.default_rng(0)
        meter = ParityMeter(self._classes)
        for feed, mask in zip(frames.feeds, self._masks, strict=True):
            shift = rng.integers(-NOISE_LEVELS, NOISE_LEVELS + 1, feed.shape)
            disturbed = (feed.astype(np.int16) + shift).clip(0, 255).astype(np.uint8)
            meter.update(mask, _mask(reference, disturbed))
        self.noise = meter.result().changed

    def allowed(self, precision: str) -> float:
        """Most per cent of the pixels that may change class at a precision."""
        base, times = (INT8_BUDGET, INT8_NOISE) if "int8" in precision else (FLOAT_BUDGET, FLOAT_NOISE)
        return max(base, times * self.noise)

    def judge(self, engine: Engine, precision: str) -> ParityResult:
        """Runs a candidate on all frames and compares.

        Raises:
            BackendError: it does not run.
            InputError: it gives what is no mask of these classes.
        """
        meter = ParityMeter(self._classes)
        for feed, mask in zip(self.frames.feeds, self._masks, strict=True):
            meter.update(mask, _mask(engine, feed))
        return meter.result(ParityBudget(changed=self.allowed(precision)))

    def objection(self, result: ParityResult, precision: str) -> str:
        """Why a candidate is passed over; empty where it passes."""
        if precision != "fp32" and self.noise > MAX_NOISE:
            return (
                f"can't be judged: noise of {NOISE_LEVELS} levels alone changes {self.noise:.0f} % of the pixels of "
                f"{self.frames.source}"
            )
        return "; ".join(result.failures)


def _mask(engine: Engine, feed: Image) -> Labels:
    mask: Labels = engine.run({engine.inputs[0].name: feed})["mask"][0]
    return mask

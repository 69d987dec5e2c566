"""Frames to compare two graphs on have a shape that the engine admits."""

from __future__ import annotations

import numpy as np
import pytest

from ddsm_deploy.optimize.buildoptions import parse_profile
from ddsm_deploy.optimize.graphparity import frames_for
from ddsm_deploy.spec import ModelSpec

SPEC = ModelSpec(classes=("road", "sky"), height=64, width=96)


@pytest.mark.parametrize(
    ("profile", "shape"),
    [
        (None, (1, 64, 96, 3)),
        ("1x32x32:1x64x64:4x128x128", (1, 64, 96, 3)),  # the spec's size lies within, though it is not the best
        ("1x128x128:1x160x192:1x256x256", (1, 160, 192, 3)),
        ("1x32x32:1x48x64:1x64x64", (1, 48, 64, 3)),
        ("3x64x96:4x64x96:8x64x96", (3, 64, 96, 3)),
    ],
)
def test_frames_fit_the_profile(profile: str | None, shape: tuple[int, ...]) -> None:
    frames = frames_for(SPEC, [], None if profile is None else parse_profile(profile))
    assert {frame.shape for _, frame in frames} == {shape}
    assert len({frame.tobytes() for _, frame in frames}) == len(frames) > 1  # and are not the same frame
    assert all(np.array_equal(frame[0], frame[-1]) for _, frame in frames)

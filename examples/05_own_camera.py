"""Your own camera loop: frames as they come, the newest first, late ones dropped and counted.

    python examples/05_own_camera.py

The "camera" gives the example frames at 30 a second and never waits. A real one is `segmenter.stream("0")`, or
`segmenter.stream("rtsp://…")`; a driver of your own needs only a generator like this one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from ddsm_deploy import Segmenter, read_image

FRAMES = sorted((Path(__file__).parent / "frames").iterdir())
RATE, COUNT = 30, 60


def camera() -> Iterator:
    """Images (uint8, height × width × 3, BGR), each when it is due."""
    images = [read_image(path) for path in FRAMES]
    begin = time.monotonic()
    for index in range(COUNT):
        time.sleep(max(0.0, begin + index / RATE - time.monotonic()))
        yield images[index % len(images)]


def main() -> None:
    with Segmenter.open(backend="openvino") as segmenter, segmenter.stream(camera(), policy="latest") as flow:
        road = segmenter.spec.classes.index("road")
        for frame, result in flow:
            if frame.index % 10 == 0:
                print(f"frame {frame.index}: {(result.mask == road).mean():.0%} road")
        print(f"{flow.dropped} of {COUNT} frames dropped")


if __name__ == "__main__":
    main()

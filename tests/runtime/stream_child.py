"""A run of `segment_stream` in a process of its own, for tests that kill it. Arguments: model, source, output."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ddsm_deploy.runtime import recording
from ddsm_deploy.runtime.outputs import Products
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sinks.bag import BagSink
from ddsm_deploy.runtime.sinks.base import PARTS_FOLDER, Sink
from ddsm_deploy.runtime.sinks.files import FilesSink
from ddsm_deploy.runtime.sinks.lines import LinesSink
from ddsm_deploy.runtime.sinks.video import VideoSink
from ddsm_deploy.streams.bag import BagSource
from ddsm_deploy.streams.frames import Frame


class Slow(BagSource):
    """A recording that gives a hundred frames a second, so that there is time to kill who reads it."""

    def _frames(self, start: int) -> Iterator[Frame]:
        for frame in super()._frames(start):
            time.sleep(0.01)
            yield frame


def sinks(output: Path) -> dict[str, Sink]:
    """One of each kind that writes."""
    parts = output / PARTS_FOLDER
    return {
        "files": FilesSink(output, Products(color=True)),
        "lines": LinesSink(output / "frames.jsonl"),
        "bag": BagSink(output / "bag", parts / "bag"),
        "video": VideoSink(output / "overlay.mp4", parts / "video", rate=30),
    }


def main() -> None:
    """Runs it, with a commit after every few frames."""
    model, source, output = map(Path, sys.argv[1:])
    recording.COMMIT_SECONDS = 0.05
    with Segmenter.open(model, backend="onnxruntime", threads=1) as segmenter:
        options = recording.StreamOptions(output=output, workers=2)
        summary = recording.segment_stream(Slow(source), segmenter, sinks(output), options)
    print(summary.skipped, summary.done, summary.damaged)


if __name__ == "__main__":
    main()

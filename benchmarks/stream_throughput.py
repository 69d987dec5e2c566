"""End-to-end rate of a video, beside what the machine allows.

    python benchmarks/stream_throughput.py [--images DIR] [--frames 600] [--precision int8] [--rounds 3] [--json FILE]

Makes a video of the images (H.264, 360×480) and segments it to a video of overlays by `segment_stream`, as
`ddsm segment VIDEO --video --no-masks` does. Each stage is also run alone on the same frames: reading (decode to BGR),
working (predict and overlay), writing (H.264). No pipeline can be faster than the slowest stage alone (working: shared
by as many threads as there are cores), or than the summed CPU time of all stages over the cores: the larger of the two
is the limit, and the ratio is limit / measured. Rounds alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2

from ddsm_deploy.frames import images_in
from ddsm_deploy.images import read_image
from ddsm_deploy.runtime.pipeline import open_for_batch
from ddsm_deploy.runtime.recording import StreamOptions, segment_stream
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sinks.base import PARTS_FOLDER
from ddsm_deploy.runtime.sinks.video import VideoSink
from ddsm_deploy.streams.frames import Frame
from ddsm_deploy.streams.video import VideoSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path(__file__).parent.parent / "examples" / "frames")
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--model", default="ddsm-lite0")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    cv2.setNumThreads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_for_batch(args.model, backend=args.backend, precision=args.precision) as segmenter,
    ):
        video = Path(folder) / "in.mp4"
        make_video(video, args.images, args.frames)
        stages: dict[str, Callable[[], None]] = stages_of(video, segmenter, Path(folder))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in stages}
        for _ in range(args.rounds):
            for name, stage in stages.items():
                times[name].append(timed(stage))
    medians = {
        name: (statistics.median(wall for wall, _ in rows), statistics.median(cpu for _, cpu in rows))
        for name, rows in times.items()
    }
    alone = ("read", "work", "write")
    slowest = max(medians["read"][0], medians["work"][0] / cores, medians["write"][0])
    limit = max(slowest, sum(medians[name][1] for name in alone) / cores)
    whole = medians["whole"][0]
    result = {
        "load_before": load,
        "cores": cores,
        "frames": args.frames,
        "backend": segmenter.label,
        "seconds": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in medians.items()},
        "fps": args.frames / whole,
        "fps_allowed": args.frames / limit,
        "ratio": limit / whole,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def make_video(path: Path, images: Path, count: int) -> None:
    """H.264 at 30 frames a second, 360×480, of the images in turn."""
    sink = VideoSink(path, path.parent / "making")
    pictures = [cv2.resize(read_image(image), (480, 360)) for image in images_in(images)]
    for index in range(count):
        frame = Frame(index=index, stamp=round(index * 1e9 / 30), name="")
        sink.write(frame, pictures[index % len(pictures)])
    sink.commit()
    sink.finish()


def stages_of(video: Path, segmenter: Segmenter, folder: Path) -> dict[str, Callable[[], None]]:
    """What is timed: the whole, and each stage alone on frames held in memory."""
    source = VideoSource(video)
    frames = list(source.frames())
    source.close()
    overlays = [segmenter.predict(frame.image).overlay(frame.image) for frame in frames]  # type: ignore[arg-type]

    def whole() -> None:
        output = folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        sinks = {"video": VideoSink(output / "overlay.mp4", output / PARTS_FOLDER / "video", rate=30)}
        summary = segment_stream(VideoSource(video), segmenter, sinks, StreamOptions(output=output))
        assert summary.done == len(frames)

    def read() -> None:
        alone = VideoSource(video)
        for _ in alone.frames():
            pass
        alone.close()

    def work() -> None:
        for frame in frames:
            segmenter.predict(frame.image).overlay(frame.image)  # type: ignore[arg-type]

    def write() -> None:
        (folder / "written").mkdir(exist_ok=True)
        sink = VideoSink(folder / "written" / "overlay.mp4", folder / "written" / "parts", rate=30)
        for frame, overlay in zip(frames, overlays, strict=True):
            sink.write(frame, overlay)
        sink.commit()
        sink.finish()

    return {"whole": whole, "read": read, "work": work, "write": write}


def timed(stage: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds (all threads of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    stage()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()

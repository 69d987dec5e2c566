"""What `ddsm segment` does with a video, a recording, a camera or a network stream."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ddsm_deploy.runtime.outputs import Products
    from ddsm_deploy.runtime.recording import StreamSummary
    from ddsm_deploy.runtime.segmenter import Segmenter
    from ddsm_deploy.runtime.sinks.base import Sink
    from ddsm_deploy.streams.frames import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """Options of `ddsm segment` that are for streams alone, and those that it hands on."""

    topic: str | None
    policy: str | None
    masks: bool
    video: bool
    bag: bool
    lines: bool
    show: bool
    rerun: bool
    max_frames: int | None

    @property
    def only_for_streams(self) -> bool:
        """Whether one was given that makes a stream even of a folder of images."""
        return self.video or self.bag or self.lines or self.show or self.rerun

    @property
    def any(self) -> bool:
        """Whether one was given at all."""
        return bool(self.only_for_streams or self.policy or self.topic or self.max_frames or not self.masks)


def stream_of(words: list[str], wanted: Wanted, max_pixels: int) -> Source | None:
    """The stream that the words on the command line stand for, opened; None where they stand for images.

    Raises:
        ConfigError: a stream among other sources, or options that don't go together.
    """
    from ddsm_deploy.errors import ConfigError
    from ddsm_deploy.streams.sources import is_stream, open_source

    streams = [word for word in words if is_stream(word)]
    if streams and len(words) > 1:
        raise ConfigError(f"{streams[0]} is a stream, and {len(words)} sources were given; take one stream at a time")
    if streams or (wanted.only_for_streams and len(words) == 1):
        report = lambda line: print(line, file=sys.stderr)  # noqa: E731
        return open_source(words[0], topic=wanted.topic, report=report, max_pixels=max_pixels)
    if wanted.any and len(words) == 1:
        raise ConfigError(
            f"{words[0]}: images, which are a stream with --video, --bag, --jsonl, --show or --rerun alone"
        )
    if wanted.any:
        raise ConfigError("options of streams need one stream, or one folder, as the source")
    return None


def segment_one_stream(
    source: Source,
    wanted: Wanted,
    products: Products,
    *,
    output: Path,
    opened: dict[str, Any],
    threads: int | None,
    overwrite: bool,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Segments one stream and reports on it; the arguments are those of the command."""
    from ddsm_deploy.cli.render import write_json
    from ddsm_deploy.errors import ConfigError
    from ddsm_deploy.interrupt import first_interrupt_asks
    from ddsm_deploy.runtime.pipeline import open_for_batch
    from ddsm_deploy.runtime.recording import StreamOptions, segment_stream

    if products.polygons == "coco":
        raise ConfigError("--polygons coco is one file of all images, and a stream has no end; take geojson")
    options = StreamOptions(
        output=output, policy=wanted.policy, overwrite=overwrite, workers=threads, max_frames=wanted.max_frames
    )
    latest = wanted.policy == "latest" or (wanted.policy is None and source.live)
    with contextlib.ExitStack() as stack:
        stack.callback(source.close)
        # the newest frame as soon as can be, or as many frames as can be
        opening = _opened_for_latency(opened, threads) if latest else open_for_batch(workers=threads, **opened)
        segmenter = stack.enter_context(opening)
        sinks = _sinks(source, wanted, products, output)
        with first_interrupt_asks() as stop, _progress(quiet) as progress:
            summary = segment_stream(source, segmenter, sinks, options, progress=progress, stop=stop)
        ran = {key: getattr(segmenter, key) for key in ("backend", "precision", "sampling", "choice")}
    _print_damage(summary)
    if not quiet:
        print(_summary_line(summary, ran["choice"]), file=sys.stderr if json_file == "-" else sys.stdout)
    if json_file is not None:
        write_json(json_file, json.dumps({**summary.to_json(), **ran}, indent=2))
    if summary.interrupted:
        if not source.live:
            print("ddsm: interrupted; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130)


def _opened_for_latency(opened: dict[str, Any], threads: int | None) -> Segmenter:
    from ddsm_deploy.engines import EngineOptions
    from ddsm_deploy.runtime.segmenter import Segmenter

    names = ("precision", "outputs", "provider", "sampling")
    options = EngineOptions(threads=threads, **{name: opened[name] for name in names})
    rest = {name: opened[name] for name in ("backend", "fit", "fresh")}
    return Segmenter.open(opened["model"], options=options, **rest)


def _sinks(source: Source, wanted: Wanted, products: Products, output: Path) -> dict[str, Sink]:
    from ddsm_deploy.errors import ConfigError
    from ddsm_deploy.runtime.sinks.base import PARTS_FOLDER

    sinks: dict[str, Sink] = {}
    if wanted.masks:
        from ddsm_deploy.runtime.sinks.files import FilesSink

        sinks["files"] = FilesSink(output, products)
    if wanted.video:
        from ddsm_deploy.runtime.sinks.video import VideoSink

        sinks["video"] = VideoSink(output / "overlay.mp4", output / PARTS_FOLDER / "video", rate=source.rate)
    if wanted.bag:
        from ddsm_deploy.runtime.sinks.bag import BagSink

        sinks["bag"] = BagSink(output / "bag", output / PARTS_FOLDER / "bag")
    if wanted.lines:
        from ddsm_deploy.runtime.sinks.lines import LinesSink

        sinks["lines"] = LinesSink(output / "frames.jsonl")
    if wanted.show:
        from ddsm_deploy.runtime.sinks.window import WindowSink

        sinks["window"] = WindowSink(source.name)
    if wanted.rerun:
        from ddsm_deploy.runtime.sinks.rerun import RerunSink

        sinks["rerun"] = RerunSink(output / "rerun", name=f"{source.name} {output.resolve()}")
    if not sinks:
        raise ConfigError("nothing to write: --no-masks without --video, --bag, --jsonl, --show or --rerun")
    return sinks


def _print_damage(summary: StreamSummary) -> None:
    shown = 20
    for index, error in summary.failures[:shown]:
        print(f"damaged: frame {index}: {' '.join(error.split())}", file=sys.stderr)
    if summary.damaged > shown:
        print(f"damaged: {summary.damaged - shown} more frames", file=sys.stderr)


def _summary_line(summary: StreamSummary, choice: str) -> str:
    counts = f"{summary.done} done, {summary.damaged} damaged, {summary.dropped} dropped, {summary.skipped} before"
    return f"{summary.source}: {counts}; {summary.fps:.1f} FPS; results in {summary.output}; backend: {choice}"


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[StreamSummary], None] | None]:
    from ddsm_deploy.cli.progress import frames_bar

    with frames_bar(quiet) as show:
        if show is None:
            yield None
            return

        def report(summary: StreamSummary) -> None:
            notes = [f"{summary.fps:.1f} FPS"]
            notes += [f"{n} {word}" for word in ("damaged", "dropped") if (n := getattr(summary, word))]
            show(summary.skipped + summary.done + summary.damaged, summary.count, ", ".join(notes))

        yield report

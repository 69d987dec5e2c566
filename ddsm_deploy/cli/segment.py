"""`ddsm segment`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddsm_deploy.cli.options import Backend, Fit, Model, Precision, Provider, Sampling

if TYPE_CHECKING:
    from ddsm_deploy.runtime.pipeline import SegmentSummary

_LISTED = 20
"""Failures listed on the terminal; all are in the manifest and in ``--json``."""


def segment(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Images, folders (searched recursively) or globs; or one stream: a video, a recording (.mcap, .db3, "
            ".bag, a rosbag2 folder), a camera's number, an address (rtsp://, http://...), a GStreamer pipeline; with "
            "--engine ray also URIs (s3://, gs://, hdfs://...) of images.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the results; with ray also a URI.")],
    model: Model = "ddsm-lite0",
    backend: Backend = "auto",
    precision: Precision = None,
    sampling: Sampling = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="With auto: measure now, whatever was kept.")] = False,
    provider: Provider = "cpu",
    color: Annotated[bool, typer.Option("--color", help="Also write masks in colour.")] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write the image under the coloured mask.")] = False,
    confidence: Annotated[bool, typer.Option("--confidence", help="Also write the confidence of each pixel.")] = False,
    polygons: Annotated[str | None, typer.Option(help="Also write outlines: geojson or coco.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make anew what is there.")] = False,
    fit: Fit = "stretch",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames side by side (with ray: in each worker), one a core; of a live stream: cores."
        ),
    ] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse larger images.")] = 100_000_000,
    json_file: Annotated[str | None, typer.Option("--json", help="Write a summary; - is standard output.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print failures only.")] = False,
    masks: Annotated[
        bool, typer.Option(help="Of a stream: write masks/INDEX.png, and what else is asked for, frame by frame.")
    ] = True,
    video: Annotated[bool, typer.Option("--video", help="Write overlay.mp4, at the frames' own times.")] = False,
    bag: Annotated[bool, typer.Option("--bag", help="Write a rosbag2 (MCAP) with the masks and their stamps.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Write frames.jsonl: stamp and class shares.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Show the overlay in a window.")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Write rerun/*.rrd for the Rerun viewer.")] = False,
    topic: Annotated[str | None, typer.Option(help="Of a recording; the only image topic if left out.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Of a stream: every, or latest (drop what waits); latest if live.")
    ] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Of a stream: stop after so many frames.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: worker processes, here or on a cluster.")] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="With ray: processes, each with the model; one a machine, or by --threads."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="With ray: frames handed to a worker at once.", show_default="32")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With ray: a cluster to join, or auto; else one is started.")
    ] = None,
) -> None:
    """Segment images or a stream: masks with class ids, and more on request; run again to resume."""
    from ddsm_deploy.cli.onray import Spread, ray_run
    from ddsm_deploy.cli.render import write_json
    from ddsm_deploy.cli.stream import Wanted, segment_one_stream, stream_of
    from ddsm_deploy.interrupt import first_interrupt_asks
    from ddsm_deploy.runtime.outputs import Products
    from ddsm_deploy.runtime.pipeline import open_for_batch, segment_files
    from ddsm_deploy.runtime.worker import SegmentOptions

    products = Products(color=color, overlay=overlay, confidence=confidence, polygons=polygons)
    options = SegmentOptions(
        output=Path(output), products=products, overwrite=overwrite, workers=threads, max_pixels=max_pixels
    )
    opened: dict[str, Any] = {
        "model": model,
        "backend": backend,
        "precision": precision,
        "fit": fit,
        "outputs": ("mask", "confidence") if confidence else ("mask",),
        "provider": provider,
        "sampling": sampling,
        "fresh": fresh,
    }
    wanted = Wanted(
        topic=topic,
        policy=policy,
        masks=masks,
        video=video,
        bag=bag,
        lines=jsonl,
        show=show,
        rerun=rerun,
        max_frames=max_frames,
    )
    spread = Spread(engine=engine, workers=workers, batch=batch, address=address)
    spread.check(source, output, wanted)
    if engine == "local" and (one := stream_of(source, wanted, max_pixels)) is not None:
        segment_one_stream(
            one,
            wanted,
            products,
            output=options.output,
            opened=opened,
            threads=threads,
            overwrite=overwrite,
            json_file=json_file,
            quiet=quiet,
        )
        return
    run: Callable[..., SegmentSummary] = partial(segment_files, source, options=options)
    if engine == "ray":
        run = ray_run(spread, source, output, options)
    with open_for_batch(workers=threads, **opened) as segmenter:
        with first_interrupt_asks() as stop, _native_messages_apart() as native, _progress(quiet) as progress:
            summary = run(segmenter=segmenter, progress=progress, stop=stop)
        choice = segmenter.choice
        ran = {key: getattr(segmenter, key) for key in ("backend", "precision", "sampling", "choice")}
        facts = {**summary.to_json(), **ran}

    _print_failures(summary, native if engine == "local" else Counter())
    if not quiet:
        print(_summary_line(summary, choice), file=sys.stderr if json_file == "-" else sys.stdout)
    if json_file is not None:
        write_json(json_file, json.dumps(facts, indent=2))
    if summary.interrupted:
        raise typer.Exit(130)
    if summary.stopped or not summary.complete:
        raise typer.Exit(1)


def _summary_line(summary: SegmentSummary, choice: str) -> str:
    counts = f"{summary.done} done, {len(summary.failures)} failed, {summary.skipped} skipped"
    left = summary.found - summary.done - summary.skipped - len(summary.failures)
    if left:
        counts += f", {left} left"
    folder = os.fsencode(summary.output).decode("utf-8", "backslashreplace")
    backend, *why = choice.split("; ")
    rest = "; `ddsm info` tells why" if why else ""  # a clause for each candidate, which the JSON has too
    return f"{summary.found} frames: {counts}; {summary.fps:.1f} FPS; results in {folder}; backend: {backend}{rest}"


def _print_failures(summary: SegmentSummary, native: Counter[str]) -> None:
    for failure in summary.failures[:_LISTED]:
        print(f"failed: {' '.join(failure.error.splitlines())}", file=sys.stderr)  # names may hold line breaks
    if (more := len(summary.failures) - _LISTED) > 0:
        print(f"failed: {more} more; all are in the manifest in {summary.output}", file=sys.stderr)
    if native:
        most = native.most_common(1)[0][0]
        print(f"note: image decoders warned {native.total()} times, most often: {most}", file=sys.stderr)
    if summary.stopped:
        print(f"ddsm: stopped early: {summary.stopped}; run the same command again to go on", file=sys.stderr)
    if summary.interrupted:
        print("ddsm: interrupted; run the same command again to go on", file=sys.stderr)


@contextlib.contextmanager
def _native_messages_apart() -> Iterator[Counter[str]]:
    """Gathers what libpng, libjpeg and their like write to the process's stderr, which no setting turns off.

    They would run into the progress bar and name no file. libpng's errors reach us as failures and its warnings are
    harmless, so they are dropped; a JPEG damaged inside is decoded all the same, so of that a note is made at the end.
    Python's own stderr stays as it is.
    """
    lines: Counter[str] = Counter()
    sys.stderr.flush()
    reading, writing = os.pipe()
    shown = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)
    os.dup2(writing, 2)
    os.close(writing)

    def gather() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
            lines.update(line.strip() for line in pipe if line.strip() and not line.startswith("libpng "))

    reader = threading.Thread(target=gather, daemon=True)
    reader.start()
    previous, sys.stderr = sys.stderr, shown
    try:
        yield lines
    finally:
        sys.stderr = previous
        os.dup2(shown.fileno(), 2)
        shown.close()
        reader.join()


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[SegmentSummary], None] | None]:
    """What to call after each frame."""
    from ddsm_deploy.cli.progress import frames_bar

    with frames_bar(quiet) as show:
        if show is None:
            yield None
            return

        def report(summary: SegmentSummary) -> None:
            failed = f", {len(summary.failures)} failed" if summary.failures else ""
            ended = summary.done + summary.skipped + len(summary.failures)
            show(ended, summary.found, f"{summary.fps:.1f} FPS{failed}")

        yield report

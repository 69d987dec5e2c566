"""The process in which one backend is timed: `python -m ddsm_deploy.evaluate.worker`, driven by `benchmark`.

One JSON object a line, both ways. First a `Task` in; out comes what opening took, or why it can't run here. Then each
``{"runs": N}`` in times N runs, and their times come out. At the end of the input it stops. A process of its own gives
every backend an honest load time, first inference and peak memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from ddsm_deploy.engines import EngineOptions
from ddsm_deploy.errors import DdsmError
from ddsm_deploy.evaluate.machine import peak_memory_mb
from ddsm_deploy.images import Image, read_image
from ddsm_deploy.runtime.segmenter import Segmenter

WARM_UP_SECONDS = 5.0
"""Warm-up ends after this long even if fewer runs than asked for are done: for networks of seconds a frame."""

SETTLING_RUNS = 2
"""Untimed runs at the start of a round: while others ran, caches were filled with their data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker is to run.

    Attributes:
        model: file, bundle folder, or shipped name; None is the default model.
        backend: one of `ddsm_deploy.engines.BACKENDS`.
        precision: asked for; None is the model's own.
        threads: of one inference; None leaves it to the runtime.
        warm_up: untimed runs before the first timed one.
        images: files to run on in turn; none means one image of uniform noise at the model's input size.
        sampling: asked for; None is fused where it can be had.
        provider: of onnxruntime.
    """

    model: str | None
    backend: str
    precision: str | None
    threads: int | None
    warm_up: int
    images: tuple[str, ...]
    sampling: str | None = None
    provider: str = "cpu"


def serve(commands: TextIO, replies: TextIO) -> None:
    """Answers the lines of `commands` until they end."""

    def reply(fields: dict[str, Any]) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    task = Task(**json.loads(commands.readline()))
    try:
        pictures = [read_image(path) for path in task.images]
        start = time.perf_counter()
        options = EngineOptions(
            precision=task.precision, threads=task.threads, sampling=task.sampling, provider=task.provider
        )
        with Segmenter.open(task.model, backend=task.backend, warm_up=False, options=options) as segmenter:
            load_ms = _since(start)
            pictures = pictures or [_noise(segmenter.spec.height, segmenter.spec.width)]
            run = _runner(segmenter, pictures)
            first_ms, _ = run()
            _warm_up(run, task.warm_up)
            ran: dict[str, Any] = {"precision": segmenter.precision, "sampling": segmenter.sampling}
            ran["open_size"] = segmenter.size is None
            reply({**ran, "load_ms": load_ms, "first_ms": first_ms})
            for line in commands:
                for _ in range(SETTLING_RUNS):
                    run()
                times = [run() for _ in range(json.loads(line)["runs"])]
                reply({"times_ms": times, "peak_mb": peak_memory_mb()})
    except DdsmError as exc:
        reply({"error": str(exc)})


def _runner(segmenter: Segmenter, pictures: list[Image]) -> Callable[[], tuple[float, float]]:
    """A function that runs the next picture and returns (end to end, inference alone), milliseconds."""
    count = 0

    def run() -> tuple[float, float]:
        nonlocal count
        picture = pictures[count % len(pictures)]
        count += 1
        start = time.perf_counter()
        result = segmenter.predict(picture)
        return _since(start), result.timings["infer"]

    return run


def _warm_up(run: Callable[[], tuple[float, float]], runs: int) -> None:
    start = time.perf_counter()
    for _ in range(runs):
        if time.perf_counter() - start > WARM_UP_SECONDS:
            return
        run()


def _noise(height: int, width: int) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Keeps the real standard output for replies: what a runtime prints goes to standard error instead."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()

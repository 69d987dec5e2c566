"""What one worker process does: batches of inputs, from file to files, with one segmenter. Nothing large leaves it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import socket
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ddsm_deploy.engines import EngineOptions
from ddsm_deploy.errors import ConfigError, DdsmError, InputError
from ddsm_deploy.images import Image, check_bytes, decode_image
from ddsm_deploy.onnxweights import read_whole
from ddsm_deploy.ray.places import Place, import_pyarrow, reaching
from ddsm_deploy.runtime.manifest import Identity
from ddsm_deploy.runtime.outputs import Products
from ddsm_deploy.runtime.pipeline import calm_opencv
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sources import Source
from ddsm_deploy.runtime.worker import SegmentOptions, Worker

if TYPE_CHECKING:
    import pyarrow

_WAITING = 8
"""Threads beyond those that compute, where files come over a network: so many frames wait for it at a time."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A segmenter in a form that opens it on any machine: with the model's own bytes.

    Attributes:
        file: the model's name.
        content: its bytes.
        backend: that runs it.
        options: with which it is opened; their precision is what must run.
        fit: see `Segmenter.open`, as for `size`.
        size: height and width, or None.
    """

    file: str
    content: bytes = dataclasses.field(repr=False)
    backend: str
    options: EngineOptions
    fit: str
    size: tuple[int, int] | None

    @classmethod
    def of(cls, segmenter: Segmenter, threads: int) -> Self:
        """How to open `segmenter` again, for `threads` frames side by side.

        Raises:
            ConfigError: its engine was made by the caller, or runs on a GPU.
        """
        if segmenter.file is None or segmenter.options is None:
            raise ConfigError("a segmenter on an engine that its caller made can't go to workers; open it from a file")
        if segmenter.options.provider != "cpu" or segmenter.backend.startswith("tensorrt"):
            raise ConfigError(
                f"{segmenter.label} needs a GPU, and workers ask Ray for cores alone; take the local engine"
            )
        options = dataclasses.replace(segmenter.options, precision=segmenter.precision)
        if segmenter.backend == "openvino":  # it counts the threads of all inferences
            options = dataclasses.replace(options, threads=threads, streams=threads, hint="throughput")
        elif segmenter.backend != "triton":
            options = dataclasses.replace(options, threads=1)
        file = segmenter.file
        return cls(file.name, read_whole(file), segmenter.backend, options, segmenter.fit, segmenter.size)

    def open(self) -> Segmenter:
        """The segmenter, opened in this process.

        Raises:
            DdsmError: as `Segmenter.open`.
        """
        with tempfile.TemporaryDirectory(prefix="ddsm-") as folder:  # runtimes keep what they have read or mapped
            file = Path(folder, self.file)
            file.write_bytes(self.content)
            return Segmenter.open(file, backend=self.backend, options=self.options, fit=self.fit, size=self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What all workers of a run have in common.

    Attributes:
        source: the place of the inputs, for its file system.
        output: the folder written to.
        products: which files.
        max_pixels: larger images are refused.
        identity: of the model, for the records.
        threads: frames side by side.
    """

    source: Place
    output: Place
    products: Products
    max_pixels: int
    identity: Identity
    threads: int


class BatchWorker:
    """Runs in a process of Ray, once a worker. Takes rows with a source each, gives rows with a record each.

    An input that fails has a record that says so, as in the local engine. What concerns all of them (no backend on this
    machine, a bug) is a row of its own: raised here, Ray would take it for another lost batch.

    Args:
        recipe: a reference to the `Recipe`.
        job: see there.
    """

    def __init__(self, recipe: Any, job: Job) -> None:
        import ray

        self._calm = calm_opencv()
        self._calm.__enter__()  # for as long as the process lives
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._fatal: dict[str, str] = {}
        waiting = 0 if job.source.local and job.output.local else _WAITING
        self._pool = concurrent.futures.ThreadPoolExecutor(job.threads + waiting)
        try:
            self._worker = _RayWorker(ray.get(recipe).open(), job)
        except DdsmError as exc:
            self._fatal = {"fatal": f"{socket.gethostname()}: {exc}"}

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """A row of JSON for each of `batch`: ``record``, ``hopeless`` and ``worker``; or one row that ends the run."""
        if self._fatal:
            return _table([self._fatal])
        sources = [Source(*json.loads(text)) for text in batch["json"].to_pylist()]
        try:
            frames = list(self._pool.map(self._worker, sources))
        except Exception:  # noqa: BLE001 # a bug, which the caller raises with this traceback
            return _table([{"bug": traceback.format_exc()}])
        return _table([{**dataclasses.asdict(frame), "worker": self._name} for frame in frames])


class _RayWorker(Worker):
    """The local engine's worker, for inputs and outputs in any file system."""

    def __init__(self, segmenter: Segmenter, job: Job) -> None:
        self.job = job
        options = SegmentOptions(output=Path(job.output.path), products=job.products, max_pixels=job.max_pixels)
        super().__init__(segmenter, options, job.identity)

    def read(self, path: str) -> tuple[Image, int, int]:
        """As `Worker.read`."""
        if self.job.source.local:
            return super().read(path)
        from pyarrow.fs import FileType

        source = dataclasses.replace(self.job.source, path=path.removeprefix(self.job.source.named("")))
        assert source.filesystem is not None
        with reaching(source):
            info = source.filesystem.get_file_info(source.path)
            if info.type != FileType.File:
                raise InputError(f"{path}: no such file")
            check_bytes(info.size, path, self.options.max_pixels)
            data = source.read()
        return decode_image(data, max_pixels=self.options.max_pixels, name=path), info.size, info.mtime_ns or 0

    def write(self, files: Mapping[str, bytes]) -> None:
        """As `Worker.write`."""
        if self.job.output.local:
            super().write(files)
        else:
            self.job.output.write(files)


def _table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    # ASCII, also for names that are not valid Unicode, which Arrow's text is not
    table: pyarrow.Table = import_pyarrow().table({"json": [json.dumps(row) for row in rows]})
    return table

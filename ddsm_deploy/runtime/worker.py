"""What one thread of a batch run does: one input from file to files."""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2

from ddsm_deploy.errors import ConfigError, DdsmError
from ddsm_deploy.images import MAX_PIXELS, Image, read_image
from ddsm_deploy.runtime.manifest import Finished, Identity, Manifest
from ddsm_deploy.runtime.outputs import Products, write_files
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sources import Source

_HOPELESS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Errors after which no further output can be written: the run stops, and can be resumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """What `segment_files` makes, and where.

    Attributes:
        output: the folder for everything; made where missing.
        products: which files beside the masks.
        overwrite: make anew what is there, whoever made it.
        workers: frames worked on side by side; None is one a core.
        max_pixels: larger images are refused, by their header.
    """

    output: Path
    products: Products = dataclasses.field(default_factory=Products)
    overwrite: bool = False
    workers: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; expected at least 1")
        if self.max_pixels < 1:
            raise ConfigError(f"max_pixels is {self.max_pixels}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a worker gives back: the manifest's record, and whether nothing more can be written."""

    record: dict[str, Any]
    hopeless: bool = False


class Worker:
    """Takes one input from file to files; called from several threads.

    `read` and `write` are all that touches files, for a subclass whose files lie elsewhere.
    """

    def __init__(self, segmenter: Segmenter, options: SegmentOptions, identity: Identity) -> None:
        self.segmenter = segmenter
        self.options = options
        self.identity = identity

    def has_finished(self, source: Source, manifest: Manifest) -> bool:
        """Whether an earlier run of the same settings made all outputs from the same file."""
        record = manifest.finished.get(source.path)
        if record is None:
            return False
        try:
            status = Path(source.path).stat()
        except OSError:
            return False
        same = record == Finished(source.name, status.st_size, status.st_mtime_ns)
        files = self.options.products.files(source.name).values()
        return same and all((self.options.output / file).is_file() for file in files)

    def __call__(self, source: Source) -> Frame:
        try:
            return Frame(self._made(source))
        except (DdsmError, cv2.error, MemoryError) as exc:
            text = str(exc) or type(exc).__name__
            return Frame(_failed(source, text if text.startswith(source.path) else f"{source.path}: {text}"))
        except OSError as exc:
            what = f"{source.path}: its outputs can't be written ({exc.strerror or exc})"
            return Frame(_failed(source, what), hopeless=exc.errno in _HOPELESS)

    def read(self, path: str) -> tuple[Image, int, int]:
        """An input's image, and its file's size in bytes and time of change in nanoseconds.

        Raises:
            InputError: it can't be read, or is no image.
        """
        image = read_image(path, max_pixels=self.options.max_pixels)
        status = Path(path).stat()
        return image, status.st_size, status.st_mtime_ns

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes outputs (relative path -> bytes), each whole or not at all.

        Raises:
            OSError: they can't be.
        """
        write_files(self.options.output, files)

    def _made(self, source: Source) -> dict[str, Any]:
        begin = time.perf_counter()
        image, size, changed = self.read(source.path)
        decoded = time.perf_counter()
        segmentation = self.segmenter.predict(image)
        inferred = time.perf_counter()
        products, files = self.options.products, self.options.products.files(source.name)
        encoded = products.encode(segmentation, image, file_name=_file_name(source))
        self.write({files[product]: data for product, data in encoded.items()})
        times = {"decode": decoded - begin, "infer": inferred - decoded, "encode": time.perf_counter() - inferred}
        return {
            "source": source.path,
            "name": source.name,
            "bytes": size,
            "mtime_ns": changed,
            "size": list(segmentation.mask.shape),
            "outputs": list(files.values()),
            "model": self.identity.sha256,
            "backend": self.segmenter.backend,
            "precision": self.segmenter.precision,
            "sampling": self.segmenter.sampling,
            "ms": {stage: round(seconds * 1e3, 3) for stage, seconds in times.items()},
        }


def _failed(source: Source, error: str) -> dict[str, Any]:
    return {"source": source.path, "error": error}


def _file_name(source: Source) -> str:
    """The image's own name below the common folder, where `Source.name` may be shortened or lack the suffix."""
    folder, slash, _ = source.name.rpartition("/")
    return f"{folder}{slash}{Path(source.path).name}"

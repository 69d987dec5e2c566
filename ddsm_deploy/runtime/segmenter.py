"""Segmenter: an image in, a segmentation out, on whichever backend."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import FILE_KINDS, Engine, EngineOptions, in_words
from ddsm_deploy.errors import BackendError, ConfigError, InputError
from ddsm_deploy.images import Image
from ddsm_deploy.runtime.candidates import fixed_size
from ddsm_deploy.runtime.choice import choose, open_named
from ddsm_deploy.runtime.decisions import Decision
from ddsm_deploy.runtime.flow import Flow, IterableSource, Submissions
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.spec import ModelSpec
from ddsm_deploy.streams.frames import Frame, Source
from ddsm_deploy.streams.sources import open_source

FITS = ("stretch", "letterbox")

AUTO = "auto"

IN_FLIGHT = 4
"""Images that `Segmenter.submit` holds at most."""


class Segmenter:
    """A model ready to run. Open it with `Segmenter.open`, best in a ``with`` block.

    `predict` may be called from several threads at once; `stream` and `submit` do so. `prepare`, `infer` and `finish`
    are `predict` in three steps, for threads of your own. Pickled, it opens the same file anew, on the same backend: so
    it can be handed to worker processes.

    Attributes:
        spec: classes, palette and all else about the model.
        backend: which backend runs.
        precision: what its arithmetic really runs at.
        sampling: how dynamic sampling really runs: ``fused``, ``portable`` or ``gather``.
        outputs: names of the outputs that the engine gives.
        choice: who chose the backend, and why.
        file: the model file that runs; None where a caller made the engine.
        options: with which its engine was opened; None likewise.
        decision: what ``auto`` measured and decided, now or earlier; None where it had nothing to choose from.
    """

    file: Path | None = None
    options: EngineOptions | None = None
    decision: Decision | None = None

    def __init__(self, engine: Engine, spec: ModelSpec, *, fit: str, size: tuple[int, int] | None, choice: str) -> None:
        self._engine = engine
        self._fit = fit
        self._size = size
        self._input = engine.inputs[0].name
        self._submissions: Submissions[Segmentation] | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.spec = spec
        self.backend = engine.backend
        self.precision = engine.precision
        self.sampling = engine.sampling
        self.outputs = tuple(info.name for info in engine.outputs)
        self.choice = choice

    @classmethod
    def open(
        cls,
        model: str | Path | Artifact | None = None,
        *,
        backend: str = AUTO,
        precision: str | None = None,
        threads: int | None = None,
        fit: str = "stretch",
        size: tuple[int, int] | None = None,
        warm_up: bool = True,
        options: EngineOptions | None = None,
        frames: Sequence[Image] | None = None,
        fresh: bool = False,
    ) -> Segmenter:
        """Loads a model and readies it.

        Args:
            model: an ``.onnx`` file, a ``.safetensors`` checkpoint, a bundle (folder or ``.zip``), the name of a
                shipped model, or what `resolve` made of one; None is the default shipped model.
            backend: ``torch``, ``onnxruntime``, ``openvino`` …, or ``auto``: of the model's files, the backends and
                the precisions the quickest whose masks agree with float32's, by a measurement of some seconds that is
                kept for later; `choice` says what it found.
            precision: ``fp32``, ``bf16``, ``int8`` …: nothing else runs. A bundle's file of that precision is taken.
                None is the model's own, and with ``auto`` whichever is quickest: name ``fp32`` to rule out all others.
            threads: threads of one inference; None leaves it to the runtime.
            fit: how an image of another size is brought to the network's: ``stretch`` it, or ``letterbox`` (keep its
                shape and fill up with the mean colour).
            size: height and width to run at, for a model whose size is open (it otherwise takes every image as it is),
                or for torch.
            warm_up: run once now, so that the first `predict` is as quick as the others.
            options: everything else; `precision` and `threads` above win over its own.
            frames: for ``auto``: images like those to come, uint8 H×W×3, BGR, to compare and time candidates on; None
                is a few drawn street scenes.
            fresh: for ``auto``: measure now, whatever was kept.

        Raises:
            ArtifactError: no such model, or it is damaged or incomplete.
            ConfigError: an option is wrong, or not one of this backend's.
            BackendError: the backend is not installed, or can't do what was asked.
            GateError: for ``auto`` with a precision: it runs, but its masks are too far from float32's.
        """
        if fit not in FITS:
            raise ConfigError(f"fit is {fit!r}; expected {' or '.join(FITS)}")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigError(f"size is {size}; expected height and width, at least 1x1")
        artifact = model if isinstance(model, Artifact) else resolve(model)
        wanted = {k: v for k, v in (("precision", precision), ("threads", threads)) if v is not None}
        options = dataclasses.replace(options or EngineOptions(), **wanted)  # type: ignore[arg-type]
        if size is not None and (backend == "torch" or "onnx" not in artifact.files):
            artifact = dataclasses.replace(artifact, spec=artifact.spec.replace(height=size[0], width=size[1]))
        if backend == AUTO:
            choice = choose(artifact, options, size=size, images=frames, fresh=fresh)
        else:
            choice = open_named(artifact, backend, options)
        try:
            fixed = fixed_size(choice.engine, artifact, size)
            segmenter = cls(choice.engine, artifact.spec, fit=fit, size=fixed, choice=choice.reason)
            segmenter.file = choice.part.file(FILE_KINDS[segmenter.backend])
            segmenter.options, segmenter.decision = choice.options, choice.decision
            if warm_up:
                segmenter.predict(np.zeros((*(fixed or (artifact.spec.height, artifact.spec.width)), 3), np.uint8))
        except BaseException:
            choice.engine.close()
            raise
        return segmenter

    @property
    def label(self) -> str:
        """Backend (with its provider, unless that is the CPU), precision and sampling in words."""
        provider = "cpu" if self.options is None else self.options.provider
        return in_words(self.backend, self.precision, self.sampling, provider)

    @property
    def fit(self) -> str:
        """How images are brought to the network's size: ``stretch`` or ``letterbox``."""
        return self._fit

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that the network runs at; None where that is each image's own size."""
        return self._size

    def predict(self, image: Image) -> Segmentation:
        """Segments one image of any size.

        Args:
            image: uint8 H×W×3, BGR (as OpenCV and `read_image` give it), whatever the model's own channel order.

        Raises:
            InputError: of another type or shape.
            BackendError: the runtime failed, or the segmenter is closed.
        """
        start = time.perf_counter()
        prepared = self.prepare(image)
        ready = time.perf_counter()
        raw = self.infer(prepared)
        done = time.perf_counter()
        result = self.finish(raw, image.shape[:2])
        steps = {"prepare": ready - start, "infer": done - ready, "finish": time.perf_counter() - done}
        return dataclasses.replace(result, timings={name: seconds * 1e3 for name, seconds in steps.items()})

    def prepare(self, image: Image) -> Image:
        """An image (see `predict`) as the network takes it: uint8 1×H×W×3 of its size, in its channel order.

        Raises:
            InputError: of another type or shape.
        """
        _check_image(image)
        image = np.ascontiguousarray(image)  # OpenCV takes no mirrored views
        network = self._size
        if network is not None and image.shape[:2] != network:
            height, width, top, left = self._placement(image.shape[:2])
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
            if (height, width) != network:
                bottom, right = network[0] - top - height, network[1] - left - width
                red, green, blue = (round(value) for value in self.spec.mean)
                padded = cv2.copyMakeBorder(
                    image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(blue, green, red)
                )
                image = padded.astype(np.uint8, copy=False)
        if self.spec.channel_order == "rgb":
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        return image[np.newaxis]

    def infer(self, prepared: Image) -> dict[str, npt.NDArray[Any]]:
        """Runs the network on what `prepare` made; returns the engine's outputs by name, one image each.

        Raises:
            BackendError: the runtime failed, or the segmenter is closed.
        """
        return self._engine.run({self._input: prepared})

    def finish(self, raw: Mapping[str, npt.NDArray[Any]], image_size: tuple[int, ...]) -> Segmentation:
        """Brings the outputs of `infer` back to the image's own height and width (nearest neighbour)."""
        confidence = raw.get("confidence")
        return Segmentation(
            mask=self._back(raw["mask"][0], image_size),
            classes=self.spec.classes,
            palette=self.spec.palette,
            confidence=None if confidence is None else self._back(confidence[0], image_size),
        )

    def stream(
        self,
        source: str | Path | Source | Iterable[Image | Frame],
        *,
        policy: str | None = None,
        workers: int | None = None,
        on_damage: Callable[[Frame], None] | None = None,
    ) -> Flow[Segmentation]:
        """Segments frames as they come: iterate over pairs of `Frame` and `Segmentation`, in the source's order.

            for frame, result in segmenter.stream("drive.mcap"):
                print(frame.stamp, result.mask.shape)

        Reading, inference and what the loop does overlap; memory holds some frames, however long the source. Damaged
        frames are left out: the result's `damaged` counts them, and `dropped` those that came too fast. The next result
        is made while the loop's body runs, so with ``latest`` it may be as old as that body takes.

        Args:
            source: what `open_source` takes (a folder, a video, a recording, a camera's number, an address), a source,
                or anything that gives images one by one.
            policy: ``every`` (the source waits) or ``latest`` (of waiting frames the newest); None is ``latest`` for
                live sources and ``every`` for others.
            workers: frames worked on side by side; None is two with ``every``, so that one is resized while another is
                inferred, and one with ``latest``.
            on_damage: called with each damaged frame, whose `error` says why.

        Raises:
            DdsmError: as `open_source`; and while iterating, as `predict`, or if the source can't be read further.
        """
        frames = _as_source(source)
        waits = policy == "every" or (policy is None and not frames.live)
        return Flow(
            frames,
            lambda frame: self.predict(frame.image),  # type: ignore[arg-type] # no frame without one comes here
            policy=policy,
            workers=workers or (2 if waits else 1),
            on_damage=on_damage,
        )

    def submit(self, image: Image) -> Future[Segmentation]:
        """`predict` on another thread. Waits first while `IN_FLIGHT` images are in hand, so that memory is bounded.

        Raises:
            BackendError: the segmenter is closed, or was while this waited.
        """
        with self._lock:
            if self._closed:
                raise BackendError("this segmenter is closed")
            if self._submissions is None:
                self._submissions = Submissions(self.predict, in_flight=IN_FLIGHT, workers=2)
            submissions = self._submissions
        return submissions.submit(image)

    def close(self) -> None:
        """Gives the runtime's memory back; calling it again does nothing. What `submit` took is finished first."""
        with self._lock:
            self._closed = True
            submissions, self._submissions = self._submissions, None
        if submissions is not None:
            submissions.close()
        self._engine.close()

    def __reduce__(self) -> tuple[Callable[..., Segmenter], tuple[Any, ...]]:
        if self.file is None or self.options is None:
            raise ConfigError("a segmenter on an engine that its caller made can't be pickled; open it from a file")
        options = dataclasses.replace(self.options, precision=self.precision)
        return _reopen, (self.file, self.backend, options, self._fit, self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        size = "any size" if self._size is None else f"{self._size[0]}x{self._size[1]}"
        return f"<Segmenter {self.spec.name} on {self.label}, {size}>"

    def _placement(self, image_size: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Height, width, top and left of the image inside the network's input."""
        assert self._size is not None
        height, width = self._size
        if self._fit == "stretch":
            return height, width, 0, 0
        scale = min(height / image_size[0], width / image_size[1])
        inner = [max(1, round(side * scale)) for side in image_size]
        return inner[0], inner[1], (height - inner[0]) // 2, (width - inner[1]) // 2

    def _back(self, output: npt.NDArray[np.uint8], image_size: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        if output.shape == image_size:
            return output
        height, width, top, left = self._placement(image_size)
        inner = output[top : top + height, left : left + width]
        # plain INTER_NEAREST rounds towards the first pixel and so shifts the mask by up to half a pixel
        resized = cv2.resize(inner, (image_size[1], image_size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
        return resized.astype(np.uint8, copy=False)


def _reopen(file: Path, backend: str, options: EngineOptions, fit: str, size: tuple[int, int] | None) -> Segmenter:
    return Segmenter.open(file, backend=backend, options=options, fit=fit, size=size)


def _as_source(source: str | Path | Source | Iterable[Image | Frame]) -> Source:
    if isinstance(source, str | Path):
        return open_source(str(source))
    if isinstance(source, np.ndarray):
        raise InputError("got one array; stream takes a list or another sequence of images, predict takes one")
    return source if isinstance(source, Source) else IterableSource(source)


def _check_image(image: Image) -> None:
    expected = "expected a numpy array, uint8 HxWx3 (BGR)"
    if not isinstance(image, np.ndarray):
        raise InputError(f"got a {type(image).__name__}; {expected}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"got {image.dtype} {'x'.join(map(str, image.shape)) or 'scalar'}; {expected}")

"""Two forms of one model run on the same frames, before one of them is written. Loads the runtimes that it runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.enginefile import Profile
from ddsm_deploy.engines import FILE_KINDS, EngineOptions, open_engine, usable_backends
from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.export.verify import Array, find_images, load_images, synthetic_images
from ddsm_deploy.parity import ParityBudget, ParityMeter, ParityResult
from ddsm_deploy.spec import ModelSpec

RUNTIMES = ("onnxruntime", "openvino")
"""What may run a graph for a comparison, the first choice first."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        artifact: with one file.
        backend: what runs it; None is the first of `RUNTIMES` that is installed and can.
    """

    artifact: Artifact
    backend: str | None = None

    def runner(self) -> str:
        """The backend that runs it.

        Raises:
            BackendError: none is installed that can; with the pip line.
        """
        if self.backend is not None:
            return self.backend
        # ONNX Runtime computes INT8 with float16 wrongly on CPUs (seen in 1.31)
        fitting = RUNTIMES[1:] if self.artifact.spec.precision == "int8+fp16" else RUNTIMES
        status = {entry.backend: entry for entry in usable_backends()}
        for backend in fitting:
            if status[backend].available:
                return backend
        raise BackendError(
            f"nothing here can run the graph for a comparison: {status[fitting[0]].reason}; or --no-verify"
        )


def frames_for(spec: ModelSpec, images: Sequence[Path], profile: Profile | None = None) -> list[tuple[str, Array]]:
    """Names and frames to compare on, uint8 1×H×W×3 at the spec's size; synthetic ones where no images are given.

    With a profile they have a shape that it admits: its best size where the spec's lies outside, and where its batch
    begins above 1, each frame as many times.

    Raises:
        InputError: a file or folder is missing, or holds no image.
    """
    times = 1
    if profile is not None:
        times, *least = profile.min[:3]
        own = (spec.height, spec.width)
        if not all(low <= side <= high for low, side, high in zip(least, own, profile.max[1:3], strict=True)):
            spec = spec.replace(height=profile.opt[1], width=profile.opt[2])
    paths = find_images(images)
    if paths:
        found = zip([path.name for path in paths], load_images(paths, spec), strict=True)
    else:
        frames = synthetic_images(spec.height, spec.width)
        found = zip((f"synthetic {number}" for number in range(1, len(frames) + 1)), frames, strict=True)
    return [(name, np.repeat(frame, times, axis=0)) for name, frame in found]


def compare(
    a: Side,
    b: Side,
    frames: Sequence[tuple[str, Array]],
    budget: ParityBudget,
    *,
    progress: Callable[[float], None] | None = None,
) -> ParityResult:
    """Runs both on every frame and compares the masks; A is the reference.

    Raises:
        ConfigError: no frame.
        BackendError: one can't be run.
    """
    if not frames:
        raise ConfigError("no frame to compare on")
    meter = ParityMeter(a.artifact.spec.classes)
    with contextlib.ExitStack() as stack:
        engines = []
        for side in (a, b):
            backend = side.runner()
            alone = Artifact(side.artifact.name, side.artifact.spec, _only(side.artifact, FILE_KINDS[backend]))
            engine = open_engine(alone, backend, EngineOptions(outputs=("mask",)))
            stack.callback(engine.close)
            engines.append(engine)
        for done, (name, frame) in enumerate(frames, 1):
            first, second = (engine.run({engine.inputs[0].name: frame})["mask"][0] for engine in engines)
            meter.update(first, second, name=name)
            if progress:
                progress(done / len(frames))
    return meter.result(budget)


def _only(artifact: Artifact, kind: str) -> dict[str, Path]:
    return {kind: artifact.file(kind)}

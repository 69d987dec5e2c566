"""Two open models that run the same frames at the same size, to be compared."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import BACKENDS, EngineOptions, runs_at, select, usable_backends
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, InputError
from ddsm_deploy.images import Image
from ddsm_deploy.parity import Logits
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.segmenter import AUTO, Segmenter

Model = str | Path | Artifact | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of two runs.

    Attributes:
        model: a file, a bundle, a shipped model's name, or what `resolve` made of one; None is the default model.
        backend: what runs it; None is the backend that its file was written for, or else the first of ``onnxruntime``,
            ``openvino`` and the others that is installed and can run it at `precision`.
        precision: what it must run at; None is its own.
        sampling: how it must sample; None is fused where it can be had.
        provider: of onnxruntime: ``cpu``, ``cuda`` or ``tensorrt``.
    """

    model: Model = None
    backend: str | None = None
    precision: str | None = None
    sampling: str | None = None
    provider: str = "cpu"


class Pair:
    """A and B, opened. Closes both at the end of a ``with`` block.

    Of two sizes the one of the side that can't run at another wins.

    Args:
        a: the reference.
        b: what is judged.
        threads: threads of one inference.

    Raises:
        ConfigError: the two are one and the same run.
        InputError: they have other classes or sizes.
        ArtifactError: a model is missing or damaged.
        BackendError: a backend is missing or can't do what was asked.

    Attributes:
        a: the reference.
        b: what is judged.
    """

    def __init__(self, a: Side, b: Side, *, threads: int | None = None) -> None:
        sides = (a, b)
        with contextlib.ExitStack() as stack:
            pair = [stack.enter_context(_open(side, threads)) for side in sides]
            for own, other in ((0, 1), (1, 0)):
                size = pair[other].size
                flexible = pair[own].size is None or pair[own].backend == "torch"
                if flexible and size not in (None, pair[own].size):
                    pair[own] = stack.enter_context(_open(sides[own], threads, size=size))
            self.a, self.b = pair
            _check(self.a, self.b)
            self._stack = stack.pop_all()

    @property
    def names(self) -> tuple[str, str]:
        """A and B in words: file, backend, precision, sampling."""
        return describe(self.a), describe(self.b)

    def predict(self, image: Image) -> tuple[Segmentation, Segmentation, tuple[Logits, Logits] | None]:
        """Both masks, at the image's own size, and the logits where both give them."""
        results, logits = [], []
        for segmenter in (self.a, self.b):
            raw = segmenter.infer(segmenter.prepare(image))
            results.append(segmenter.finish(raw, image.shape[:2]))
            if "logits" in raw:
                logits.append(raw["logits"])
        return results[0], results[1], (logits[0], logits[1]) if len(logits) == 2 else None

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def describe(segmenter: Segmenter) -> str:
    """What runs, in words: ``model.onnx on openvino bf16 fused``."""
    file = segmenter.file.name if segmenter.file else segmenter.spec.name
    return f"{file} on {segmenter.label}"


def _open(side: Side, threads: int | None, *, size: tuple[int, int] | None = None) -> Segmenter:
    artifact = side.model if isinstance(side.model, Artifact) else resolve(side.model)
    backend = side.backend or _default_backend(artifact, side.precision, side.provider)
    # a checkpoint can give logits at no cost; a file gives what it was exported with
    outputs = ("mask", "logits") if backend == "torch" else None
    return Segmenter.open(
        artifact,
        backend=backend,
        precision=side.precision,
        threads=threads,
        size=size,
        warm_up=False,
        options=EngineOptions(outputs=outputs, sampling=side.sampling, provider=side.provider),
    )


def _default_backend(artifact: Artifact, precision: str | None, provider: str) -> str:
    """No measurement here: the same call compares the same two things every time."""
    usable = {status.backend for status in usable_backends() if status.available}
    order = dict.fromkeys((artifact.target, "onnxruntime", "openvino", *(b for b in BACKENDS if b != "torch"), "torch"))
    for backend in order:
        if backend in usable:
            with contextlib.suppress(ArtifactError, BackendError):  # the next one, then
                part = select(artifact, backend, precision)
                if (backend, part.spec.precision, provider) == ("onnxruntime", "int8+fp16", "cpu"):
                    continue  # which it refuses
                if precision in (None, part.spec.precision) or precision in runs_at(backend, part):
                    return backend
    return AUTO  # which says of each backend why it can't


def _check(a: Segmenter, b: Segmenter) -> None:
    if (a.file, a.label) == (b.file, b.label):
        raise ConfigError(
            f"A and B are one and the same, {describe(a)}, and would always agree; name another file, or say "
            "--backend-b, --precision-b, --sampling-b or --provider-b"
        )
    if a.spec.classes != b.spec.classes:
        only = [", ".join(c for c in x.spec.classes if c not in y.spec.classes) for x, y in ((a, b), (b, a))]
        raise InputError(
            f"A and B are models of other classes ({len(a.spec.classes)} and {len(b.spec.classes)}; only A has "
            f"{only[0] or 'none'}; only B has {only[1] or 'none'}), or number them in another order"
        )
    if a.size != b.size:
        sizes = ["any size" if s.size is None else f"{s.size[0]}x{s.size[1]}" for s in (a, b)]
        raise InputError(f"A runs at {sizes[0]} and B at {sizes[1]}; expected one size: export both at the same --size")

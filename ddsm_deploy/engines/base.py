"""What every engine is (a small Protocol), and what they share: naming, feed checks and lifetime."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.errors import BackendError, ConfigError, InputError
from ddsm_deploy.spec import PRECISIONS

Array = npt.NDArray[Any]

PROVIDERS = ("cpu", "cuda", "tensorrt")
HINTS = ("latency", "throughput")
SAMPLINGS = ("fused", "portable")
"""How a fused file can be asked to sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One input or output of an engine.

    Attributes:
        name: as in the graph.
        dtype: the type of its elements.
        shape: one number an axis; None where any size is taken.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {_shape_text(self.shape)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to run a model. An option that the chosen backend does not have is an error, never ignored.

    Attributes:
        precision: what the arithmetic must run at, any of `PRECISIONS`; None is the precision of the model's own graph.
        threads: threads of one inference; None leaves it to the runtime. On torch it counts for the whole process.
        outputs: names of the outputs wanted; None is all that the graph has (torch: the mask alone).
        sampling: how dynamic sampling must run: ``fused``, on the package's own kernels, or ``portable``, as standard
            operators. None is fused where file and backend allow, and else as the file is written. With ``portable``
            openvino uses none of the package's kernels, at the end of the graph neither.
        provider: onnxruntime only: ``cpu``, ``cuda`` or ``tensorrt``.
        spinning: onnxruntime only: whether idle worker threads spin, quicker alone and harmful to what runs beside it;
            None leaves it to the runtime.
        streams: openvino only: inferences run side by side; None follows the hint.
        hint: openvino only: ``latency`` (None likewise) or ``throughput``.
    """

    precision: str | None = None
    threads: int | None = None
    outputs: tuple[str, ...] | None = None
    sampling: str | None = None
    provider: str = "cpu"
    spinning: bool | None = None
    streams: int | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("precision", self.precision, PRECISIONS),
            ("sampling", self.sampling, SAMPLINGS),
            ("provider", self.provider, PROVIDERS),
            ("hint", self.hint, HINTS),
        ):
            if value is not None and value not in allowed:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        if self.outputs is not None and not self.outputs:
            raise ConfigError("outputs is empty; expected names of outputs, or None for all")
        for name, number in (("threads", self.threads), ("streams", self.streams)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ConfigError(f"{name} is {number!r}; expected an integer of at least 1")

    def only(self, backend: str, *allowed: str) -> None:
        """Refuses options that a backend does not have, beyond those that all have.

        Raises:
            ConfigError: one of the others is set.
        """
        for field in dataclasses.fields(self):
            if field.name in ("precision", "threads", "outputs", "sampling", *allowed):
                continue
            if getattr(self, field.name) != field.default:
                raise ConfigError(f"{backend} has no option {field.name!r} (it is {getattr(self, field.name)!r})")


class Engine(Protocol):
    """One model loaded into one runtime. Numpy in, numpy out; `run` may be called from several threads at once.

    Attributes:
        backend: ``torch``, ``onnxruntime`` or ``openvino``.
        precision: what really runs.
        sampling: how dynamic sampling really runs: ``fused``, ``portable`` or ``gather``.
        sampling_note: why it runs no better than that, where a user should know; else empty.
        inputs: names, types and shapes taken.
        outputs: names, types and shapes given.
    """

    backend: str
    precision: str
    sampling: str
    sampling_note: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One inference.

        Args:
            feeds: input name -> array, exactly the names of `inputs`.

        Returns:
            Output name -> array, owned by the caller.

        Raises:
            InputError: a feed is missing, unknown, or of the wrong type or shape.
            BackendError: the runtime failed, or the engine is closed.
        """
        ...

    def close(self) -> None:
        """Gives the runtime's memory back; calling it again does nothing."""
        ...


class BaseEngine(abc.ABC):
    """Naming, checks and lifetime; a backend adds its constructor, `_infer` and `_release`."""

    backend: str
    precision: str
    sampling: str
    sampling_note: str = ""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    _closed: bool = False

    @abc.abstractmethod
    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Loads the model; sets `precision`, `sampling`, `inputs` and `outputs`."""

    @classmethod
    def precisions(cls) -> tuple[str, ...]:
        """What this backend can run a float32 model at on this machine, its default first."""
        return ("fp32",)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        if self._closed:
            raise self._closed_error()
        return self._infer(check_feeds(self.inputs, feeds))

    def close(self) -> None:
        """See `Engine.close`."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, group)) for group in (self.inputs, self.outputs))
        return f"<{self.backend} {self.precision}: {inputs} -> {outputs}>"

    def _closed_error(self) -> BackendError:
        return BackendError(f"this {self.backend} engine is closed; open another")

    @abc.abstractmethod
    def _infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """One inference on feeds that were checked."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Gives the runtime's memory back; called once."""


def check_feeds(inputs: tuple[TensorInfo, ...], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds as C-contiguous arrays, once names, types and shapes are found right.

    Raises:
        InputError: they are not.
    """
    expected = {info.name: info for info in inputs}
    for name in feeds:
        if name not in expected:
            raise InputError(f"unknown input {name!r}; expected {', '.join(expected)}")
    checked = {}
    for name, info in expected.items():
        if name not in feeds:
            raise InputError(f"input {name!r} is missing; expected {info}")
        array = feeds[name]
        if not isinstance(array, np.ndarray):
            raise InputError(f"input {name!r} is a {type(array).__name__}; expected a numpy array, {info}")
        fits = len(array.shape) == len(info.shape) and all(
            got > 0 and want in (None, got) for got, want in zip(array.shape, info.shape, strict=True)
        )
        if array.dtype != info.dtype or not fits:
            raise InputError(f"input {name!r} is {array.dtype} {_shape_text(array.shape)}; expected {info}")
        checked[name] = np.ascontiguousarray(array)
    return checked


def choose_outputs(
    backend: str, available: tuple[TensorInfo, ...], wanted: Iterable[str] | None
) -> tuple[TensorInfo, ...]:
    """The outputs to compute, in the graph's order.

    Raises:
        BackendError: the model lacks one.
    """
    if wanted is None:
        return available
    names = [info.name for info in available]
    for name in wanted:
        if name not in names:
            raise BackendError(
                f"this model has no output {name!r} on {backend}, only {', '.join(names)}; export it with that output"
            )
    return tuple(info for info in available if info.name in set(wanted))


def graph_precision(backend: str, artifact: Artifact, options: EngineOptions) -> str:
    """The precision for backends that run a graph exactly as it is written.

    Raises:
        BackendError: another one was asked for.
    """
    written = artifact.spec.precision
    if options.precision not in (None, written):
        raise BackendError(
            f"{backend} runs {artifact.name} at {written}, as its graph is written, not at {options.precision}"
        )
    return written


def graph_sampling(backend: str, artifact: Artifact, options: EngineOptions, *, problem: str) -> tuple[str, str]:
    """How a backend samples that runs a graph as it is written, except that a fused one has two ways.

    Args:
        backend: named in messages.
        artifact: the file; its record says how it is written.
        options: what is asked for.
        problem: why the backend can't use the fused kernels here, with the cure; empty where it can.

    Returns:
        What is to be the engine's `sampling` and `sampling_note`.

    Raises:
        BackendError: another way was asked for than there is.
    """
    written = written_sampling(artifact)
    if written != "fused":
        if options.sampling not in (None, written):
            raise BackendError(
                f"{artifact.name} is written with {written} sampling, so {backend} can't sample {options.sampling}; "
                "export it with --sampling fused, which runs fused and portable"
            )
        return written, ""
    if options.sampling == "portable":
        return "portable", ""
    if problem and options.sampling == "fused":
        raise BackendError(f"{backend} can't sample fused: {problem}")
    return ("portable", problem) if problem else ("fused", "")


def in_words(backend: str, precision: str, sampling: str, provider: str = "cpu") -> str:
    """What runs: backend, precision, and the provider and the sampling where they are not the usual ones."""
    words = (backend, "" if provider == "cpu" else provider, precision, "" if sampling == "portable" else sampling)
    return " ".join(word for word in words if word)


def written_sampling(artifact: Artifact) -> str:
    """How an ONNX file is written: ``fused``, ``portable`` or ``gather``."""
    return artifact.spec.provenance.get("sampling", "portable")


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"

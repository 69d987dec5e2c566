"""The little of CUDA that an engine needs: a device, a stream, memory on both sides, a graph. By cuda-bindings alone.

Every call's error becomes a `BackendError` that says what was tried. Importing this works without a driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import runtime as cudart

from ddsm_deploy.errors import BackendError

_NON_BLOCKING = 1  # cudaStreamNonBlocking: no waiting for the legacy default stream
_NO_TIMING = 2  # cudaEventDisableTiming


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device.

    Attributes:
        index: its number among the visible ones.
        name: NVIDIA's name of it.
        compute_capability: as ``86``.
        memory: bytes.
        driver: the newest CUDA version that its driver serves, as ``13.0``.
    """

    index: int
    name: str
    compute_capability: str
    memory: int
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability}, driver for CUDA {self.driver})"


def check(result: tuple[Any, ...], what: str) -> Any:
    """The values behind a call's error code: none, the one, or a tuple.

    Raises:
        BackendError: the call failed.
    """
    error, *values = result
    if error != cudart.cudaError_t.cudaSuccess:
        raise BackendError(f"CUDA can't {what}: {_said(error)}")
    return values[0] if len(values) == 1 else tuple(values)


def find_gpu(index: int = 0) -> Gpu | None:
    """A visible GPU, or None where there is none, or no driver for it."""
    with contextlib.suppress(BackendError):
        return require_gpu(index)
    return None


def require_gpu(index: int = 0) -> Gpu:
    """A visible GPU.

    Raises:
        BackendError: there is none; the message says whether the driver or the device is missing.
    """
    error, count = cudart.cudaGetDeviceCount()
    if error != cudart.cudaError_t.cudaSuccess or not count:
        driver = check(cudart.cudaDriverGetVersion(), "ask for the driver's version")
        if not driver:
            raise BackendError("no NVIDIA GPU can be used here: no NVIDIA driver is installed")
        wanted = check(cudart.cudaRuntimeGetVersion(), "ask for its own version")
        raise BackendError(
            f"no NVIDIA GPU can be used here: {_said(error) if not count else 'none is visible'} (the driver serves "
            f"CUDA {_version(driver)}, cuda-bindings was made for {_version(wanted)})"
        )
    if index >= count:
        raise BackendError(f"there is no GPU {index} here, only {count}")
    check(cudart.cudaSetDevice(index), f"use GPU {index}")
    properties = check(cudart.cudaGetDeviceProperties(index), f"describe GPU {index}")
    return Gpu(
        index=index,
        name=properties.name.split(b"\0")[0].decode(errors="replace"),
        compute_capability=f"{properties.major}{properties.minor}",
        memory=int(properties.totalGlobalMem),
        driver=_version(check(cudart.cudaDriverGetVersion(), "ask for the driver's version")),
    )


def use(gpu: Gpu) -> None:
    """Makes a GPU the calling thread's own; CUDA keeps that for each thread."""
    check(cudart.cudaSetDevice(gpu.index), f"use GPU {gpu.index}")


class Stream:
    """A stream of its own, beside the default one."""

    def __init__(self) -> None:
        self._stream = check(cudart.cudaStreamCreateWithFlags(_NON_BLOCKING), "create a stream")
        self.handle = int(self._stream)

    def wait(self) -> None:
        """Waits until all that was put into it is done."""
        check(cudart.cudaStreamSynchronize(self._stream), "finish an inference")

    def follow(self, other: int) -> None:
        """Lets what is put in from now on start after what another stream holds now; 1 is the legacy default stream."""
        event = check(cudart.cudaEventCreateWithFlags(_NO_TIMING), "create an event")
        try:
            check(cudart.cudaEventRecord(event, cudart.cudaStream_t(other)), "record an event")
            check(cudart.cudaStreamWaitEvent(self._stream, event, 0), "wait for an event")
        finally:
            cudart.cudaEventDestroy(event)

    def copy(self, target: int, source: int, count: int) -> None:
        """Copies so many bytes, from and to whichever side the addresses lie on."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDefault
        check(cudart.cudaMemcpyAsync(target, source, count, kind, self._stream), f"copy {count} bytes")

    @contextlib.contextmanager
    def capturing(self) -> Iterator[list[Graph]]:
        """Records what the block puts in, instead of running it; the list then holds the graph."""
        made: list[Graph] = []
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cudart.cudaStreamBeginCapture(self._stream, mode), "begin a graph")
        try:
            yield made
        finally:
            result = cudart.cudaStreamEndCapture(self._stream)
        made.append(Graph(check(result, "end a graph")))

    def launch(self, graph: Graph) -> None:
        """Runs a graph."""
        check(cudart.cudaGraphLaunch(graph.executable, self._stream), "launch a graph")

    def close(self) -> None:
        """Gives it back."""
        cudart.cudaStreamDestroy(self._stream)


class Graph:
    """A recorded run, ready to launch."""

    def __init__(self, graph: Any) -> None:
        try:
            self.executable = check(cudart.cudaGraphInstantiate(graph, 0), "instantiate a graph")
        finally:
            cudart.cudaGraphDestroy(graph)

    def close(self) -> None:
        """Gives it back."""
        cudart.cudaGraphExecDestroy(self.executable)


class DeviceMemory:
    """Bytes on the GPU."""

    def __init__(self, count: int) -> None:
        self.address = int(check(cudart.cudaMalloc(count), f"get {count} bytes on the GPU"))

    def close(self) -> None:
        """Gives them back; calling it again does nothing."""
        if self.address:
            cudart.cudaFree(self.address)
            self.address = 0


class PinnedMemory:
    """Bytes of the host that never move, so that the GPU copies them by itself.

    Attributes:
        address: of the first byte.
        array: uint8, all of them; not to be used after `close`.
    """

    def __init__(self, count: int) -> None:
        self.address = int(check(cudart.cudaHostAlloc(count, 0), f"pin {count} bytes"))
        bytes_ = (ctypes.c_uint8 * count).from_address(self.address)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(memoryview(bytes_), dtype=np.uint8)

    def close(self) -> None:
        """Gives them back; calling it again does nothing."""
        if self.address:
            cudart.cudaFreeHost(self.address)
            self.address = 0


def _said(error: Any) -> str:
    _, text = cudart.cudaGetErrorString(error)
    return f"{text.decode()} ({error.name})"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"

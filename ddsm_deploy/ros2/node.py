"""The node: what it does with a message, whichever transport brings it.

Three threads share it. A transport's thread calls `offer`, which only puts the message where a thread of the node's own
finds it; that one decodes, infers and publishes. `reload` runs in the thread of who asks for it, and holds up neither.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ddsm_deploy.engines import EngineOptions
from ddsm_deploy.errors import DdsmError, InputError
from ddsm_deploy.ros2.options import NodeOptions
from ddsm_deploy.ros2.report import RareReport
from ddsm_deploy.ros2.statistics import Statistics
from ddsm_deploy.ros2.status import Status, StatusReport
from ddsm_deploy.runtime.mailbox import Mailbox
from ddsm_deploy.runtime.manifest import Identity
from ddsm_deploy.runtime.pipeline import identity_of
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.streams.encodings import from_compressed_message, from_image_message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """An image to publish.

    Attributes:
        output: one of `NodeOptions.outputs`.
        header: the header of the message that it was made from, as it is.
        encoding: ``mono8`` or ``bgr8``.
        pixels: uint8, H×W or H×W×3, C-contiguous.
    """

    output: str
    header: Any
    encoding: str
    pixels: npt.NDArray[np.uint8]


class Transport(Protocol):
    """What carries messages; anything beyond is the node's.

    A transport calls `SegmentationNode.offer` for each message, `SegmentationNode.reload` for each request of it (from
    another thread), and `SegmentationNode.fail` with whatever ends one of its threads.
    """

    def start(self) -> None:
        """Begins to listen, in threads of its own."""
        ...

    def publish(self, picture: Picture) -> bool:
        """Sends a picture, from any thread; returns whether it was taken over in time."""
        ...

    def publish_status(self, status: Status) -> None:
        """Sends the diagnostics."""
        ...

    def report(self, text: str) -> None:
        """Shows a line to the operator."""
        ...

    def close(self) -> None:
        """Ends its threads and takes leave of the network; again does nothing."""
        ...


@dataclasses.dataclass(frozen=True)
class _Waiting:
    message: Any
    received: float


@dataclasses.dataclass(frozen=True)
class _Model:
    segmenter: Segmenter
    identity: Identity

    @classmethod
    def opened(cls, options: NodeOptions) -> _Model:
        engine = EngineOptions(outputs=("mask", "confidence") if options.confidence else ("mask",))
        segmenter = Segmenter.open(
            options.model,
            backend=options.backend,
            precision=options.precision,
            threads=options.threads,
            options=engine,
        )
        return cls(segmenter, identity_of(segmenter))

    def __str__(self) -> str:
        return f"{self.identity.model} ({self.identity.sha256[:12]}) on {self.segmenter.label}"


class SegmentationNode:
    """Opens the model; `start` begins to work.

    Attributes:
        options: how it runs.
        statistics: its counters.
        stop: set when the node should end.

    Raises:
        DdsmError: the model can't be opened, see `Segmenter.open`.
    """

    def __init__(self, options: NodeOptions, *, stop: threading.Event | None = None) -> None:
        self.options = options
        self.stop = stop or threading.Event()
        self.statistics = Statistics()
        self._read = from_compressed_message if options.takes_compressed else from_image_message
        self._mailbox: Mailbox[_Waiting] = Mailbox(options.capacity)
        self._status = StatusReport(options)
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._inferring, self._reloading = threading.Lock(), threading.Lock()
        self._model = _Model.opened(options)

    def start(self, transport: Transport) -> None:
        """Begins to work on what is offered. The transport is let go when that ends."""
        self._thread = threading.Thread(target=self._guarded, args=(transport,), name="ddsm-node")
        self._thread.start()

    def offer(self, message: Any) -> None:
        """Takes a message over, at once.

        Args:
            message: a sensor_msgs Image or CompressedImage, or anything with their fields; or an `InputError` in place
                of one that the transport itself could not read.
        """
        self.statistics.count("received")
        if self._mailbox.put(_Waiting(message, time.monotonic())):
            self.statistics.count("dropped")

    def reload(self) -> tuple[bool, str]:
        """Opens the model anew and puts it in the old one's place, between two frames.

        Returns:
            Whether it worked, and in words what runs now or why it failed; then the old model keeps running.
        """
        if not self._reloading.acquire(blocking=False):
            return False, "another reload is under way"
        try:
            return self._exchange_model()
        finally:
            self._reloading.release()

    def status(self) -> Status:
        """The diagnostics now; to be called once a period, for its level is about what happened since the last call."""
        model = self._model
        return self._status.next(self.statistics, model.segmenter, model.identity)

    def fail(self, exc: BaseException) -> None:
        """Ends the node; `close` raises the first of these."""
        self._failure = self._failure or exc
        self.stop.set()

    def finish(self) -> None:
        """Finishes the frame in hand; those that wait are let go."""
        self._mailbox.close(discard=True)
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Finishes, and gives the model back.

        Raises:
            BaseException: what ended the node, if anything did.
        """
        self.finish()
        self._model.segmenter.close()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        return f"{self.options.input} -> {self.options.resolved('~/mask')}: {self._model}"

    def _exchange_model(self) -> tuple[bool, str]:
        try:
            model = _Model.opened(self.options)
        except Exception as exc:  # noqa: BLE001 - whatever a broken file does to a runtime, the old model works
            why = " ".join(str(exc).split()) or type(exc).__name__
            return False, f"reload failed: {why}; the old model keeps running"
        with self._inferring:
            old, self._model = self._model, model
        old.segmenter.close()
        return True, f"reloaded: {model}"

    def _guarded(self, transport: Transport) -> None:
        rarely = RareReport(transport.report)
        try:
            while (waiting := self._mailbox.take()) is not None:
                fate, why = self._fate(waiting, transport)
                if fate == "processed":
                    self.statistics.processed(waiting.received)
                else:
                    self.statistics.count(fate)
                    rarely(fate, why)
        except BaseException as exc:  # noqa: BLE001 - a bug: `close` raises it in the main thread
            self.fail(exc)

    def _fate(self, waiting: _Waiting, transport: Transport) -> tuple[str, str]:
        """What becomes of a message, as a field of `Counts`, and why."""
        if isinstance(waiting.message, InputError):  # raised once more, it would hold this frame, and the transport
            return "damaged", f"damaged message: {waiting.message}"
        try:
            image = self._read(waiting.message)
        except InputError as exc:
            return "damaged", f"damaged message: {exc}"
        try:
            with self._inferring:
                result = self._model.segmenter.predict(image)
        except DdsmError as exc:
            return "failed", f"inference failed: {exc}"
        sent = [transport.publish(picture) for picture in self._pictures(result, waiting.message.header)]
        return ("processed", "") if all(sent) else ("dropped", "a mask was dropped: a subscriber does not keep up")

    def _pictures(self, result: Segmentation, header: Any) -> Iterator[Picture]:
        for output in self.options.outputs:
            pixels = result.color() if output == "color" else getattr(result, output)
            encoding = "bgr8" if output == "color" else "mono8"
            yield Picture(output=output, header=header, encoding=encoding, pixels=np.ascontiguousarray(pixels))

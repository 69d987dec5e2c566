"""The service behind the routes: one Segmenter, a pool of threads, and a place for each request that is let in.

A request takes its place before its body is read, and keeps it until its answer is sent and its work has ended. So
memory is bounded by the number of places, however many clients there are. A thread takes a request's image from bytes
to bytes (decode, predict, encode); the event loop does none of it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import HTTPException
from starlette.requests import ClientDisconnect

from ddsm_deploy.images import decode_image
from ddsm_deploy.runtime.pipeline import identity_of
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.serve.answers import Wanted, encode
from ddsm_deploy.serve.limits import Limits
from ddsm_deploy.serve.metrics import Metrics

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""An ASGI application's way to read its request, and to learn that the client has gone."""

RETRY_SECONDS = 1
"""What a client that finds no place is told to wait."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished request: the answer's body, and stage -> milliseconds that it took."""

    body: bytes
    timings: Mapping[str, float]


class Service:
    """What the routes share; used from the event loop alone, but for `close`.

    Attributes:
        limits: what requests may take.
        metrics: what is told to Prometheus.
        draining: whether it is shutting down.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.metrics = Metrics()
        self.draining = False
        self._segmenter: Segmenter | None = None
        self._sha256 = ""
        self._places = limits.places
        self._pool = concurrent.futures.ThreadPoolExecutor(limits.threads, thread_name_prefix="ddsm-serve")

    def begin(self, segmenter: Segmenter) -> None:
        """From now on there is a model; the service closes it."""
        self._sha256 = identity_of(segmenter).sha256
        self._segmenter = segmenter

    @property
    def ready(self) -> bool:
        """Whether requests are welcome."""
        return self._segmenter is not None and not self.draining

    @property
    def segmenter(self) -> Segmenter:
        """The model.

        Raises:
            HTTPException: 503, it is still being loaded.
        """
        if self._segmenter is None:
            raise _unavailable("the model is still being loaded")
        return self._segmenter

    def describe(self) -> dict[str, Any]:
        """The model that runs, as `schema.Model` has it."""
        segmenter = self.segmenter
        spec = segmenter.spec
        classes = [
            {"id": index, "name": name, "color": list(spec.palette[index])} for index, name in enumerate(spec.classes)
        ]
        facts = {name: getattr(segmenter, name) for name in ("backend", "precision", "sampling", "fit")}
        size = None if segmenter.size is None else list(segmenter.size)
        return {"name": spec.name, "classes": classes, "size": size, "sha256": self._sha256, **facts}

    def admit(self) -> Visit:
        """A place for a request.

        Raises:
            HTTPException: 503, all are taken, or there is no model yet.
        """
        segmenter = self.segmenter
        if self._places == 0:
            raise _unavailable(f"busy: {self.limits.places} requests are in already")
        self._places -= 1
        self.metrics.in_flight.inc()
        return Visit(self, segmenter)

    def give_back(self) -> None:
        """A place is free again."""
        self._places += 1
        self.metrics.in_flight.dec()

    def submit(self, job: Job) -> concurrent.futures.Future[Answer]:
        """Has a thread do the job when its turn comes."""
        return self._pool.submit(job)

    def close(self) -> None:
        """Waits for the threads, and closes the model."""
        self._pool.shutdown(cancel_futures=True)
        if self._segmenter is not None:
            self._segmenter.close()


class Job:
    """One image's way from bytes to bytes, in a thread."""

    def __init__(self, data: bytes, wanted: Wanted, segmenter: Segmenter, service: Service) -> None:
        self._data, self._wanted, self._segmenter = data, wanted, segmenter
        self._limits, self._metrics = service.limits, service.metrics
        self._made = time.perf_counter()
        self._metrics.queued.inc()

    def drop(self) -> None:
        """It will not be done: a cancelled job stays in the pool's queue for a while, but not its image."""
        self._data = b""
        self._metrics.queued.dec()

    def __call__(self) -> Answer:
        self._metrics.queued.dec()
        begun = time.perf_counter()
        data, self._data = self._data, b""
        image = decode_image(data, max_pixels=self._limits.max_pixels)
        del data
        decoded = time.perf_counter()
        segmentation = self._segmenter.predict(image)
        segmented = time.perf_counter()
        self._metrics.inference.observe(segmentation.timings["infer"] / 1e3)
        body = encode(segmentation, image, self._wanted)
        timings = {
            "queue": (begun - self._made) * 1e3,
            "decode": (decoded - begun) * 1e3,
            **segmentation.timings,
            "encode": (time.perf_counter() - segmented) * 1e3,
        }
        return Answer(body, timings)


class Visit:
    """A request that has a place."""

    def __init__(self, service: Service, segmenter: Segmenter) -> None:
        self._service = service
        self._segmenter = segmenter
        self._work: concurrent.futures.Future[Answer] | None = None

    async def work(self, data: bytes, wanted: Wanted, receive: Receive) -> Answer:
        """Has a thread segment the image; what has not begun is given up when the client goes or the time is over.

        Raises:
            DdsmError: as `decode_image`, `Segmenter.predict` and `encode`.
            HTTPException: 504, it took too long.
            ClientDisconnect: the client has gone.
        """
        job = Job(data, wanted, self._segmenter, self._service)
        self._work = self._service.submit(job)
        answer = asyncio.wrap_future(self._work)
        answer.add_done_callback(_note)
        gone = asyncio.create_task(_gone(receive))
        seconds = self._service.limits.seconds
        try:
            await asyncio.wait((answer, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                raise ClientDisconnect
            raise HTTPException(504, f"not done within {seconds:g} s")
        finally:
            gone.cancel()
            if self._work.cancel():
                job.drop()

    def leave(self) -> None:
        """Gives the place back, once a thread that still works for it has ended."""
        if self._work is None or self._work.done():
            self._service.give_back()
            return
        loop = asyncio.get_running_loop()
        self._work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._service.give_back))


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _note(answer: asyncio.Future[Answer]) -> None:
    """What a job that nobody waits for any more ended with; asyncio would log it otherwise."""
    if not answer.cancelled():
        answer.exception()


def _unavailable(why: str) -> HTTPException:
    return HTTPException(503, why, headers={"Retry-After": str(RETRY_SECONDS)})

"""What the service tells Prometheus about itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The figures of one service; thread-safe, as prometheus_client's are.

    Attributes:
        requests: answered requests by route and status; 499 are clients that went before they had an answer.
        seconds: from a request's head to the end of its answer, by route.
        inference: the network alone.
        in_flight: requests that have a place: being uploaded, waiting, worked on or answered.
        queued: uploaded and waiting for a thread.
    """

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter("ddsm_requests", "Answered requests.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "ddsm_request_seconds", "From head to end of answer.", ["route"], buckets=_SECONDS, registry=own
        )
        self.inference = Histogram("ddsm_inference_seconds", "The network alone.", buckets=_SECONDS, registry=own)
        self.in_flight = Gauge("ddsm_in_flight", "Requests that have a place.", registry=own)
        self.queued = Gauge("ddsm_queue_depth", "Uploaded and waiting for a thread.", registry=own)

    def text(self) -> bytes:
        """All of it, as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

"""A node's diagnostics, as diagnostic_msgs/DiagnosticStatus holds them."""

from __future__ import annotations

import dataclasses
import socket

from ddsm_deploy.ros2.options import NodeOptions
from ddsm_deploy.ros2.statistics import Counts, Statistics, Window
from ddsm_deploy.runtime.manifest import Identity
from ddsm_deploy.runtime.segmenter import Segmenter

OK, WARN, ERROR = 0, 1, 2
"""Levels of diagnostic_msgs/DiagnosticStatus."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """One diagnostic_msgs/DiagnosticStatus.

    Attributes:
        level: `OK`, `WARN` or `ERROR`.
        name: what it is about.
        message: in words.
        hardware_id: the computer's name.
        values: keys with their values.
    """

    level: int
    name: str
    message: str
    hardware_id: str
    values: tuple[tuple[str, str], ...]


class StatusReport:
    """Makes one status after the other; a level tells of what happened since the one before."""

    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self._before = Counts()
        self._host = socket.gethostname()

    def next(self, statistics: Statistics, segmenter: Segmenter, identity: Identity) -> Status:
        """The status now."""
        counts, window = statistics.counts, statistics.window
        level, message = self._verdict(counts, window)
        self._before = counts
        figures = {
            "rate": f"{window.rate:.2f}",
            "latency p50 (ms)": _milliseconds(window.p50),
            "latency p99 (ms)": _milliseconds(window.p99),
            **dataclasses.asdict(counts),
            "topic": self._options.input,
            "policy": self._options.policy,
            "model": identity.model,
            "sha256": identity.sha256,
            "backend": segmenter.backend,
            "precision": segmenter.precision,
            "sampling": segmenter.sampling,
        }
        return Status(
            level=level,
            name=f"{self._options.full_name.removeprefix('/')}: segmentation",
            message=message,
            hardware_id=self._host,
            values=tuple((key, str(value)) for key, value in figures.items()),
        )

    def _verdict(self, counts: Counts, window: Window) -> tuple[int, str]:
        new = {name: count - getattr(self._before, name) for name, count in dataclasses.asdict(counts).items()}
        if new["failed"]:
            return ERROR, f"inference failed on {new['failed']} frames"
        if new["damaged"]:
            return WARN, f"{new['damaged']} damaged messages"
        if new["dropped"] and self._options.policy == "every":  # what `latest` is for is no fault
            return WARN, f"{new['dropped']} frames dropped"
        if window.p50 is None:
            return WARN, "no frames"
        return OK, f"{window.rate:.1f} frames a second"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"

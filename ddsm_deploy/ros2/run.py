"""Running a node until it is told to stop."""

from __future__ import annotations

import functools
import importlib.util
import threading
import time
from collections.abc import Callable

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.ros2.node import SegmentationNode, Transport
from ddsm_deploy.ros2.options import NodeOptions
from ddsm_deploy.runtime.segmenter import AUTO

TRANSPORTS = ("rclpy", "cyclonedds")

STATUS_SECONDS = 1.0
"""Time between two diagnostics."""


def run(
    options: NodeOptions,
    *,
    stop: threading.Event,
    transport: str = AUTO,
    report: Callable[[str], None],
) -> None:
    """Runs a node.

    Args:
        options: how.
        stop: once set, the node finishes the frame in hand and ends.
        transport: ``rclpy``, ``cyclonedds``, or ``auto``: the first of them that is installed.
        report: gets lines for the operator: one that says what runs once it listens, and what goes wrong. With rclpy
            those go to its log instead.

    Raises:
        ConfigError: no such transport.
        BackendError: the transport or the model's backend is missing or fails.
        DdsmError: the model can't be opened, see `Segmenter.open`.
    """
    name = chosen(transport)
    make = _maker(name, report)
    with SegmentationNode(options, stop=stop) as node:
        carrier = make(node)
        try:
            node.start(carrier)
            carrier.start()
            carrier.report(f"{options.full_name} on {name}, domain {options.domain}: {node}")
            _tell_status(node, carrier)
        finally:
            node.finish()
            carrier.close()


def chosen(transport: str) -> str:
    """The transport that a word stands for.

    Raises:
        ConfigError: there is none of that name.
    """
    if transport == AUTO:
        return "rclpy" if importlib.util.find_spec("rclpy") else "cyclonedds"
    if transport not in TRANSPORTS:
        raise ConfigError(f"transport is {transport!r}; expected auto, {' or '.join(TRANSPORTS)}")
    return transport


def _maker(name: str, report: Callable[[str], None]) -> Callable[[SegmentationNode], Transport]:
    """What makes the transport; its package is looked for here, before a model is opened."""
    if name == "rclpy":
        from ddsm_deploy.ros2.rclpy import RclpyTransport

        return RclpyTransport
    from ddsm_deploy.ros2.cyclonedds import CycloneTransport

    return functools.partial(CycloneTransport, report=report)


def _tell_status(node: SegmentationNode, carrier: Transport) -> None:
    due = time.monotonic() + STATUS_SECONDS
    while not node.stop.wait(max(0.0, due - time.monotonic())):
        carrier.publish_status(node.status())
        due = max(due + STATUS_SECONDS, time.monotonic())  # after a pause of the machine, no burst

"""`ddsm ros2`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Annotated

import typer

from ddsm_deploy.cli.options import Backend, Model, Precision


def ros2(
    topic: Annotated[str, typer.Argument(help="Frames come from there; ~/x is the node's own, x the namespace's.")],
    model: Model = "ddsm-lite0",
    backend: Backend = "auto",
    precision: Precision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one inference; else the runtime's.")] = None,
    policy: Annotated[
        str, typer.Option(help="latest drops a waiting frame when a newer one comes; every lets them queue.")
    ] = "latest",
    queue: Annotated[int, typer.Option(min=1, help="With every: how many may wait; then the oldest goes.")] = 10,
    compressed: Annotated[
        bool | None,
        typer.Option("--compressed/--raw", help="Frames are CompressedImage or Image; else by .../compressed."),
    ] = None,
    reliable: Annotated[
        bool, typer.Option("--reliable", help="Ask for every frame; takes a reliable publisher.")
    ] = False,
    color: Annotated[bool, typer.Option("--color", help="Also publish masks in colour.")] = False,
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Also publish the confidence of each pixel.")
    ] = False,
    transport: Annotated[str, typer.Option(help="rclpy, cyclonedds, or auto: rclpy where it is.")] = "auto",
    domain: Annotated[int, typer.Option(envvar="ROS_DOMAIN_ID", help="DDS domain.")] = 0,
    node_name: Annotated[str, typer.Option(help="The node's name.")] = "ddsm",
    namespace: Annotated[str, typer.Option(help="In front of it.")] = "/",
) -> None:
    """Segment the images of a ROS 2 topic: mono8 masks on ~/mask, with ROS 2 or without; Ctrl-C ends it."""
    from ddsm_deploy.ros2.options import NodeOptions
    from ddsm_deploy.ros2.run import run

    options = NodeOptions(
        topic=topic,
        compressed=compressed,
        reliable=reliable,
        model=model,
        backend=backend,
        precision=precision,
        threads=threads,
        policy=policy,
        queue=queue,
        color=color,
        confidence=confidence,
        name=node_name,
        namespace=namespace,
        domain=domain,
    )
    with _signals_stop() as (stop, interrupted):
        run(options, stop=stop, transport=transport, report=lambda text: print(f"ddsm: {text}", file=sys.stderr))
    if interrupted.is_set():
        raise typer.Exit(130)


@contextlib.contextmanager
def _signals_stop() -> Iterator[tuple[threading.Event, threading.Event]]:
    """The first Ctrl-C or SIGTERM sets the first event, Ctrl-C the second too; another Ctrl-C raises as usual."""
    stop, interrupted = threading.Event(), threading.Event()

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if interrupted.is_set():
                raise KeyboardInterrupt
            interrupted.set()
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Ray itself: joining a cluster or starting one here, quietly, and what went wrong in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
from collections.abc import Iterator
from typing import Any

from ddsm_deploy.errors import BackendError, BackendMissing, ConfigError
from ddsm_deploy.ray.options import RayOptions
from ddsm_deploy.runtime.decisions import usable_cores

_STARTS = 3
"""Ray gives its own helper processes some 20 seconds to start. On a busy machine the next try finds them in memory."""

_KNOCK_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """How many workers run, and how many cores each takes."""

    workers: int
    threads: int


@contextlib.contextmanager
def ray_cluster(options: RayOptions) -> Iterator[Shape]:
    """A connection to Ray; ended with the block, with all that was started for it, unless it was there before.

    Raises:
        BackendMissing: Ray is not installed.
        BackendError: it can't be started, or the cluster can't be reached.
        ConfigError: no machine has as many cores as a worker shall take.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield _shape(options, _cores(ray))
        return
    _connect(ray, options)
    try:
        yield _shape(options, _cores(ray))
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """The module ray, with ray.data.

    Raises:
        BackendMissing: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise BackendMissing("ray", extra="ray", why=str(exc)) from exc
    return ray


@contextlib.contextmanager
def quiet_data(retries: int) -> Iterator[None]:
    """Ray Data as a run has it: without messages, and going on where a worker died for good.

    Its messages are in its own file still, ``ray-data.log`` in the session's folder of logs.
    """
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1
    context.max_consecutive_actor_init_deaths = retries
    handlers = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in handlers]
    with DataContext.current(context):
        try:
            for handler in handlers:
                handler.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for handler, level in zip(handlers, levels, strict=True):
                handler.setLevel(level)


def _connect(ray: Any, options: RayOptions) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if options.address is not None:
            _knock(options.address)
            ray.init(options.address, **quiet)
            return
        cores = max(usable_cores(), (options.workers or 1) * (options.threads or 1))
        for attempt in range(1, _STARTS + 1):
            try:
                ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
                return
            except Exception:  # Ray has no type for it
                ray.shutdown()
                if attempt == _STARTS:
                    raise
    except Exception as exc:
        what = f"no Ray cluster can be reached at {options.address}" if options.address else "Ray does not start here"
        raise BackendError(f"{what} ({' '.join(str(exc).split()) or type(exc).__name__})") from exc


def _knock(address: str) -> None:
    """Sees whether anyone listens at ``HOST:PORT``; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _cores(ray: Any) -> list[int]:
    """Cores of each machine that has any."""
    cores = (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return [count for count in cores if count] or [1]


def _shape(options: RayOptions, cores: list[int]) -> Shape:
    if options.threads is not None and options.threads > max(cores):
        raise ConfigError(
            f"a worker shall have {options.threads} threads, and no machine of the cluster has more than "
            f"{max(cores)} cores; take fewer threads"
        )
    workers = options.workers
    if workers is None:
        workers = sum(count // options.threads for count in cores) if options.threads else len(cores)
    on_each = -(-workers // len(cores))
    return Shape(workers, options.threads or max(1, min(cores) // on_each))

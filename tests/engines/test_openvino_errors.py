"""What is raised while OpenVINO computes, in our operators or by a signal handler, reaches who asked for the masks."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddsm_deploy import kernels
from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.errors import BackendError

OPTIONS = {
    "one thread": EngineOptions(threads=1),
    "one stream": EngineOptions(threads=1, streams=1, hint="throughput"),
    "two threads": EngineOptions(threads=2),
    "two streams": EngineOptions(threads=2, streams=2, hint="throughput"),
}


class Interrupt(BaseException):
    """Raised by the handler of the tests' signal."""


@pytest.fixture(autouse=True)
def _kernels(need, missing) -> None:
    need("openvino")
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Sends a signal whose handler, in the main thread, raises `Interrupt`."""

    def handler(*_: Any) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda: signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def images() -> tuple[np.ndarray, np.ndarray]:
    made = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 96, 3), dtype=np.uint8)
    return made[0], made[1] // 4


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], None]) -> list[str]:
    """Has the next call of a function do something first. The list has a name in it after that."""
    real, done = getattr(owner, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(name)
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return done


def fail() -> None:
    raise MemoryError("no memory for the scratch")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_operator_that_fails(tiny_fused: Path, monkeypatch: pytest.MonkeyPatch, options: EngineOptions) -> None:
    first, second = images()
    with open_engine(resolve(tiny_fused), "openvino", options) as engine:
        before, wanted = (engine.run({"image": image})["mask"] for image in (first, second))
        assert (before != wanted).any()
        engine.run({"image": first})
        done = once(monkeypatch, kernels, "forward", fail)
        with pytest.raises(BackendError, match="no memory for the scratch"):
            engine.run({"image": second})
        assert done
        np.testing.assert_array_equal(engine.run({"image": second})["mask"], wanted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_signal_within_an_operator(
    tiny_fused: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None], options: EngineOptions
) -> None:
    first, second = images()
    with open_engine(resolve(tiny_fused), "openvino", options) as engine:
        wanted = engine.run({"image": second})["mask"]
        engine.run({"image": first})
        done = once(monkeypatch, kernels, "forward", interrupt)
        with pytest.raises(Interrupt):
            engine.run({"image": second})
        assert done
        for _ in range(3):
            np.testing.assert_array_equal(engine.run({"image": second})["mask"], wanted)


def test_a_signal_while_the_graph_is_compiled(
    tiny_fused: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None]
) -> None:
    from ddsm_deploy.engines import openvino_op

    done = once(monkeypatch, openvino_op.SampleAttention, "validate_and_infer_types", interrupt)
    with pytest.raises(Interrupt):
        open_engine(resolve(tiny_fused), "openvino", EngineOptions(threads=1))
    assert done

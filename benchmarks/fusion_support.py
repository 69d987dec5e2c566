"""What the benchmarks of the sampling branches share: the two networks as files, a frame, turns, the machine."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from precision_speed import without_branches

import ddsm_deploy
from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.evaluate.machine import machine_facts
from ddsm_deploy.export import ExportOptions, export_onnx
from ddsm_deploy.images import read_image

QUIET = 0.5
"""Load average above which timings on two cores are not to be trusted."""

FRAME = Path(ddsm_deploy.__file__).parent / "runtime" / "frames" / "street_0.jpg"
"""A street scene: on noise the predicted offsets, and so the places that are read, would be wilder than in use."""

CONFIGURATIONS = (("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32"))

SIDES = ("ddsm", "add")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """The two networks that are compared, as ONNX files: the same weights, with the sampling branches and without.

    Attributes:
        files: ``ddsm`` and ``add`` -> file.
        size: rows and columns of the image that both take.
        sampling: form in which the operator was written.
    """

    files: dict[str, Path]
    size: tuple[int, int]
    sampling: str

    def artifact(self, side: str) -> Artifact:
        return resolve(str(self.files[side]))


def checkpoints(folder: Path, model: str) -> dict[str, Path]:
    """Side -> checkpoint: that of `model`, and its weights less those of the branches."""
    checkpoint = resolve(model).file("checkpoint")
    return {"ddsm": checkpoint, "add": without_branches(checkpoint, folder / "add.safetensors")}


def export_pair(folder: Path, sides: dict[str, Path], size: tuple[int, int], sampling: str) -> Pair:
    """Both checkpoints as ONNX files of one size. They are not compared with torch: `ddsm verify` and the tests do."""
    files = {side: folder / f"{side}-{size[0]}x{size[1]}.onnx" for side in SIDES}
    for side, file in files.items():
        # the plain pyramid holds no sampling, so every form of it is the same graph
        form = sampling if side == "ddsm" else "portable"
        export_onnx(sides[side], file, ExportOptions(size=size, sampling=form, verify=False))
    return Pair(files=files, size=size, sampling=sampling)


def frame(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """`FRAME` as the networks take it: uint8 1×H×W×3, BGR."""
    image = cv2.resize(read_image(FRAME), (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(image[None])


def parse_size(text: str) -> tuple[int, int]:
    """``360x480`` -> rows and columns, an argparse type."""
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"size is {text!r}; expected rows x columns, such as 360x480")
    return int(rows), int(columns)


def alternate(
    sides: Sequence[Callable[[], object]], *, rounds: int, block: int = 5, settle: int = 1
) -> list[list[float]]:
    """Times functions in turns, so that a change of the machine's speed meets all of them alike.

    A turn is a block of calls, the first ones not counted: a runtime's threads spin for a while after a call, waiting
    for the next, and take the cores from whoever is called right then (seen with ONNX Runtime on two cores: the plain
    pyramid took 44 ms in turns of one call, and 23 ms in blocks, as it does alone).

    Args:
        sides: what is timed, each called in every round; who begins changes.
        rounds: those that count; one more goes before them.
        block: calls a round and side that count.
        settle: calls before them that do not.

    Returns:
        For each side, its rounds × block times in milliseconds.
    """
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(1 + rounds):
        order = range(len(sides)) if turn % 2 else reversed(range(len(sides)))
        for index in order:
            taken = [_timed(sides[index]) for _ in range(settle + block)]
            if turn:
                times[index] += taken[settle:]
    return times


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def compare(ddsm: Sequence[float], add: Sequence[float]) -> dict[str, Any]:
    """The fields of a row: medians, their ratio, and how far the middle 80 % of the times spread, milliseconds."""
    fused, plain = statistics.median(ddsm), statistics.median(add)
    return {
        "ms_fused": fused,
        "ms_add": plain,
        "ratio": fused / plain,
        "runs": min(len(ddsm), len(add)),
        "p10_p90_fused": list(np.percentile(ddsm, (10, 90))),
        "p10_p90_add": list(np.percentile(add, (10, 90))),
    }


def announce_machine() -> dict[str, Any]:
    """Prints what is measured on, warns where other work runs beside it, and returns the facts."""
    facts = machine_facts()
    load = (facts["load_average"] or [0.0])[0]
    print(f"{facts['cpu']}, {facts['cores_usable']} cores, load average {load:.2f} at the start")
    if load > QUIET:
        print(f"warning: the load average is {load:.2f}, so other work shares these figures", file=sys.stderr)
    return facts

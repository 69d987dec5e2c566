"""Whether a model keeps a deadline: frames come at a camera's pace, and each one's latency is measured end to end.

`benchmark` asks how fast a model is; this asks how late its masks are. See docs/deadlines.md.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import BACKENDS, EngineOptions
from ddsm_deploy.errors import ConfigError
from ddsm_deploy.evaluate.baseline import Baseline, Gate, Verdict, judge
from ddsm_deploy.evaluate.benchmark import list_images
from ddsm_deploy.evaluate.busy import WHAT, busy_processes
from ddsm_deploy.evaluate.machine import machine_facts
from ddsm_deploy.evaluate.pacing import MEMORY_SECONDS, Floats, Record, Schedule, run_paced
from ddsm_deploy.images import Image, read_image
from ddsm_deploy.runtime.flow import POLICIES
from ddsm_deploy.runtime.gate import OWN_FRAMES, own_frames
from ddsm_deploy.runtime.segmenter import AUTO, Segmenter

_MOST_FRAMES = 10_000_000

_METHOD = {
    "latency": "from the moment the frame was due to its mask at the image's own size; of all delivered frames",
    "deadline_misses": "frames whose mask came later than the deadline; dropped ones are counted apart",
    "dropped": "frames that never got a mask",
    "jitter": "jitter_ms: standard deviation of the latency; jitter_p99_p50_ms: p99 less p50",
    "reordered": "masks that came out after the mask of a later frame",
    "mixed_up": "masks not equal, to the pixel, to the mask that their own frame got before the run",
    "rss_growth": f"resident memory at the end less that after warm-up; looked at every {MEMORY_SECONDS} s",
    "camera": "absolute schedule, a thread of its own that sleeps and never waits for the segmenter",
    "pipeline": "Segmenter.predict, one image at a time, on one thread of this process",
    "background_load": WHAT,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacedOptions:
    """How frames come, what runs, and what is asked of it.

    Attributes:
        rate: frames a second.
        deadline_ms: the mask is to be there so long after its frame was due; None is one frame's period.
        duration: seconds of frames.
        policy: see `pacing.Schedule`.
        load: busy processes beside the measurement.
        images: folder of images to show in turn; None means the package's own street scenes.
        backend: see `Segmenter.open`, as for the next three.
        precision: None is the model's own, and with ``auto`` whichever is quickest.
        sampling: None is fused where it can be had.
        provider: of onnxruntime: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: of one inference; None leaves it to the runtime.
        warm_up: runs before the first frame.
        gate: what makes the run fail; None only measures.
    """

    rate: float
    deadline_ms: float | None = None
    duration: float = 60.0
    policy: str = "latest"
    load: int = 0
    images: Path | None = None
    backend: str = AUTO
    precision: str | None = None
    sampling: str | None = None
    provider: str = "cpu"
    threads: int | None = None
    warm_up: int = 10
    gate: Gate | None = None

    def __post_init__(self) -> None:
        numbers = (
            ("rate", self.rate, "frames a second"),
            ("deadline", self.deadline, "ms"),
            ("duration", self.duration, "seconds"),
        )
        for name, value, unit in numbers:
            if not 0 < value < math.inf:
                raise ConfigError(f"the {name} is {value} {unit}; expected more than 0")
        if self.frames > _MOST_FRAMES:
            raise ConfigError(f"{self.rate:g} frames a second for {self.duration:g} s are more than {_MOST_FRAMES}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy is {self.policy!r}; expected {' or '.join(POLICIES)}")
        if self.load < 0:
            raise ConfigError(f"the load is {self.load} processes; expected 0 or more")
        if self.warm_up < 0:
            raise ConfigError(f"warm-up is {self.warm_up} runs; expected at least 0")
        if self.backend not in (AUTO, *BACKENDS):
            raise ConfigError(f"backend is {self.backend!r}; expected one of {AUTO}, {', '.join(BACKENDS)}")
        EngineOptions(  # checks them
            precision=self.precision, sampling=self.sampling, threads=self.threads, provider=self.provider
        )

    @property
    def deadline(self) -> float:
        """The deadline in milliseconds."""
        if self.deadline_ms is not None:
            return self.deadline_ms
        return 1000 / self.rate if self.rate else math.nan

    @property
    def frames(self) -> int:
        """How many frames come."""
        return max(1, round(self.rate * self.duration))

    @property
    def schedule(self) -> Schedule:
        """When frames come; those that wait in the end have as long again."""
        return Schedule(rate=self.rate, frames=self.frames, policy=self.policy, patience=self.duration)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacedResult:
    """A paced run and its figures.

    Attributes:
        settings: what ran and how, as JSON values: model, size, backend, precision, sampling, threads, rate, ….
        choice: who chose the backend, and why.
        distinct_masks: different masks among the images; below 2, mixed-up ones can't be told.
        options: as asked for.
        machine: see `machine.machine_facts`.
        record: every frame's times.
        verdict: of the gate; None where none was asked for, or the run was interrupted.
    """

    settings: dict[str, Any]
    choice: str
    distinct_masks: int
    options: PacedOptions
    machine: dict[str, Any]
    record: Record
    verdict: Verdict | None = None

    @property
    def size(self) -> str:
        """Height and width that the network ran at, in words."""
        height, width = self.settings["height"], self.settings["width"]
        return "each image's own size" if height is None else f"{height}x{width}"

    def fields(self, *, per_frame: bool = False) -> dict[str, Any]:
        """The result as JSON values, times in milliseconds; null where no frame was delivered.

        Args:
            per_frame: add every frame's latency (null for a dropped one), and the memory's curve.
        """
        record, frames = self.record, len(self.record.due)
        latencies = record.latencies_ms[record.delivered]
        late = int(np.sum(latencies > self.options.deadline))
        p50, p99 = _percentile(latencies, 50), _percentile(latencies, 99)
        work = (record.done - record.taken)[record.delivered] * 1e3
        camera = (record.arrived - record.due)[~np.isnan(record.arrived)] * 1e3
        result: dict[str, Any] = {
            "settings": self.settings,
            "choice": self.choice,
            "machine": self.machine,
            "method": {**_METHOD, "garbage_collector": "on" if gc.isenabled() else "off"},
            "frames": frames,
            "interrupted": record.interrupted,
            "delivered": len(latencies),
            "dropped": frames - len(latencies),
            "deadline_misses": late,
            "deadline_miss_share": late / frames,
            "drop_share": 1 - len(latencies) / frames,
            "in_time_share": (len(latencies) - late) / frames,
            "reordered": record.reordered,
            "mixed_up": record.mixed_up,
            "distinct_masks": self.distinct_masks,
            "p50_ms": p50,
            "p95_ms": _percentile(latencies, 95),
            "p99_ms": p99,
            "max_ms": _percentile(latencies, 100),
            "mean_ms": float(np.mean(latencies)) if len(latencies) else None,
            "jitter_ms": float(np.std(latencies)) if len(latencies) else None,
            "jitter_p99_p50_ms": None if p50 is None or p99 is None else p99 - p50,
            "work_p50_ms": _percentile(work, 50),
            "work_p99_ms": _percentile(work, 99),
            "camera_late_p99_ms": _percentile(camera, 99),
            "camera_late_max_ms": _percentile(camera, 100),
            **_memory(record.memory[:, 1]),
            "verdict": None if self.verdict is None else self.verdict.fields(),
        }
        if per_frame:
            result["latencies_ms"] = [None if math.isnan(value) else value for value in record.latencies_ms.tolist()]
            result["rss_curve"] = [[s, None if math.isnan(mb) else mb] for s, mb in record.memory.tolist()]
        return result

    def to_json(self, *, per_frame: bool = False) -> str:
        """`fields` as JSON text."""
        return json.dumps(self.fields(per_frame=per_frame), indent=2, ensure_ascii=False)


def bench_paced(
    model: str | Path | None, options: PacedOptions, *, progress: Callable[[str], None] | None = None
) -> PacedResult:
    """Measures how late a model's masks are when frames come at a camera's pace.

    Args:
        model: file, bundle folder or shipped name; None is the default model.
        options: how frames come, and what runs.
        progress: called with what is going on, never while frames come.

    Raises:
        DdsmError: as `Segmenter.open`; an image or the baseline can't be read; the background load ended early.
        ConfigError: the baseline is of another model, precision or rate.
        KeyboardInterrupt: Ctrl-C before the first frame, or a second one. A first one later than that ends the run,
            and the result is of what came before (`Record.interrupted`).
    """
    report = progress or (lambda text: None)
    gate = options.gate
    baseline = Baseline(gate.baseline) if gate is not None and gate.baseline is not None else None
    artifact = resolve(model)
    machine = machine_facts()  # before anything runs: its load average is that of the others
    images, source = _images(options.images)
    report("opening")
    with _open(artifact, options) as segmenter:
        settings = _settings(artifact, segmenter, options, source)
        if baseline is not None:
            baseline.check_settings(settings)
        masks = [segmenter.predict(image).mask.copy() for image in images]
        record = Record(options.schedule, masks)
        with busy_processes(options.load):
            report(f"{segmenter.label}: {options.frames} frames in {options.duration:g} s")
            run_paced(segmenter.predict, images, record, warm_up=options.warm_up)
    result = PacedResult(
        settings=settings,
        choice=segmenter.choice,
        distinct_masks=len({(mask.shape, mask.tobytes()) for mask in masks}),
        options=options,
        machine=machine,
        record=record,
    )
    if gate is None or record.interrupted:  # what was not asked to the end is neither passed nor failed
        return result
    return dataclasses.replace(result, verdict=judge(gate, result.fields(), baseline))


def _images(folder: Path | None) -> tuple[list[Image], str]:
    if folder is None:
        return own_frames(), OWN_FRAMES
    found = list_images(folder)
    return [read_image(path) for path in found], f"{len(found)} of {folder}"


def _open(artifact: Artifact, options: PacedOptions) -> Segmenter:
    engine = EngineOptions(sampling=options.sampling, provider=options.provider)
    return Segmenter.open(
        artifact, backend=options.backend, precision=options.precision, threads=options.threads, options=engine
    )


def _settings(artifact: Artifact, segmenter: Segmenter, options: PacedOptions, images: str) -> dict[str, Any]:
    height, width = segmenter.size or (None, None)  # null where that is each image's own
    return {
        "model": artifact.name,
        "height": height,
        "width": width,
        "backend": segmenter.backend,
        "precision": segmenter.precision,
        "sampling": segmenter.sampling,
        "threads": options.threads,
        "rate": options.rate,
        "deadline_ms": options.deadline,
        "duration": options.duration,
        "policy": options.policy,
        "load": options.load,
        "images": images,
        "warm_up": options.warm_up,
        **({} if options.provider == "cpu" else {"provider": options.provider}),  # baselines without it are of CPUs
    }


def _percentile(values: Floats, share: float) -> float | None:
    """The value that `share` per cent keep to (linear between neighbours); None of nothing."""
    return float(np.percentile(values, share)) if len(values) else None


def _memory(resident: Floats) -> dict[str, float | None]:
    if np.isnan(resident).all():
        return {"rss_mb": None, "rss_max_mb": None, "rss_growth_mb": None}
    first, last = float(resident[0]), float(resident[-1])
    return {"rss_mb": first, "rss_max_mb": float(np.nanmax(resident)), "rss_growth_mb": last - first}

"""Calibration: what ranges a network's tensors take on some images.

Ranges are kept in the user's cache folder, under the fingerprints of the images and of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.cache import cache_folder
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.export.onnxgraph import Graph, save_graph, value_bytes, with_outputs
from ddsm_deploy.export.qdq import Range, calibrated_tensors
from ddsm_deploy.files import replacing
from ddsm_deploy.frames import FrameList
from ddsm_deploy.images import read_image
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import ModelSpec

METHODS = ("percentile", "minmax", "entropy")

SAMPLES = 4096
"""Values of each tensor kept of each image, at random places that are the same in every run."""

PASS_BYTES = 500_000_000
"""Tensors that are made outputs at once may take so much memory an image; more are measured in several passes."""

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""


def ranges_of(
    graph: Graph,
    spec: ModelSpec,
    frames: FrameList,
    *,
    method: str = "percentile",
    percentile: float = 99.99,
    fingerprint: str,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Range]:
    """What range each tensor of `qdq.calibrated_tensors` needs, measured with ONNX Runtime or read from the cache.

    Args:
        graph: a `plain_graph`, float32.
        spec: of the model.
        frames: to calibrate on.
        method: ``minmax`` (all values), ``percentile`` (all but the outermost on either side), or ``entropy`` (the
            threshold that loses least information, by Kullback and Leibler's measure as TensorRT has it).
        percentile: share of the values that ``percentile`` keeps on each side, per cent, above 50.
        fingerprint: of the frames and the model, for the cache.
        threads: of the inferences.
        progress: see `Progress`.

    Raises:
        ConfigError: no such method or percentile.
        BackendMissing: ONNX Runtime is not installed.
    """
    if method not in METHODS:
        raise ConfigError(f"calibration method is {method!r}; expected one of {', '.join(METHODS)}")
    if not 50 < percentile <= 100:
        raise ConfigError(f"percentile is {percentile}; expected above 50, at most 100")
    names = calibrated_tensors(graph)
    key = hashlib.sha256(f"{fingerprint} {percentile} {SAMPLES} {names}".encode()).hexdigest()
    place = cache_folder() / "calibration" / f"{key}.json"
    kept = _read_cache(place, names)
    if kept is None:
        kept = _measure(graph, spec, frames, names, percentile, threads, progress)
        _write_cache(place, kept)
    return {name: (low, high) for name, (low, high) in kept[method].items()}


def _measure(
    graph: Graph,
    spec: ModelSpec,
    frames: FrameList,
    names: list[str],
    percentile: float,
    threads: int | None,
    progress: Progress | None,
) -> dict[str, dict[str, Range]]:
    kept: dict[str, dict[str, Range]] = {method: {} for method in METHODS}
    groups = list(_groups(value_bytes(graph, names)))
    for number, group in enumerate(groups):
        values: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in group}
        ends: dict[str, Range] = {}
        for done, outputs in enumerate(_outputs(graph, spec, frames, group, threads), start=1):
            for name, array in outputs.items():
                low, high = ends.get(name, (np.inf, -np.inf))
                ends[name] = (min(low, float(array.min())), max(high, float(array.max())))
                values[name].append(_sampled(array))
            if progress:
                progress("calibrating", number * len(frames) + done, len(groups) * len(frames))
        for name in group:
            every = np.concatenate(values[name])
            kept["minmax"][name] = ends[name]
            low, high = np.percentile(every, [100 - percentile, percentile])
            kept["percentile"][name] = (float(low), float(high))
            limit = entropy_threshold(every)
            kept["entropy"][name] = (max(ends[name][0], -limit), min(ends[name][1], limit))
    return kept


def _outputs(
    graph: Graph, spec: ModelSpec, frames: FrameList, names: list[str], threads: int | None
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "open.onnx"
        save_graph(with_outputs(graph, names), file, spec)
        artifact = Artifact("calibration", spec, {"onnx": file})
        options = EngineOptions(threads=threads, outputs=tuple(names))
        with Segmenter(
            open_engine(artifact, "onnxruntime", options), spec, fit="stretch", size=_size(spec), choice=""
        ) as segmenter:
            for frame in frames:
                yield segmenter.infer(segmenter.prepare(read_image(frame.path)))


def _size(spec: ModelSpec) -> tuple[int, int]:
    return spec.height, spec.width


def _groups(sizes: dict[str, int | None]) -> Iterator[list[str]]:
    """The names in groups that take at most `PASS_BYTES`; a tensor of unknown size counts as a thirtieth of that."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        size = PASS_BYTES // 30 if size is None else size
        if group and total + size > PASS_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _sampled(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    flat: npt.NDArray[np.float32] = array.reshape(-1)
    if flat.size <= SAMPLES:
        return flat.copy()
    # not every n-th: that would meet the same few columns of a map in every row
    return flat[np.random.default_rng(flat.size).integers(0, flat.size, SAMPLES)]


def entropy_threshold(values: npt.NDArray[np.floating[Any]], *, bins: int = 2048, levels: int = 128) -> float:
    """The largest magnitude worth keeping: where clipping and rounding to `levels` lose least information.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017: for each candidate the clipped histogram is compared with
    what `levels` steps leave of it, by Kullback and Leibler's divergence; the smallest wins.

    Args:
        values: any shape, finite.
        bins: of the histogram of magnitudes.
        levels: steps on one side of zero.
    """
    magnitudes = np.abs(values.reshape(-1))
    largest = float(magnitudes.max(initial=0.0))
    if largest == 0.0:
        return 0.0
    counts, edges = np.histogram(magnitudes, bins=bins, range=(0.0, largest))
    best, threshold = np.inf, largest
    for end in range(levels, bins + 1, 8):
        clipped = counts[:end].astype(np.float64)
        steps = np.arange(end) * levels // end
        known = clipped > 0
        sums = np.bincount(steps, clipped, levels)
        filled = np.bincount(steps, known, levels)
        coarse = np.where(known, sums[steps] / np.maximum(filled[steps], 1), 0.0)
        clipped[-1] += counts[
            end:
        ].sum()  # what is clipped lands in the last bin of the one, and is missing in the other
        divergence = _divergence(clipped, coarse)
        if divergence < best:
            best, threshold = divergence, float(edges[end])
    return threshold


def _divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    p, q = p / p.sum(), q / max(q.sum(), 1e-12)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())


def _read_cache(place: Path, names: list[str]) -> dict[str, dict[str, Range]] | None:
    """The ranges of all methods, or None where there are none to be trusted."""
    try:
        fields = json.loads(place.read_text(encoding="utf-8"))
        kept = {m: {n: (float(fields[m][n][0]), float(fields[m][n][1])) for n in names} for m in METHODS}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    finite = all(np.isfinite(ends).all() for by_name in kept.values() for ends in by_name.values())
    return kept if finite else None


def _write_cache(place: Path, kept: dict[str, dict[str, Range]]) -> None:
    # a cache that can't be written costs time, nothing else
    with contextlib.suppress(InputError, OSError), replacing(place) as temporary:
        temporary.write_text(json.dumps(kept), encoding="utf-8")

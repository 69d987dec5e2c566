"""A float32 ONNX file to an INT8 one for a target: calibrated, searched for sensitive layers, compared, written."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.bundlefile import check_file_name
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, GateError
from ddsm_deploy.export.fp16 import to_fp16
from ddsm_deploy.export.onnxgraph import Graph, load_graph, plain_graph, save_graph
from ddsm_deploy.export.qdq import SCHEMES, WEIGHT_BITS, Layer, layers
from ddsm_deploy.export.sampling_function import inline_sampling
from ddsm_deploy.files import replacing, writing
from ddsm_deploy.frames import FrameList
from ddsm_deploy.onnxweights import model_sha256
from ddsm_deploy.optimize.calibration import METHODS, Progress, ranges_of
from ddsm_deploy.optimize.material import Material, check_frames
from ddsm_deploy.optimize.sensitivity import Judge, Search, Searcher, search
from ddsm_deploy.parity import ParityBudget, ParityResult
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import ModelSpec, sha256_of

TARGETS = tuple(SCHEMES)

JUDGES = {"tensorrt": "onnxruntime", "onnxruntime": "onnxruntime", "openvino": "openvino"}
"""Which backend's masks count. TensorRT's engines need its GPU; ONNX Runtime computes their graph as it is written."""

SEARCH_FRAMES = 16
CHECK_FRAMES = 32

AIM = 0.5
"""The search keeps to this share of the budget, because the frames that it looks at are few."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How a model is quantized.

    Attributes:
        target: what will run it: ``tensorrt`` (TensorRT and TensorRT-RTX), ``onnxruntime`` or ``openvino``.
        fp16: whatever is not INT8 becomes float16 (tensorrt only).
        images: how many images to calibrate on, at most.
        method: of calibration, see `calibration.ranges_of`.
        percentile: likewise, per cent.
        changed: budget: most per cent of the pixels whose class may change.
        miou_drop: budget: most points of mIoU that may be lost, where there are labels.
        keep: patterns (as of file names) of layers to leave in float whatever they cost.
        sensitivity: measure each layer even where the budget holds with all of them quantized.
        weight_bits: 8, or 7 for processors without VNNI.
        threads: of one inference.
        force: write the file even where it fails the budget.
    """

    target: str
    fp16: bool = False
    images: int = 64
    method: str = "percentile"
    percentile: float = 99.99
    changed: float = 1.5
    miou_drop: float = 0.5
    keep: tuple[str, ...] = ()
    sensitivity: bool = False
    weight_bits: int = 8
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target is {self.target!r}; expected one of {', '.join(TARGETS)}")
        if self.fp16 and self.target != "tensorrt":
            raise ConfigError(
                f"fp16 beside INT8 is for tensorrt; {self.target} computes float16 graphs no faster than float32 ones "
                "on CPUs (on openvino, ask for --precision int8+bf16 when the model runs)"
            )
        if self.method not in METHODS:
            raise ConfigError(f"calibration method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.images < 1:
            raise ConfigError(f"images is {self.images}; expected at least 1")
        if self.weight_bits not in WEIGHT_BITS:
            raise ConfigError(f"weights of {self.weight_bits} bits; expected 7 or 8")
        ParityBudget(changed=self.changed, miou_drop=self.miou_drop)  # checks both

    @property
    def precision(self) -> str:
        """Of the file."""
        return "int8+fp16" if self.fp16 else "int8"

    def budget(self, *, labelled: bool, share: float = 1.0) -> ParityBudget:
        """The budget, or a share of it."""
        return ParityBudget(changed=share * self.changed, miou_drop=share * self.miou_drop if labelled else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What a quantization made.

    Attributes:
        path: the file; it is not there where the gate failed (see `GateError`).
        bytes: its size.
        sha256: hex digest of it.
        spec: the record inside it.
        layers: convolutions that the model has.
        search: what is quantized, what is not, and why.
        parity: the file against the float model, on frames that took no part in the search where there are enough.
        checked_on: backend and precision that this was measured on.
        doubts: about the calibration images, a sentence each.
        seconds: wall time of all.
    """

    path: Path
    bytes: int
    sha256: str
    spec: ModelSpec
    layers: int
    search: Search
    parity: ParityResult
    checked_on: str
    doubts: tuple[str, ...]
    seconds: float

    def to_json(self) -> str:
        """As JSON text: the record, the parity, and one row a layer where they were measured."""
        search_ = self.search
        kept = {layer.name for layer in search_.kept}
        rows = [
            {
                "layer": cost.layer.label,
                "node": cost.layer.name,
                "block": cost.layer.block,
                "weights": cost.layer.weights,
                "changed": cost.changed,
                "miou_drop": cost.miou_drop,
                "quantized": cost.layer.name not in kept,
            }
            for cost in search_.costs
        ]
        fields: dict[str, Any] = {
            "path": str(self.path),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "spec": json.loads(self.spec.to_json()),
            "layers": self.layers,
            "quantized": len(search_.quantized),
            "kept": self.spec.provenance["kept"].split(),
            "sensitivity": rows,
            "all_quantized": search_.all_quantized.fields(),
            "chosen": search_.result.fields(),
            "parity": self.parity.fields(),
            "checked_on": self.checked_on,
            "doubts": list(self.doubts),
            "seconds": self.seconds,
        }
        return json.dumps(fields, indent=2, ensure_ascii=False)


def quantize(
    model: str | Path | Artifact | None,
    output: str | Path,
    frames: FrameList,
    options: QuantizeOptions,
    *,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Writes the INT8 form of a float32 model, if its masks stay within the budget.

    Args:
        model: an ONNX file, a bundle or a shipped name; its float32 ONNX file is taken.
        output: the ONNX file to write.
        frames: to choose calibration, search and check images from; frames like those that the model will see, best
            with labels and not those that its accuracy is judged on later.
        options: how.
        progress: called with what is going on, how much of it is done, and how much there is.

    Raises:
        ArtifactError: no float32 ONNX file, or it is damaged.
        ConfigError: an option that does not fit the model.
        InputError: too few images, an unreadable one, or a file that can't be written.
        BackendMissing: a runtime that this needs is not installed.
        GateError: the budget does not hold; nothing is written, unless ``options.force``. Or it holds only
            with no layer in INT8; then nothing is written in any case.
    """
    started = time.perf_counter()
    artifact, output = model if isinstance(model, Artifact) else resolve(model), Path(output)
    source = artifact.file("onnx")
    float_artifact = Artifact(artifact.name, artifact.spec, {"onnx": source})
    if artifact.spec.precision != "fp32":
        raise ArtifactError(
            f"{source}: written in {artifact.spec.precision}; quantize the float32 file it was made from"
        )
    check_file_name(output, ".onnx")
    calibration = frames.spread(options.images)
    doubts = check_frames(calibration, artifact.spec)
    graph = _graph(source, options)
    every = layers(graph)
    fingerprint = calibration.fingerprint()
    with (
        replacing(output, sources=artifact.paths()) as temporary,
        Segmenter.open(float_artifact, backend=JUDGES[options.target], threads=options.threads) as segmenter,
    ):
        searcher = Searcher(
            graph=graph,
            spec=artifact.spec.replace(precision="int8"),
            layers=_chosen_layers(every, options.keep),
            ranges=ranges_of(
                graph,
                artifact.spec,
                calibration,
                method=options.method,
                percentile=options.percentile,
                fingerprint=hashlib.sha256(f"{model_sha256(source)} {fingerprint}".encode()).hexdigest(),
                threads=options.threads,
                progress=progress,
            ),
            scheme=SCHEMES[options.target],
            weight_bits=options.weight_bits,
            judge=Judge(Material(segmenter, calibration.spread(SEARCH_FRAMES)), segmenter),
            backend=JUDGES[options.target],
            threads=options.threads,
        )
        judge = _check_judge(segmenter, frames, calibration)  # before the search: what can't be read is told now
        labelled = bool(frames.classes)
        found = search(
            searcher, options.budget(labelled=labelled, share=AIM), always=options.sensitivity, progress=progress
        )
        if not found.quantized:
            raise GateError(
                f"{output}: not written, for with any layer in INT8 more changes than the budget allows; calibrate on "
                "more or other images, or allow more"
            )
        result = searcher.quantized(found.quantized)
        if options.fp16:
            result = to_fp16(result)
        spec = _spec(artifact.spec, source, options, calibration, fingerprint, found, every)
        parity, checked_on = _checked(result, spec, temporary, judge, options, labelled=labelled)
        if not parity and not options.force:
            raise GateError(
                f"{output}: not written, for on {parity.images} images {'; '.join(parity.failures)}; "
                "calibrate on more or other images, allow more, or force it"
            )
        spec = spec.with_provenance(**parity.facts(), **{"parity.on": checked_on})
        with writing(output):
            save_graph(result, temporary, spec)
        size, digest = temporary.stat().st_size, sha256_of(temporary)
    return QuantizeReport(
        path=output,
        bytes=size,
        sha256=digest,
        spec=spec,
        layers=len(every),
        search=found,
        parity=parity,
        checked_on=checked_on,
        doubts=tuple(doubts),
        seconds=time.perf_counter() - started,
    )


def _graph(source: Path, options: QuantizeOptions) -> Graph:
    """The float32 graph to quantize. Fused sampling stays fused, but for TensorRT: there standard operators are the
    form that has been proven."""
    graph = load_graph(source)
    return plain_graph(inline_sampling(graph) if options.target == "tensorrt" else graph)


def _chosen_layers(every: Sequence[Layer], keep: Sequence[str]) -> list[Layer]:
    for pattern in keep:
        if not any(fnmatch.fnmatchcase(layer.label, pattern) for layer in every):
            raise ConfigError(f"keep is {pattern!r}, which no layer is called; their names are as in: {every[0].label}")
    chosen = [layer for layer in every if not any(fnmatch.fnmatchcase(layer.label, pattern) for pattern in keep)]
    if not chosen:
        raise ConfigError(f"none of the model's {len(every)} convolutions is left to quantize")
    return chosen


def _check_judge(segmenter: Segmenter, frames: FrameList, calibration: FrameList) -> Judge:
    """Of frames that the file was not calibrated on, where there are some."""
    others = frames.without(calibration)
    chosen = (others if len(others) >= SEARCH_FRAMES else frames).spread(CHECK_FRAMES)
    return Judge(Material(segmenter, chosen), segmenter)


def _checked(
    graph: Graph, spec: ModelSpec, file: Path, judge: Judge, options: QuantizeOptions, *, labelled: bool
) -> tuple[ParityResult, str]:
    """The file as it will be, and what it was checked on."""
    with writing(file):
        save_graph(graph, file, spec)
    artifact = Artifact(spec.name, spec, {"onnx": file})
    backend = "openvino" if options.fp16 else JUDGES[options.target]  # onnxruntime can't run the mixed form on CPUs
    budget = options.budget(labelled=labelled)
    try:
        parity = judge.file(artifact, backend, threads=options.threads, budget=budget)
    except BackendError as exc:
        raise BackendError(f"the quantized model can't be checked: {exc}") from exc
    return parity, f"{backend} {judge.precision}"


def _spec(
    spec: ModelSpec,
    source: Path,
    options: QuantizeOptions,
    calibration: FrameList,
    fingerprint: str,
    found: Search,
    every: Sequence[Layer],
) -> ModelSpec:
    quantized = set(found.quantized)
    method = f"percentile {options.percentile:g}" if options.method == "percentile" else options.method
    facts = {name: value for name, value in spec.provenance.items() if not name.startswith("parity.")}
    if options.target == "tensorrt" and facts.get("sampling") == "fused":
        facts["sampling"] = "portable"
    return spec.replace(
        precision=options.precision,
        provenance={
            **facts,
            "target": options.target,
            "float_sha256": model_sha256(source),
            "quantized": f"{len(quantized)} of {len(every)} convolutions",
            "kept": " ".join(layer.label for layer in every if layer.name not in quantized),
            "calibration.method": method,
            "calibration.images": str(len(calibration)),
            "calibration.sha256": fingerprint,
            "weight_bits": str(options.weight_bits),
            "version.ddsm-deploy": importlib.metadata.version("ddsm-deploy"),
        },
    )

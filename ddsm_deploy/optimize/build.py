"""`ddsm build`: a model becomes a TensorRT engine at the precision wanted, with a record of what is known of it.

The steps: find the graph that is written at that precision, or convert one; refuse what TensorRT would misread; compare
the graph with the float32 one on this machine's CPU; build in a process of its own; where the GPU is there, run the
engine too.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.bundlefile import check_file_name
from ddsm_deploy.enginefile import EngineRecord, Profile, record_path, writing_engine
from ddsm_deploy.errors import BackendMissing, ConfigError, GateError
from ddsm_deploy.evaluate.verify import MAX_CHANGED
from ddsm_deploy.export.fp16 import to_fp16
from ddsm_deploy.export.onnxgraph import Graph, load_graph, save_graph
from ddsm_deploy.export.sampling_function import inline_sampling
from ddsm_deploy.export.tensorrt import builder, guard, log
from ddsm_deploy.export.tensorrt.plugingraph import plugin_graph, sampling_nodes
from ddsm_deploy.onnxweights import model_sha256
from ddsm_deploy.optimize.buildoptions import BuildOptions, check_options, check_profile
from ddsm_deploy.optimize.graphparity import Side, compare, frames_for
from ddsm_deploy.parity import ParityBudget, ParityResult
from ddsm_deploy.spec import ModelSpec, sha256_of

__all__ = ["BuildOptions", "BuildReport", "build_engine"]

Progress = Callable[[str, float], None]
"""Called with what is going on and the finished share of it, 0 to 1."""

_CONVERTED_FROM = {"fp16": "fp32", "int8+fp16": "int8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build made.

    Attributes:
        path: the engine; its record lies beside it.
        record: that record.
        parity: the graph beside the float32 one; None where nothing was compared.
        engine_parity: the engine itself beside it; None where no GPU ran it.
        seconds: wall time of it all.
    """

    path: Path
    record: EngineRecord
    parity: ParityResult | None
    engine_parity: ParityResult | None
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """The graph to build, and where it comes from.

    `graph` is of standard operators alone: it is what is checked and compared, and built where `fused` is None. The
    latter has nodes for the sampling plugin.
    """

    part: Artifact
    graph: Graph
    fused: Graph | None
    plugin: builder.Plugin | None  # of `fused`
    spec: ModelSpec  # of `graph`
    converted: bool
    reference: Artifact | None  # the float32 form of the same model; None where there is none


def build_engine(
    model: str | Path | Artifact | None,
    output: str | Path,
    options: BuildOptions,
    *,
    progress: Progress | None = None,
) -> BuildReport:
    """Builds an engine and writes it with its record, both whole or not at all.

    The same model, options and installation of TensorRT-RTX give the same bytes of both files; where they may not, with
    open sizes and without the package's heap, the record's notes say so. TensorRT chooses kernels by timing them, so
    its engines may differ from build to build.

    Args:
        model: an ONNX file, a bundle, a shipped model's name, or what `resolve` made of one.
        output: the engine's file; the record gets its name with ``.json`` behind it.
        options: how to build.
        progress: called with what is going on and the finished share of it.

    Raises:
        ArtifactError: no such model, or it is damaged.
        ConfigError: an option is wrong, or the target or its version does not have it; the model has no such precision.
        InputError: the output can't be written, or an image can't be read.
        BackendMissing: the target's library is not installed, or none that could run the comparison.
        BackendError: the graph would be misread, or can't be built.
        GateError: the graph, or the engine, is further from the float32 one than allowed.
    """
    started = time.perf_counter()
    output, report = Path(output), progress or (lambda text, share: None)
    artifact = model if isinstance(model, Artifact) else resolve(model)
    version = builder.library_version(options.target)
    check_options(options, version)
    source = _source(artifact, options, model)
    target = guard.Target(target=options.target, version=version, compute_capabilities=options.compute_capabilities)
    notes = guard.check_graph(source.graph, target)
    profiles = check_profile(source.graph, source.spec, options)
    check_file_name(output, ".engine")
    files = writing_engine(output, sources=artifact.paths())
    with files as (engine, record_file), tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "graph.onnx"
        save_graph(source.graph, onnx, source.spec)
        parity = _graph_parity(source, onnx, options, output, report)
        outline = guard.Graph(source.graph)
        spec = source.spec
        if source.fused is not None:
            spec = spec.with_provenance(sampling="fused")
            save_graph(source.fused, onnx, spec)
        job = _job(options, onnx, engine, profiles, source)
        built = builder.build(job, lambda phase, share: report(f"building: {phase}", share))
        record = EngineRecord(
            sha256=sha256_of(engine),
            bytes=engine.stat().st_size,
            target=options.target,
            version=built.version,
            spec=spec,
            onnx_sha256=model_sha256(source.part.file("onnx")),
            graph_sha256=sha256_of(onnx),
            **_machine(options),
            inputs=built.inputs,
            outputs=built.outputs,
            profiles=profiles,
            layers=_layers(built, outline),
            options=_asked(options, artifact, model),
            versions=_versions(),
            sampling=spec.provenance.get("sampling", ""),
            parity=_parity_facts(source, parity, options),
            notes=(*notes, *_layer_notes(built, outline), *_option_notes(options, built)),
        )
        engine_parity = _engine_parity(record, engine, source, options, output, report)
        if engine_parity is not None:
            facts = {f"engine.{key}": value for key, value in _facts(engine_parity).items()}
            record = dataclasses.replace(record, parity={**record.parity, "engine": "run on this GPU", **facts})
        record_file.write_text(record.to_json(), encoding="utf-8")
    return BuildReport(
        path=output,
        record=record,
        parity=parity,
        engine_parity=engine_parity,
        seconds=time.perf_counter() - started,
    )


def _source(artifact: Artifact, options: BuildOptions, model: Any) -> _Source:
    wanted = options.precision or artifact.spec.precision
    written = _pick(artifact, wanted, options)
    base = _pick(artifact, _CONVERTED_FROM.get(wanted, wanted), options)
    part = written or base
    if part is None:
        if not any("onnx" in p.files for p in (artifact, *artifact.variants)):
            artifact.file("onnx")  # raises, and says what to run
        raise _no_precision(artifact, wanted, model)
    graph = load_graph(part.file("onnx"))
    converted = written is None
    if converted:
        graph = to_fp16(graph)
    spec = part.spec.replace(precision=wanted).with_provenance(target=options.target)
    if sampling_nodes(graph):
        spec = spec.with_provenance(sampling="portable")  # what `inline_sampling` makes of them
    plain = inline_sampling(graph)
    fused = plugin_graph(graph) if options.sampling == "fused" else None
    return _Source(
        part=part,
        graph=plain,
        fused=fused,
        plugin=None if fused is None else _plugin(fused),
        spec=spec,
        converted=converted,
        reference=_pick(artifact, "fp32", options),
    )


def _pick(artifact: Artifact, precision: str, options: BuildOptions) -> Artifact | None:
    """A graph written so; one for `tensorrt` serves TensorRT-RTX as well."""
    for target in (options.target, "tensorrt"):
        part = artifact.pick("onnx", precisions=(precision,), target=target)
        if part is not None:
            return part
    return None


def _no_precision(artifact: Artifact, wanted: str, model: Any) -> ConfigError:
    has = f"{artifact.name} has {artifact.contents()}"
    if wanted.startswith("int8"):
        name = artifact.name if isinstance(model, Artifact | None) else model
        line = f"ddsm quantize {name} --calibration DIR --target tensorrt{' --fp16' * (wanted == 'int8+fp16')}"
        return ConfigError(f"no INT8 graph for TensorRT ({has}); make one with: {line} -o {artifact.name}-int8.onnx")
    return ConfigError(f"no graph to build at {wanted} ({has}); expected one written in float32")


def _job(
    options: BuildOptions, onnx: Path, engine: Path, profiles: Mapping[str, Profile], source: _Source
) -> builder.Job:
    built = source.graph if source.fused is None else source.fused
    return builder.Job(
        target=options.target,
        onnx=onnx,
        engine=engine,
        sampling=tuple(guard.Graph(built).sampling_modes()),
        profiles=profiles,
        plugin=source.plugin,
        compute_capabilities=options.compute_capabilities,
        workspace=None if options.workspace is None else round(options.workspace * 2**30),
        timing_cache=options.timing_cache,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        dla_core=options.dla_core,
        builder_optimization_level=options.builder_optimization_level,
    )


def _plugin(graph: Graph) -> builder.Plugin:
    if importlib.util.find_spec("cuda") is None:
        raise BackendMissing("fused sampling", extra="tensorrt", why="no module named 'cuda'")
    from ddsm_deploy.engines.cuda import require_gpu

    gpu = require_gpu()
    return builder.Plugin(compute_capability=gpu.compute_capability, driver=gpu.driver, nodes=sampling_nodes(graph))


def _graph_parity(
    source: _Source, onnx: Path, options: BuildOptions, output: Path, report: Progress
) -> ParityResult | None:
    """The graph to be built beside the float32 one, both on a CPU runtime; None where that can't or need not be."""
    if not options.verify or source.reference is None or (source.part is source.reference and not source.converted):
        return None
    # as a file for TensorRT, which OpenVINO then computes as it is written
    spec = source.spec.with_provenance(target="tensorrt")
    candidate = Artifact(source.part.name, spec, {"onnx": onnx})
    sides = (Side(source.reference), Side(candidate))
    frames = frames_for(source.spec, options.images)
    budget = ParityBudget(changed=_most_changed(options, source))
    result = compare(*sides, frames, budget, progress=lambda share: report("comparing with the float32 graph", share))
    return _gated(result, options, f"{output}: not written; the {source.spec.precision} graph")


def _engine_parity(
    record: EngineRecord, engine: Path, source: _Source, options: BuildOptions, output: Path, report: Progress
) -> ParityResult | None:
    """The engine itself, where this machine has a GPU that can run it; None elsewhere."""
    if not options.verify or not _runs_here(record):
        return None
    reference = source.reference or source.part
    record_path(engine).write_text(record.to_json(), encoding="utf-8")
    try:
        candidate = Artifact(source.part.name, record.spec, {"engine": engine})
        result = compare(
            Side(reference),
            Side(candidate, backend=record.target),
            frames_for(source.spec, options.images, next(iter(record.profiles.values()), None)),
            ParityBudget(changed=_most_changed(options, source)),
            progress=lambda share: report("running the engine", share),
        )
    finally:
        record_path(engine).unlink()
    return _gated(result, options, f"{output}: not written; the engine")


def _gated(result: ParityResult, options: BuildOptions, what: str) -> ParityResult:
    if not result and not options.force:
        raise GateError(
            f"{what} is too far from the float32 model on {result.images} images: {'; '.join(result.failures)}; "
            "--max-changed allows more, --force writes it all the same"
        )
    return result


def _most_changed(options: BuildOptions, source: _Source) -> float:
    return MAX_CHANGED[source.spec.precision] if options.max_changed is None else options.max_changed


def _runs_here(record: EngineRecord) -> bool:
    if importlib.util.find_spec("cuda") is None:
        return False
    from ddsm_deploy.engines.cuda import find_gpu

    gpu = find_gpu()
    return gpu is not None and gpu.compute_capability in record.compute_capabilities


def _machine(options: BuildOptions) -> dict[str, Any]:
    """The GPU on which it is built, and those for which."""
    gpu = None
    if importlib.util.find_spec("cuda") is not None:
        from ddsm_deploy.engines.cuda import find_gpu

        gpu = find_gpu()
    if options.target == "tensorrt-rtx":  # its builder looks at no GPU
        return {"compute_capabilities": options.compute_capabilities, "gpu": ""}
    return {"compute_capabilities": (gpu.compute_capability,) if gpu else (), "gpu": str(gpu) if gpu else ""}


def _layers(built: builder.Built, outline: guard.Graph) -> dict[str, dict[str, int]]:
    ops = {node.name: node.op_type for node in outline.nodes if node.op_type in guard.COMPUTED and node.name}
    return log.count_types(log.node_types(built.layers), ops) if built.layers else {}


def _layer_notes(built: builder.Built, outline: guard.Graph) -> list[str]:
    """Says where the engine computes in another type than the graph asks for."""
    if not built.layers:
        return [f"the build log of version {built.version} is of an unknown form, so the layers' types are not known"]
    types = log.node_types(built.layers)
    other = [
        f"{node} in {types[node]}, not {want}"
        for node, want in outline.computed_types().items()
        if types.get(node, want) != want and want != "unknown"
    ]
    return [f"{len(other)} nodes are not computed as written: {', '.join(other[:5])}"] if other else []


def _option_notes(options: BuildOptions, built: builder.Built) -> list[str]:
    notes = []
    if options.sampling == "fused":
        notes.append(
            "sampling runs in the project's own CUDA kernel, which is experimental; compare it with a portable engine "
            "on this GPU"
        )
    if options.target == "tensorrt-rtx" and options.profile is not None and not built.repeatable:
        notes.append(
            "TensorRT-RTX numbers the open sizes inside an engine by memory addresses, and the heap that keeps those "
            "alike was not built with this package, or could not be used: another build may have other bytes"
        )
    if options.dla_core is not None:
        notes.append(
            "layers that the DLA can't run, GridSample among them, run on the GPU; no DLA has run this network yet"
        )
    if options.target == "tensorrt-rtx" and {"75"} < set(options.compute_capabilities):
        notes.append("compute capability 75 beside others makes a much larger engine; build one for it alone")
    return notes


def _asked(options: BuildOptions, artifact: Artifact, model: Any) -> dict[str, Any]:
    """What was asked of the builder, without paths."""
    named = model is not None and not isinstance(model, Artifact)
    fields: dict[str, Any] = {"source": Path(str(model)).name if named else artifact.name}
    for name in ("workspace", "version_compatible", "hardware_compatible", "dla_core", "builder_optimization_level"):
        if getattr(options, name) is not None and getattr(options, name) is not False:
            fields[name] = getattr(options, name)
    if options.timing_cache is not None:
        fields["timing_cache"] = True
    return fields


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("ddsm-deploy", "onnx")}
    return {**packages, "python": platform.python_version()}


def _parity_facts(source: _Source, parity: ParityResult | None, options: BuildOptions) -> dict[str, str]:
    if parity is not None:
        how = "compared with the float32 graph on this machine's CPU"
    elif not source.converted and source.part is source.reference:
        how = "it is the float32 graph"
    elif source.reference is None:
        how = "not compared here, for lack of a float32 graph"
        facts = source.spec.provenance
        if "parity.changed" in facts and "parity.images" in facts:
            share, images = facts["parity.changed"], facts["parity.images"]
            how += f"; when it was made, {share} % of the pixels of {images} images differed"
    else:
        how = "not compared: verification was off"
    return {"graph": how, **(_facts(parity) if parity is not None else {}), "engine": "not run: no GPU here that could"}


def _facts(parity: ParityResult) -> dict[str, str]:
    return {key.removeprefix("parity."): value for key, value in parity.facts().items()}

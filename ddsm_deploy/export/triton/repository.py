"""A Triton model repository: NAME/config.pbtxt and NAME/VERSION/model.onnx (or model.plan), whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import ModelProto, helper

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.endpoint import NAME, SPEC_KEY
from ddsm_deploy.enginefile import TensorRecord, read_engine, read_record
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError
from ddsm_deploy.export.onnxgraph import load_graph
from ddsm_deploy.export.triton.config import (
    ModelConfig,
    Served,
    TritonOptions,
    config_text,
    model_config,
    read_config,
)
from ddsm_deploy.files import writing
from ddsm_deploy.onnxweights import copy_whole, model_sha256
from ddsm_deploy.spec import ModelSpec

CONFIG_FILE = "config.pbtxt"

_STANDARD = ("", "ai.onnx")
_FIXED = ("classes", "palette", "height", "width", "mean", "std", "channel_order", "precision")
"""Of a spec: what all versions of a model share, for Triton keeps one configuration for them all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonReport:
    """What was deployed.

    Attributes:
        folder: of the model, in the repository.
        name: of the model.
        version: that was written.
        file: the model's file there.
        spec: of the model.
        platform: Triton's backend.
        device: where it runs.
        max_batch: most images of one inference; 0 where it takes one image a time.
        instances: on each device.
        notes: what a user should know, a sentence each.
    """

    folder: Path
    name: str
    version: int
    file: Path
    spec: ModelSpec
    platform: str
    device: str
    max_batch: int
    instances: int
    notes: tuple[str, ...]


def deploy(
    model: str | Path | Artifact | None, repository: str | Path, options: TritonOptions | None = None
) -> TritonReport:
    """Writes a model into a Triton model repository.

    Args:
        model: see `resolve`.
        repository: the folder that Triton is given; made where it is missing.
        options: how to deploy.

    Raises:
        ArtifactError: no such model, it is damaged, or has no file for the platform.
        BackendError: stock Triton could not run it.
        ConfigError: an option does not fit the model; or there is a model of that name already.
        InputError: the repository can't be written.
    """
    options = options or TritonOptions()
    artifact = model if isinstance(model, Artifact) else resolve(model)
    name = options.name or artifact.name
    if not NAME.fullmatch(name):
        raise ConfigError(f"a model on Triton can't be called {name!r}; name it with --name")
    served = (_from_engine if options.platform == "tensorrt" else _from_onnx)(artifact, options)
    config = model_config(name, served, options)
    folder = Path(repository) / name
    version = _next_version(folder, config, served.spec, options)
    file = folder / str(version) / config.default_model_filename
    _write(served.file, config, file)
    if version == 1:
        _remove_all_but(file)
    return TritonReport(
        folder=folder,
        name=name,
        version=version,
        file=file,
        spec=served.spec,
        platform=options.platform,
        device=options.runs_on,
        max_batch=config.max_batch_size,
        instances=options.instances,
        notes=(*served.notes, *_notes(served, options, config)),
    )


def _pick(artifact: Artifact, kind: str, target: str, options: TritonOptions) -> Artifact:
    wanted = options.precision or artifact.spec.precision
    part = artifact.pick(kind, precisions=(wanted,), target=target)
    if part is None:
        if not any(kind in p.files for p in (artifact, *artifact.variants)):
            artifact.file(kind)  # raises, and says what to run
        raise BackendError(f"{artifact.name} has no {kind} for {target} at {wanted}, only {artifact.contents()}")
    return part


def _from_onnx(artifact: Artifact, options: TritonOptions) -> Served:
    part = _pick(artifact, "onnx", options.accelerator or "onnxruntime", options)
    path, spec = part.file("onnx"), part.spec
    if spec.precision == "int8+fp16" and options.runs_on == "cpu":
        raise BackendError(f"onnxruntime computes INT8 with float16 ({path}) wrongly on CPUs; take the int8 file")
    model = load_graph(path)
    if foreign := _foreign(model):
        raise BackendError(f"{path}: Triton has no operator {foreign}, and the file has no body for it; export it anew")
    inputs, outputs = (tuple(map(_tensor, group)) for group in (model.graph.input, model.graph.output))
    if [len(tensor.shape) for tensor in inputs] != [4]:
        raise ArtifactError(f"{path}: expected one input, image uint8 NxHxWx3, as `ddsm export` makes it")
    open_batch = all(tensor.shape[0] == -1 for tensor in (*inputs, *outputs))
    written = spec.provenance.get("sampling", "portable")
    return Served(
        file=path,
        sha256=model_sha256(path),
        spec=spec,
        sampling="portable" if written == "fused" else written,  # Triton's ONNX Runtime has the node's body alone
        inputs=inputs,
        outputs=outputs,
        most=None if open_batch else 0,
        example=(spec.height, spec.width),
    )


def _from_engine(artifact: Artifact, options: TritonOptions) -> Served:
    path = _pick(artifact, "engine", "tensorrt", options).file("engine")
    if (target := read_record(path).target) != "tensorrt":
        raise BackendError(f"{path} is for {target}, which Triton has no backend for; build one for tensorrt")
    record = read_engine(path)
    shape = record.inputs[0].shape
    profile = next(iter(record.profiles.values()), None)
    example = shape if profile is None else profile.opt
    return Served(
        file=path,
        sha256=record.sha256,
        spec=record.spec,
        sampling=record.sampling or "portable",
        inputs=record.inputs,
        outputs=record.outputs,
        most=profile.max[0] if profile is not None and shape[0] == -1 else 0,
        example=(example[1], example[2]),
        notes=(f"the server's TensorRT must be {record.version}, which built the engine",),
    )


def _foreign(model: ModelProto) -> str:
    """An operator that is neither standard nor a function of the file itself; empty where there is none."""
    known = {(function.domain, function.name) for function in model.functions}
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    unknown = (n for n in nodes if n.domain not in _STANDARD and (n.domain, n.op_type) not in known)
    return next((f"{node.domain}::{node.op_type}" for node in unknown), "")


def _tensor(info: onnx.ValueInfoProto) -> TensorRecord:
    tensor = info.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TensorRecord(name=info.name, dtype=str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape=shape)


def _notes(served: Served, options: TritonOptions, config: ModelConfig) -> Iterator[str]:
    if served.most == 0:
        cure = " (open it with: ddsm export CKPT --dynamic batch)" if options.platform == "onnxruntime" else ""
        batch = served.inputs[0].shape[0]
        yield f"its batch is fixed at {batch}, so Triton runs one request a time and batches nothing{cure}"
    elif config.max_batch_size < options.max_batch:
        yield f"its profile ends at batches of {config.max_batch_size}"
    if served.spec.precision == "int8" and options.runs_on == "cpu":
        yield "on x86 without VNNI the server's INT8 sums may overflow; quantize with --weight-bits 7 for those"
    if served.spec.provenance.get("sampling") == "fused" and options.platform == "onnxruntime":
        yield "the server samples by standard operators, not on this package's kernels"


def _next_version(folder: Path, config: ModelConfig, spec: ModelSpec, options: TritonOptions) -> int:
    if not folder.exists():
        return 1
    old = read_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    if old is None or SPEC_KEY not in old.parameters:
        raise ConfigError(f"{folder} is there and was not made by `ddsm deploy triton`; take another --name")
    if options.overwrite:
        return 1
    if not options.new_version:
        raise ConfigError(f"{folder} is there; add a version with --new-version, or replace it with --overwrite")
    before = ModelSpec.from_json(old.parameters[SPEC_KEY].string_value, source=str(folder / CONFIG_FILE))
    differing = [name for name in _FIXED if getattr(before, name) != getattr(spec, name)]
    differing += [
        name
        for name in ("platform", "max_batch_size", "input", "output")
        if getattr(old, name) != getattr(config, name)
    ]
    if differing:
        raise ConfigError(
            f"{folder}: the versions of a model share one configuration, and the new one's "
            f"{', '.join(differing).replace('_', ' ')} differ; take another --name, or --overwrite"
        )
    return 1 + max((int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()), default=0)


def _write(source: Path, config: ModelConfig, file: Path) -> None:
    """Copies a model to `file` in a repository, and puts its configuration two folders above, each by one renaming.

    Until then both are hidden files in the repository itself, where Triton looks at folders alone. A half-written
    folder there, hidden or not, passes for a model, and kept Triton 2.51 from starting. The copy is self-contained.
    """
    folder = file.parent.parent
    is_new = not folder.exists()
    staged = {
        path: folder.with_name(f".{folder.name}.{path.name}.{os.getpid()}.part")
        for path in (file, folder / CONFIG_FILE)
    }
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            copy_whole(source, staged[file])
            staged[folder / CONFIG_FILE].write_text(config_text(config), encoding="utf-8")
            file.parent.mkdir(parents=True, exist_ok=True)
            for path, temporary in staged.items():
                temporary.replace(path)
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):  # the repository is no folder: told already
                temporary.unlink(missing_ok=True)


def _remove_all_but(file: Path) -> None:
    """Removes what else there is of a model than its configuration and this file."""
    for entry in file.parent.iterdir():
        if entry != file:
            entry.unlink()
    for entry in file.parent.parent.iterdir():
        if entry.name.isdecimal() and entry != file.parent:
            shutil.rmtree(entry)

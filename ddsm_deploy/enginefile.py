"""A TensorRT engine on disk: the engine as NVIDIA's builder gave it, and its record, JSON text in a file beside it.

    model.engine         no header of ours in front, so that NVIDIA's own tools read it
    model.engine.json    what it is, what it was made from, where it can run; see `EngineRecord`

Nothing here needs TensorRT or a GPU. A record holds no time and no path, so that equal engines have equal records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ddsm_deploy.errors import ArtifactError, ConfigError
from ddsm_deploy.files import replacing, writing
from ddsm_deploy.spec import ModelSpec, sha256_of

RECORD_SUFFIX = ".json"
FORMAT = 1
TARGETS = ("tensorrt", "tensorrt-rtx")

_RTX_MAGIC = b"vtrt"
HEADER_BYTES = 28
_AMPERE = 80  # the first generation whose engines can be built for later ones too


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One input or output of an engine.

    Attributes:
        name: as in the graph.
        dtype: numpy's word for the type of its elements, as ``uint8``.
        shape: one number an axis; -1 where the profile leaves it open.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """The sizes that an input of an engine may have: each axis from ``min`` to ``max``, fastest near ``opt``."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ConfigError(f"a profile's three shapes have {len(self.min)}, {len(self.opt)}, {len(self.max)} axes")
        for least, best, most in zip(self.min, self.opt, self.max, strict=True):
            if not 1 <= least <= best <= most:
                raise ConfigError(f"the profile {self} does not grow from at least 1 to its largest shape")

    def __str__(self) -> str:
        return ":".join("x".join(map(str, shape)) for shape in (self.min, self.opt, self.max))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What an engine is.

    Attributes:
        sha256: of the engine's bytes.
        bytes: how many they are.
        target: of `TARGETS`; also the backend that runs it.
        version: of the library that built it, and that must run it unless ``version_compatible`` is among the options.
        spec: of the model; its precision is the engine's, and its provenance's ``target`` is `target`.
        onnx_sha256: of the ONNX file it was made from (see `onnxweights.model_sha256`).
        graph_sha256: of the graph that was built, after conversion to the engine's precision.
        compute_capabilities: of the GPUs for which it was built, as ``86``.
        gpu: the GPU on which it was built; empty where there was none.
        inputs: names, types and shapes taken.
        outputs: names, types and shapes given.
        profiles: input name -> its allowed sizes; empty for an engine of fixed sizes.
        layers: kind of layer -> type of its input -> how many, as the builder's log tells.
        options: what was asked of the builder.
        versions: of the other packages.
        sampling: how the engine samples: ``fused`` (the project's own kernel), ``portable`` (GridSample) or ``gather``;
            empty in records that are older than the word.
        parity: figures of the graph beside the float32 one, and what was run for them.
        notes: what a user should know, a sentence each.
    """

    sha256: str
    bytes: int
    target: str
    version: str
    spec: ModelSpec
    onnx_sha256: str
    graph_sha256: str
    compute_capabilities: tuple[str, ...]
    gpu: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    profiles: Mapping[str, Profile]
    layers: Mapping[str, Mapping[str, int]]
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    sampling: str = ""
    parity: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target is {self.target!r}; expected one of {', '.join(TARGETS)}")

    def to_json(self) -> str:
        """The record as JSON text: sorted keys, so that equal records give equal bytes."""
        fields = dataclasses.asdict(self) | {"format": FORMAT, "spec": json.loads(self.spec.to_json())}
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> EngineRecord:
        """Reads `to_json`'s text.

        Raises:
            ArtifactError: the text is not such a record; `source` names the file in the message.
        """
        try:
            fields = json.loads(text)
            form = fields.pop("format")
            if form != FORMAT:
                raise ArtifactError(f"{source}: format {form}; this version reads {FORMAT}; update ddsm-deploy")
            fields["spec"] = ModelSpec.from_json(json.dumps(fields["spec"]), source=source)
            for key in ("inputs", "outputs"):
                fields[key] = tuple(TensorRecord(**t | {"shape": tuple(map(int, t["shape"]))}) for t in fields[key])
            fields["profiles"] = {name: _profile(sizes) for name, sizes in fields["profiles"].items()}
            for key in ("compute_capabilities", "notes"):
                fields[key] = tuple(map(str, fields[key]))
            for key in ("layers", "options", "versions", "parity"):
                fields[key] = dict(fields[key])
            return cls(**fields)
        except ArtifactError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as exc:
            raise ArtifactError(f"{source}: not an engine's record ({type(exc).__name__}: {exc})") from exc


def record_path(engine: Path) -> Path:
    """Where the record of an engine lies."""
    return engine.with_name(engine.name + RECORD_SUFFIX)


def read_engine_spec(path: str | Path) -> ModelSpec:
    """The spec of an engine's model; the engine itself is not read.

    Raises:
        ArtifactError: as `read_record`.
    """
    return read_record(Path(path)).spec


def read_record(path: Path) -> EngineRecord:
    """The record beside an engine; of the engine only its existence is checked.

    Raises:
        ArtifactError: either is missing, or the record is none.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such engine file")
    record = record_path(path)
    try:
        text = record.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise ArtifactError(
            f"{path}: {_what(path)}, but its record {record.name} is missing; copy both files, or build it anew with: "
            f"ddsm build MODEL -o {path.name}"
        ) from exc
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{record}: can't be read ({getattr(exc, 'strerror', None) or exc})") from exc
    return EngineRecord.from_json(text, source=str(record))


def read_engine(path: str | Path) -> EngineRecord:
    """The record beside an engine, once size, header and hash of the engine are found to be what it says.

    Raises:
        ArtifactError: as `read_record`, or the engine is cut short, altered, or another one than the record's.
    """
    path = Path(path)
    record = read_record(path)
    again = f"copy it again, or build it anew with: {rebuild_line(record, path)}"
    try:
        size = path.stat().st_size
        if size != record.bytes:
            how = "cut short" if size < record.bytes else "not the engine of its record"
            raise ArtifactError(f"{path}: {how} ({size} bytes, its record says {record.bytes}); {again}")
        problem = header_problem(_head(path), size, record)
        if problem:
            raise ArtifactError(f"{path}: damaged ({problem}); {again}")
        digest = sha256_of(path)
    except OSError as exc:
        raise ArtifactError(f"{path}: can't be read ({exc.strerror or exc})") from exc
    if digest != record.sha256:
        raise ArtifactError(f"{path}: damaged (sha256 {digest[:12]}…, its record says {record.sha256[:12]}…); {again}")
    return record


def header_problem(head: bytes, size: int, record: EngineRecord) -> str:
    """What is wrong with an engine's first bytes, in words; empty where nothing is, or where nothing is known of them.

    TensorRT-RTX's header was read off engines of version 1.7.1 (NVIDIA documents none): ``vtrt``, at byte 16 the file's
    length, at byte 24 the four parts of the version. An engine of another major version is not judged by it.
    """
    if record.target != "tensorrt-rtx" or record.version.split(".")[0] != "1":
        return ""
    if head[:4] != _RTX_MAGIC:
        return f"it begins with {head[:4]!r}, a TensorRT-RTX engine begins with {_RTX_MAGIC!r}"
    length = int.from_bytes(head[16:24], "little")
    if length != size:
        return f"its header speaks of {length} bytes, it has {size}"
    return ""


def misfit(record: EngineRecord, path: Path, *, backend: str, version: str, compute_capability: str | None) -> str:
    """Why an engine can't run here, with the command that makes one that can; empty where nothing stands against it.

    Args:
        record: the engine's.
        path: of the engine, for the message.
        backend: what is to run it.
        version: of the installed library.
        compute_capability: of the GPU, as ``86``; None where it is not known yet.
    """
    if record.target != backend:
        return f"{path} was built for {record.target}, not for {backend}; open it with that, or build: " + rebuild_line(
            record, path, target=backend
        )
    if record.version != version and not (record.options.get("version_compatible") and _later(version, record.version)):
        return (
            f"{path} was built by {record.target} {record.version}, and {version} is installed, which does not read "
            f"it; install that version, or build anew with: {rebuild_line(record, path)}"
        )
    able = record.compute_capabilities
    if compute_capability is None or not able or compute_capability in able:
        return ""
    if record.options.get("hardware_compatible") and int(compute_capability) >= _AMPERE:
        return ""
    more = {"compute_capability": compute_capability} if record.target == "tensorrt-rtx" else {}
    return (
        f"{path} was built for compute capability {', '.join(able)}, and the GPU here has {compute_capability}; "
        f"build one for it with: {rebuild_line(record, path, **more)}"
    )


def rebuild_line(record: EngineRecord, path: Path, **changes: str) -> str:
    """The command that makes such an engine again; `changes` replaces options, or adds some, by their name."""
    options = {"target": record.target, "precision": record.spec.precision}
    if record.target == "tensorrt-rtx":
        options["compute-capability"] = " --compute-capability ".join(record.compute_capabilities)
    if record.sampling == "fused":
        options["sampling"] = record.sampling
    if record.profiles:
        sizes = next(iter(record.profiles.values()))
        shapes = (sizes.min, sizes.opt, sizes.max)
        options["profile"] = ":".join("x".join(map(str, shape[:3])) for shape in shapes)  # the 3 channels go unsaid
    options |= changes
    if options["target"] == "tensorrt-rtx":  # it has no other way than this
        options.pop("sampling", None)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value)
    source = record.options.get("source") or "MODEL"
    return f"ddsm build {source} {flags} -o {path.name}"


@contextlib.contextmanager
def writing_engine(output: Path, *, sources: Collection[Path] = ()) -> Iterator[tuple[Path, Path]]:
    """Temporary files for an engine and its record, renamed to `output` and its `record_path` if the block ends well.

    That both can be written is tried out at once, for a build may take an hour.

    Raises:
        InputError: one can't be written, or is one of the `sources` that it is made from.
    """
    # renamed in the opposite order
    with replacing(record_path(output)) as record, replacing(output, sources=sources) as engine:
        yield engine, record
        with writing(record_path(output)):  # an old one must not lie beside the new engine, be it for a moment
            record_path(output).unlink(missing_ok=True)


def _later(version: str, than: str) -> bool:
    """Whether a version is a later one of the same major version."""
    new, old = ([int(part) for part in text.split(".") if part.isdigit()] for text in (version, than))
    return new[:1] == old[:1] and new >= old


def _profile(sizes: Mapping[str, Any]) -> Profile:
    return Profile(**{name: tuple(map(int, shape)) for name, shape in sizes.items()})


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)


def _what(path: Path) -> str:
    """What an engine file without a record is, as far as its header tells."""
    head = _head(path)
    if len(head) == HEADER_BYTES and head[:4] == _RTX_MAGIC:
        return f"an engine of TensorRT-RTX {'.'.join(map(str, head[24:28]))}"
    return "an engine file"

"""Finding a model: a file, a bundle (folder or zip) or the name of a shipped model becomes one `Artifact`.

A bundle holds one model in several forms, at several precisions and for several backends; see `bundlefile`. Every file
of it is checked against its sha256 when the bundle is opened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddsm_deploy.bundlefile import BUNDLE_FILE, BUNDLE_FORMAT, describe, read_bundle, unpack
from ddsm_deploy.bundlefile import KINDS as BUNDLE_KINDS
from ddsm_deploy.endpoint import SUFFIX, Endpoint, is_url, read_endpoint, record_endpoint
from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.onnxfile import read_outline, read_spec
from ddsm_deploy.spec import METADATA_KEY, ModelSpec

__all__ = [
    "BUNDLE_FILE",
    "BUNDLE_FORMAT",
    "DEFAULT_MODEL",
    "KINDS",
    "Artifact",
    "differences",
    "read_checkpoint_spec",
    "resolve",
    "shipped_models",
    "spec_of",
]

DEFAULT_MODEL = "ddsm-lite0"
"""What runs when no model is named."""

BUNDLE_SUFFIX = ".zip"

KINDS = {**BUNDLE_KINDS, "endpoint": SUFFIX}
"""Kinds of file a model comes in, each with its suffix. A served model's record is in no bundle: opening one must not
send images away."""

_MAX_HEADER = 100_000_000  # bytes: safetensors' own limit


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A model found on disk.

    Attributes:
        name: the bundle's name, or the file's stem.
        spec: of the reference, read from the file itself.
        files: kind (of `KINDS`) -> file of the reference: the float32 forms of the model, or the only file there is.
        variants: the same model at other precisions or for one backend, each with a spec of its own (``precision``,
            ``provenance["target"]``) and exactly one file.
    """

    name: str
    spec: ModelSpec
    files: Mapping[str, Path]
    variants: tuple[Artifact, ...] = ()

    @property
    def target(self) -> str:
        """The backend that its file was written for; empty where any can run it."""
        return self.spec.provenance.get("target", "")

    def file(self, kind: str) -> Path:
        """The reference's file of a kind.

        Raises:
            ArtifactError: the model has none; the message says what to run.
        """
        if kind in self.files:
            return self.files[kind]
        if kind == "onnx" and "checkpoint" in self.files:
            source = self.files["checkpoint"]
            command = f"ddsm export {source} -o {source.with_suffix('.onnx')}"
            raise ArtifactError(f"{self.name} has no ONNX file; make one with: {command}")
        if kind == "engine":
            raise ArtifactError(f"{self.name} has no engine, only {self.contents()}; make one with: ddsm build")
        if kind == "endpoint":
            raise ArtifactError(
                f"{self.name} has no endpoint, only {self.contents()}; deploy it with `ddsm deploy triton`, and name "
                "triton://HOST/MODEL"
            )
        raise ArtifactError(
            f"{self.name} has no {kind} ({KINDS.get(kind, kind)}), only {', '.join(sorted(self.files))}; "
            "name the checkpoint it was exported from, or a bundle that holds both"
        )

    def parts(self) -> tuple[Artifact, ...]:
        """Every file as an artefact of its own: the reference's first, in the order of `KINDS`, then the variants."""
        own = [kind for kind in KINDS if kind in self.files]
        return (*(Artifact(self.name, self.spec, {kind: self.files[kind]}) for kind in own), *self.variants)

    def paths(self) -> tuple[Path, ...]:
        """Of every part."""
        return tuple(path for part in self.parts() for path in part.files.values())

    def contents(self) -> str:
        """What there is, in words: ``onnx fp32, onnx int8 for openvino``."""
        return ", ".join(describe(next(iter(p.files)), p.spec.precision, p.target) for p in self.parts())

    def pick(self, kind: str, *, precisions: Sequence[str], target: str) -> Artifact | None:
        """What a backend is to run: itself, one of `variants`, or None where there is no such file.

        A variant that was written for another backend is never taken: name its file to run it all the same.

        Args:
            kind: of the file, of `KINDS`.
            precisions: what the file may be written in, best first.
            target: the backend. Of two files of one precision, the one that was written for it wins.
        """
        for precision in precisions:
            fitting = [
                part for part in (self, *self.variants) if kind in part.files and part.spec.precision == precision
            ]
            for wanted in (target, ""):
                for part in fitting:
                    if part.target == wanted:
                        return part
            if self in fitting and not self.variants:
                return self
        return None


def resolve(model: str | Path | None = None) -> Artifact:
    """Finds a model and reads its record.

    Args:
        model: an ``.onnx`` file, a ``.safetensors`` checkpoint, an ``.engine`` with its record beside it, a bundle
            (folder or ``.zip``), the name of a shipped model, or the URL of a served one, ``triton://HOST/MODEL`` (see
            `endpoint`), whose server is asked; None is `DEFAULT_MODEL`. A shipped name wins over a file of that name
            here: write ``./NAME`` for the file.

    Raises:
        ArtifactError: nothing of that name, or it is damaged, foreign or incomplete.
        BackendError: of a served model: no answer, or tritonclient is not installed.
        ConfigError: of a served model: the URL is of another form.
    """
    if model is None:
        model = DEFAULT_MODEL
    if is_url(model):
        endpoint = Endpoint.parse(str(model))
        model = record_endpoint(endpoint, spec=resolve(endpoint.spec).spec if endpoint.spec else None)
    if str(model) in shipped_models():
        return _bundle(_models_folder() / str(model))
    path = Path(model)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as exc:
        raise ArtifactError(f"{path}: can't be read ({exc.strerror or exc})") from exc
    if is_folder:
        return _bundle(path)
    suffix = path.suffix.lower()
    kind = next((kind for kind, own in KINDS.items() if suffix == own), None)
    if kind is not None:
        return Artifact(path.stem, spec_of(kind, path), {kind: path})
    if exists and suffix == BUNDLE_SUFFIX:
        return _bundle(unpack(path))
    if exists:
        raise ArtifactError(f"{path}: not a model; expected {', '.join(KINDS.values())}, or a bundle (folder or .zip)")
    known = ", ".join(shipped_models()) or "none"
    raise ArtifactError(f"no model {str(model)!r}: neither a file nor a folder, nor a shipped model (shipped: {known})")


def differences(a: Artifact, b: Artifact) -> list[str]:
    """What of two files' records shows that they are not forms of one model; empty where nothing does.

    A checkpoint takes images of any size and channel order, so for one of those only the rest counts.
    """
    fields = ["classes", "palette", "mean", "std", "network"]
    if "checkpoint" not in (*a.files, *b.files):
        fields += ["height", "width", "channel_order"]
    return [name.replace("_", " ") for name in fields if getattr(a.spec, name) != getattr(b.spec, name)]


def shipped_models() -> tuple[str, ...]:
    """Names of the models that came with the package, sorted."""
    return tuple(sorted(file.parent.name for file in _models_folder().glob(f"*/{BUNDLE_FILE}")))


def read_checkpoint_spec(path: str | Path) -> ModelSpec:
    """The spec of a safetensors checkpoint, read without torch and without safetensors.

    Raises:
        ArtifactError: missing, damaged, or not one of this project's checkpoints.

    Source: the safetensors format: eight bytes of length (little endian), then so many bytes of JSON.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ArtifactError(f"{path}: not a safetensors file, or cut short")
            header = json.loads(file.read(length).decode("utf-8"))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            metadata = header.get("__metadata__", {})
            text = metadata.get(METADATA_KEY)
    except (OSError, RecursionError, ValueError, TypeError, KeyError, IndexError, AttributeError) as exc:
        reason = (exc.strerror or exc) if isinstance(exc, OSError) else "its header can't be read"
        raise ArtifactError(f"{path}: not a readable safetensors file ({reason})") from exc
    if not isinstance(end, int) or 8 + length + end != size:
        raise ArtifactError(f"{path}: damaged or cut short ({size} bytes; its header speaks of {8 + length} + {end})")
    if not isinstance(text, str):
        raise ArtifactError(f"{path}: a safetensors file, but no ddsm checkpoint (no {METADATA_KEY} in its metadata)")
    return ModelSpec.from_json(text, source=str(path))


def spec_of(kind: str, path: Path) -> ModelSpec:
    """The record of a file of a kind, of `KINDS`.

    Raises:
        ArtifactError: missing, damaged, or not made by this project.
    """
    match kind:
        case "onnx":
            return read_spec(path)
        case "checkpoint":
            return read_checkpoint_spec(path)
        case "endpoint":
            return read_endpoint(path).spec
        case _:
            from ddsm_deploy.enginefile import read_engine_spec

            return read_engine_spec(path)


def _models_folder() -> Path:
    return Path(__file__).parent / "models"


def _bundle(folder: Path) -> Artifact:
    bundle = read_bundle(folder)
    record = folder / BUNDLE_FILE
    found: list[tuple[str, Artifact]] = []
    for member in bundle.members:
        path = folder / member.file
        spec, outside = read_outline(path) if member.kind == "onnx" else (spec_of(member.kind, path), ())
        stated = (member.precision, member.target)
        written = (spec.precision, spec.provenance.get("target", ""))
        if written != stated:
            raise ArtifactError(
                f"{record}: says that {member.file} is {describe(member.kind, *stated)}, but the file itself says "
                f"{describe(member.kind, *written)}; refused"
            )
        for file in outside:
            if file not in bundle.files:
                raise ArtifactError(f"{path}: its weights lie in {file}, which no sha256 of the bundle covers; refused")
        found.append((member.kind, Artifact(bundle.name, spec, {member.kind: path})))
    found.sort(key=lambda pair: list(KINDS).index(pair[0]))  # onnx before checkpoint; otherwise in the record's order
    reference = [(k, a) for k, a in found if a.spec.precision == "fp32" and not a.target] or found[:1]
    for _, other in found:
        if differing := differences(found[0][1], other):
            raise ArtifactError(f"{record}: its files are not of one model (their {', '.join(differing)} differ)")
    variants = tuple(artifact for pair in found if pair not in reference for artifact in pair[1:])
    files = {kind: artifact.files[kind] for kind, artifact in reference}
    return Artifact(bundle.name, reference[0][1].spec, files, variants)

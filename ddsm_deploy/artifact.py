"""Finding a model: a file, a bundle folder or the name of a shipped model becomes one `Artifact`.

A bundle is a folder with ``bundle.json``:

    {"format": 1, "name": "ddsm-lite0", "artifacts": [
        {"file": "model.onnx", "kind": "onnx", "precision": "fp32", "sha256": "..."},
        {"file": "model.safetensors", "kind": "checkpoint", "precision": "fp32", "sha256": "..."}]}

Every file of a bundle is checked against its sha256 when the bundle is opened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.onnxfile import read_spec
from ddsm_deploy.spec import METADATA_KEY, ModelSpec, sha256_of

DEFAULT_MODEL = "ddsm-lite0"
"""What runs when no model is named."""

BUNDLE_FILE = "bundle.json"
BUNDLE_FORMAT = 1

KINDS = {"onnx": ".onnx", "checkpoint": ".safetensors"}
"""Kinds of file a model comes in, each with its suffix."""

_MAX_HEADER = 100_000_000  # bytes: safetensors' own limit


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A model found on disk.

    Attributes:
        name: the bundle's name, or the file's stem.
        spec: read from the file itself.
        files: kind (of `KINDS`) -> file.
    """

    name: str
    spec: ModelSpec
    files: Mapping[str, Path]

    def file(self, kind: str) -> Path:
        """The file of a kind.

        Raises:
            ArtifactError: the model has none; the message says what to run.
        """
        if kind in self.files:
            return self.files[kind]
        if kind == "onnx":
            source = self.files["checkpoint"]
            command = f"ddsm export {source} -o {source.with_suffix('.onnx')}"
            raise ArtifactError(f"{self.name} has no ONNX file; make one with: {command}")
        raise ArtifactError(
            f"{self.name} has no {kind} ({KINDS.get(kind, kind)}), only {', '.join(sorted(self.files))}; "
            "name the checkpoint it was exported from, or a bundle that holds both"
        )


def resolve(model: str | Path | None = None) -> Artifact:
    """Finds a model and reads its record.

    Args:
        model: an ``.onnx`` file, a ``.safetensors`` checkpoint, a bundle folder, or the name of a shipped model; None
            is `DEFAULT_MODEL`. A shipped name wins over a file of that name here: write ``./NAME`` for the file.

    Raises:
        ArtifactError: nothing of that name, or it is damaged, foreign or incomplete.
    """
    if model is None:
        model = DEFAULT_MODEL
    if str(model) in shipped_models():
        return _bundle(_models_folder() / str(model))
    path = Path(model)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as exc:
        raise ArtifactError(f"{path}: can't be read ({exc.strerror or exc})") from exc
    if is_folder:
        return _bundle(path)
    kind = next((kind for kind, suffix in KINDS.items() if path.suffix.lower() == suffix), None)
    if kind is not None:
        return Artifact(path.stem, _spec_of(kind, path), {kind: path})
    if exists:
        raise ArtifactError(f"{path}: not a model; expected an .onnx file, a .safetensors file or a bundle folder")
    known = ", ".join(shipped_models()) or "none"
    raise ArtifactError(f"no model {str(model)!r}: neither a file nor a folder, nor a shipped model (shipped: {known})")


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


def _models_folder() -> Path:
    return Path(__file__).parent / "models"


def _spec_of(kind: str, path: Path) -> ModelSpec:
    return read_spec(path) if kind == "onnx" else read_checkpoint_spec(path)


def _bundle(folder: Path) -> Artifact:
    record = folder / BUNDLE_FILE
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        form, name = fields["format"], str(fields["name"])
        if form != BUNDLE_FORMAT:
            raise ArtifactError(f"{record}: format {form}; this version reads {BUNDLE_FORMAT}; update ddsm-deploy")
        entries = [(str(e["kind"]), str(e["file"]), str(e["sha256"])) for e in fields["artifacts"]]
    except FileNotFoundError as exc:
        raise ArtifactError(f"{folder}: not a model bundle (no {BUNDLE_FILE} in it)") from exc
    except OSError as exc:
        raise ArtifactError(f"{record}: can't be read ({exc.strerror or exc})") from exc
    except (RecursionError, ValueError, TypeError, KeyError) as exc:
        raise ArtifactError(f"{record}: not a bundle record ({type(exc).__name__}: {exc})") from exc
    files: dict[str, Path] = {}
    for kind, file, digest in entries:
        if kind not in KINDS or kind in files:
            raise ArtifactError(f"{record}: artefact of kind {kind!r}; expected one each of {', '.join(KINDS)} at most")
        files[kind] = _checked(folder, file, digest)
    if not files:
        raise ArtifactError(f"{record}: lists no artefact")
    specs = [_spec_of(kind, path) for kind, path in sorted(files.items(), reverse=True)]  # onnx before checkpoint
    if any(spec.classes != specs[0].classes for spec in specs):
        raise ArtifactError(f"{record}: its files are not of one model (their classes differ)")
    return Artifact(name, specs[0], files)


def _checked(folder: Path, file: str, digest: str) -> Path:
    path = folder / file
    if Path(file).name != file:
        raise ArtifactError(f"{folder / BUNDLE_FILE}: refers to {file!r} outside the bundle; refused")
    try:
        actual = sha256_of(path)
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{path}: can't be read ({getattr(exc, 'strerror', None) or exc})") from exc
    if actual != digest.lower():
        raise ArtifactError(f"{path}: damaged (sha256 {actual[:12]}…, the bundle says {digest[:12]}…); fetch it again")
    return path

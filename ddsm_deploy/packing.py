"""Putting the files of one model into a bundle: what can be told apart is told apart, the rest is checked on opening.

Each tensor is in a bundle once: its ONNX files share one file of weights, and the checkpoint where that holds the same
bytes (see `onnxweights`).

Needs no runtime, no torch and no ONNX package.
"""

from __future__ import annotations

import dataclasses
import errno
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ddsm_deploy.artifact import BUNDLE_SUFFIX, Artifact, differences, resolve
from ddsm_deploy.bundlefile import BUNDLE_FILE, KINDS, Bundle, Member, bundle_at, describe
from ddsm_deploy.enginefile import read_record, record_path
from ddsm_deploy.errors import ArtifactError, ConfigError, InputError
from ddsm_deploy.files import replacing, writing
from ddsm_deploy.onnxweights import SharedWeights, checkpoint_regions, copy_whole, model_sha256
from ddsm_deploy.spec import sha256_of

WEIGHTS = "model.weights"
"""What the ONNX files of a bundle share."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can state


@dataclasses.dataclass(frozen=True)
class BundleReport:
    """A bundle that was written.

    Attributes:
        path: the folder or the zip.
        bundle: its record.
        bytes: of all files but the record.
    """

    path: Path
    bundle: Bundle
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """One file on its way into a bundle: where it is, what it is, and which model (see `model_sha256`)."""

    path: Path
    kind: str
    artifact: Artifact
    sha256: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it among the members."""
        return self.kind, self.artifact.spec.precision, self.artifact.target

    @property
    def file(self) -> str:
        """Its name in the bundle."""
        _, precision, target = self.key
        forms = [precision, target] if (precision, target) != ("fp32", "") else []
        return ".".join(["model", *filter(None, forms)]) + KINDS[self.kind]


def make_bundle(
    output: str | Path, sources: Sequence[str | Path], *, name: str | None = None, overwrite: bool = False
) -> BundleReport:
    """Puts files of one model into one bundle.

    Args:
        output: a folder, made where missing, whose earlier bundle is replaced; or a ``.zip``, whose bytes depend on
            nothing but the members.
        sources: checkpoints, ONNX files, engines with their record beside them, and bundles (all of their members).
        name: of the bundle; None is the output's own, without the suffix.
        overwrite: also where members of the earlier bundle, or files that belong to none, are lost by it. A member made
            anew from what is bundled is no loss; another checkpoint, or a file of another model, is.

    Raises:
        ConfigError: no source, or two of the same kind, precision and target.
        ArtifactError: a source is damaged, or not of the same model as the others.
        InputError: the output can't be written, or something there would be lost.
    """
    output = Path(output)
    zipped = output.suffix.lower() == BUNDLE_SUFFIX
    if name is None:
        name = output.stem if zipped else output.resolve().name
    with writing(output):  # a folder that may not be entered, a name that is too long
        if output.is_dir() if zipped else output.is_file():
            taken = "folder" if zipped else "file"
            raise InputError(f"{output}: is a {taken}; name a folder, or a file that ends in .zip")
    parts = _gather(sources)
    _check_one_model(parts)
    if not overwrite:
        with writing(output):
            _check_nothing_is_lost(output, zipped, parts)
    place = output.parent if zipped else output
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".part", dir=place) as temporary:
            stage = Path(temporary)  # all is made in there first, so that a bundle can be extended in its own place
            bundle = _fill(stage, parts, name)
            total = sum((stage / file).stat().st_size for file in bundle.files)
            if zipped:
                _zip(stage, bundle).replace(output)
            else:
                _move(stage, bundle, output)
    except OSError as exc:
        raise InputError(f"{output}: can't be written ({exc.strerror or exc})") from exc
    return BundleReport(output, bundle, total)


def write_whole(output: str | Path, source: str | Path) -> int:
    """Writes one ONNX file of a bundle so that it stands alone, and returns its size in bytes.

    Args:
        output: the file; there must be none yet, for bundles are written by naming the output first as well.
        source: an ONNX file, or a bundle that holds only one.

    Raises:
        ConfigError: the source is, or holds, other than one ONNX file.
        ArtifactError: the source is damaged.
        InputError: the output is there, or can't be written.
    """
    output = Path(output)
    with writing(output):
        if output.exists():
            raise InputError(f"{output}: is a {'folder' if output.is_dir() else 'file'} already; name a new file")
    artifact = resolve(source)
    found = [part.files["onnx"] for part in artifact.parts() if "onnx" in part.files]
    if len(found) != 1:
        names = f" ({', '.join(map(str, found))})" if found else ""
        raise ConfigError(f"{source} holds {len(found)} ONNX files{names}; name one")
    with replacing(output) as temporary:
        with writing(output):
            copy_whole(found[0], temporary)
        return temporary.stat().st_size


def _check_nothing_is_lost(output: Path, zipped: bool, parts: Sequence[_Part]) -> None:
    """Refuses to write over what is not among the files of the new bundle.

    Raises:
        InputError: it names what would be lost.
    """
    there = bundle_at(output)
    made = [output] if zipped else [output / name for name in (*(part.file for part in parts), WEIGHTS)]
    lost = [] if there is None else _lost_members(output, there, parts)
    what = f"of the bundle that is there; to keep it, name {output} among the files too"
    if not lost:
        known = set() if there is None else {output, *(output / name for name in there.files)}
        sources = {part.path.resolve() for part in parts}
        lost = [path.name for path in made if path.exists() and path not in known and path.resolve() not in sources]
        what = "which belongs to no bundle" if len(lost) == 1 else "which belong to no bundle"
    if lost:
        raise InputError(f"{output}: this would lose {', '.join(lost)}, {what}; overwrite it, or name another output")


def _lost_members(output: Path, there: Bundle, parts: Sequence[_Part]) -> list[str]:
    """Files of an earlier bundle that the new one has not, nor anything made from the same weights in their place."""
    new = {part.key: part for part in parts}
    related = set().union(*map(_lineage, parts))
    lost = [member.file for member in there.members if member.key not in new]
    try:
        old = [_part(artifact) for artifact in resolve(output).parts()]
    except ArtifactError:  # damaged: its record is all there is to go by
        return lost
    for part in old:
        replaced = part.key in new and part.sha256 != new[part.key].sha256
        if replaced and (part.kind == "checkpoint" or not related & _lineage(part)):
            lost.append(part.path.name)
    return lost


def _gather(sources: Sequence[str | Path]) -> list[_Part]:
    parts: dict[tuple[str, str, str], _Part] = {}
    for source in sources:
        for artifact in resolve(source).parts():
            part = _part(artifact)
            other = parts.setdefault(part.key, part)
            if other.sha256 != part.sha256:
                raise ConfigError(
                    f"{other.path} and {part.path} are both {describe(*part.key)}; a bundle holds one each"
                )
    if not parts:
        raise ConfigError("nothing to put into a bundle; name at least one model file")
    order = list(KINDS)
    # the reference first, so that a bundle of equal members is equal however they were named
    return sorted(parts.values(), key=lambda p: (p.key[1:] != ("fp32", ""), order.index(p.kind), p.key))


def _part(artifact: Artifact) -> _Part:
    ((kind, path),) = artifact.files.items()
    if kind not in KINDS:
        raise ArtifactError(f"{path}: a served model; a bundle takes files that run by themselves")
    return _Part(path, kind, artifact, model_sha256(path))


def _check_one_model(parts: Sequence[_Part]) -> None:
    """Compares the records, and follows what each file says it was made from.

    Raises:
        ArtifactError: a file is of another model.
    """
    first = parts[0]
    for part in parts[1:]:
        if found := differences(first.artifact, part.artifact):
            raise ArtifactError(f"{part.path}: not of the same model as {first.path} (their {', '.join(found)} differ)")
    related = _lineage(first)
    waiting = list(parts[1:])
    while waiting:
        near = [part for part in waiting if related & _lineage(part)]
        if not near:
            raise ArtifactError(
                f"{waiting[0].path}: made from other weights than {first.path}, or nothing here links them (their "
                "provenance names no common sha256); if they are one model, add the file from which both were made"
            )
        related |= set().union(*map(_lineage, near))
        waiting = [part for part in waiting if part not in near]


def _lineage(part: _Part) -> set[str]:
    """Sha256s of the file and of the files that it says it was made from."""
    facts = part.artifact.spec.provenance
    made_from = {
        value.lower()
        for key, value in facts.items()
        if key.endswith("sha256") and not key.startswith("calibration") and re.fullmatch("[0-9a-fA-F]{64}", value)
    }
    if part.kind == "engine":
        record = read_record(part.path)
        made_from |= {record.onnx_sha256, record.graph_sha256}
    return {part.sha256, *made_from}


def _fill(stage: Path, parts: Sequence[_Part], name: str) -> Bundle:
    """Writes all files of a bundle into an empty folder."""
    weights = SharedWeights(stage / WEIGHTS)
    for part in parts:
        if part.kind == "checkpoint":
            weights.lend(part.file, checkpoint_regions(part.path))
    members = []
    for part in parts:
        file, record = stage / part.file, {}
        if part.kind == "onnx":
            weights.add(part.path, file)
        else:
            shutil.copyfile(part.path, file)
        if part.kind == "engine":
            shutil.copyfile(record_path(part.path), record_path(file))
            record = {"record": record_path(file).name, "record_sha256": sha256_of(record_path(file))}
        kind, precision, target = part.key
        members.append(
            Member(file=file.name, kind=kind, precision=precision, target=target, sha256=sha256_of(file), **record)
        )
    shared = {"weights": WEIGHTS, "weights_sha256": sha256_of(weights.path)} if weights.path.exists() else {}
    bundle = Bundle(name=name, members=tuple(members), **shared)
    (stage / BUNDLE_FILE).write_text(bundle.to_json(), encoding="utf-8")
    return bundle


def _move(stage: Path, bundle: Bundle, folder: Path) -> None:
    """Puts the files in place of those of the bundle that is there."""
    there = bundle_at(folder)
    stale = set() if there is None else set(there.files)
    for name in (*bundle.files, BUNDLE_FILE):
        if (folder / name).is_dir():  # told while the earlier bundle is whole
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
    (folder / BUNDLE_FILE).unlink(missing_ok=True)  # a folder without it is no bundle
    for name in stale - bundle.files.keys():
        (folder / name).unlink(missing_ok=True)
    for name in (*bundle.files, BUNDLE_FILE):
        (stage / name).replace(folder / name)


def _zip(stage: Path, bundle: Bundle) -> Path:
    """Stored, not deflated: weights hardly shrink, and deflate's bytes differ between versions of zlib."""
    path = stage / "bundle.zip"
    with zipfile.ZipFile(path, "x", strict_timestamps=True) as archive:
        for name in (BUNDLE_FILE, *bundle.files):
            with (stage / name).open("rb") as reading, archive.open(_entry(name), "w", force_zip64=True) as entry:
                shutil.copyfileobj(reading, entry, 1 << 20)
    return path


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3  # Unix, wherever it is written
    info.external_attr = 0o644 << 16
    return info

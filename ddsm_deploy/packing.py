"""Putting the files of one model into a bundle: what can be told apart is told apart, the rest is checked on opening.

Needs no runtime, no torch and no ONNX package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ddsm_deploy.artifact import BUNDLE_SUFFIX, Artifact, differences, resolve
from ddsm_deploy.bundlefile import BUNDLE_FILE, KINDS, Bundle, Member, describe, parse_bundle
from ddsm_deploy.enginefile import read_record, record_path
from ddsm_deploy.errors import ArtifactError, ConfigError, InputError
from ddsm_deploy.onnxfile import external_files
from ddsm_deploy.spec import sha256_of

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can state


@dataclasses.dataclass(frozen=True)
class BundleReport:
    """A bundle that was written.

    Attributes:
        path: the folder or the zip.
        bundle: its record.
        bytes: of all members together.
    """

    path: Path
    bundle: Bundle
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """One file on its way into a bundle: where it is, and its entry there."""

    path: Path
    member: Member
    artifact: Artifact

    @property
    def files(self) -> dict[str, Path]:
        """Name in the bundle -> file."""
        both = {self.member.file: self.path, self.member.record: record_path(self.path)}
        return {name: path for name, path in both.items() if name}


def make_bundle(output: str | Path, sources: Sequence[str | Path], *, name: str | None = None) -> BundleReport:
    """Puts files of one model into one bundle.

    Args:
        output: a folder, made where missing, whose earlier bundle is replaced; or a ``.zip``, whose bytes depend on
            nothing but the members.
        sources: checkpoints, ONNX files, engines with their record beside them, and bundles (all of their members).
        name: of the bundle; None is the output's own, without the suffix.

    Raises:
        ConfigError: no source, or two of the same kind, precision and target.
        ArtifactError: a source is damaged, or not of the same model as the others.
        InputError: the output can't be written.
    """
    output = Path(output)
    zipped = output.suffix.lower() == BUNDLE_SUFFIX
    if name is None:
        name = output.stem if zipped else output.resolve().name
    if output.is_dir() if zipped else output.is_file():
        raise InputError(f"{output}: is a {'folder' if zipped else 'file'}; name a folder, or a file that ends in .zip")
    parts = _gather(sources)
    _check_one_model(parts)
    bundle = Bundle(name=name, members=tuple(part.member for part in parts))
    files = {file: path for part in parts for file, path in part.files.items()}
    total = sum(path.stat().st_size for path in files.values())
    try:
        if zipped:
            _write_zip(output, bundle, files)
        else:
            _write_folder(output, bundle, files)
    except OSError as exc:
        raise InputError(f"{output}: can't be written ({exc.strerror or exc})") from exc
    return BundleReport(output, bundle, total)


def _gather(sources: Sequence[str | Path]) -> list[_Part]:
    parts: dict[tuple[str, str, str], _Part] = {}
    for source in sources:
        for artifact in resolve(source).parts():
            part = _part(artifact)
            other = parts.setdefault(part.member.key, part)
            if other.member.sha256 != part.member.sha256:
                raise ConfigError(
                    f"{other.path} and {part.path} are both {describe(*part.member.key)}; a bundle holds one each"
                )
    if not parts:
        raise ConfigError("nothing to put into a bundle; name at least one model file")
    order = list(KINDS)
    # the reference first, so that a bundle of equal members is equal however they were named
    return sorted(
        parts.values(),
        key=lambda p: (p.member.precision != "fp32" or bool(p.member.target), order.index(p.member.kind), p.member.key),
    )


def _part(artifact: Artifact) -> _Part:
    ((kind, path),) = artifact.files.items()
    if kind not in KINDS:
        raise ArtifactError(f"{path}: a served model; a bundle takes files that run by themselves")
    precision, target = artifact.spec.precision, artifact.target
    if kind == "onnx" and (outside := external_files(path)):
        raise ArtifactError(f"{path}: its weights lie in {outside[0]}; a bundle takes only files that are whole")
    plain = precision == "fp32" and not target
    file = ".".join(["model", *([] if plain else [precision]), *([target] if target else [])]) + KINDS[kind]
    record = (
        {"record": record_path(Path(file)).name, "record_sha256": sha256_of(record_path(path))}
        if kind == "engine"
        else {}
    )
    member = Member(file=file, kind=kind, precision=precision, target=target, sha256=sha256_of(path), **record)
    return _Part(path, member, artifact)


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
    if part.member.kind == "engine":
        record = read_record(part.path)
        made_from |= {record.onnx_sha256, record.graph_sha256}
    return {part.member.sha256, *made_from}


def _write_folder(folder: Path, bundle: Bundle, files: dict[str, Path]) -> None:
    """Copies all files in under temporary names first, so that a bundle can be extended in its own place."""
    folder.mkdir(parents=True, exist_ok=True)
    stale = _listed(folder)
    with _temporaries(folder) as temporary:
        for name, path in files.items():
            shutil.copyfile(path, temporary(name))
        temporary(BUNDLE_FILE).write_text(bundle.to_json(), encoding="utf-8")
        (folder / BUNDLE_FILE).unlink(missing_ok=True)  # a folder without it is no bundle
        for name in stale - files.keys():
            (folder / name).unlink(missing_ok=True)
        for name in (*files, BUNDLE_FILE):
            temporary(name).replace(folder / name)


def _listed(folder: Path) -> set[str]:
    """Names of the files of the bundle that is there; none where there is none, or a broken one."""
    try:
        bundle = parse_bundle((folder / BUNDLE_FILE).read_bytes(), source=BUNDLE_FILE)
    except (OSError, ArtifactError):
        return set()
    return {name for member in bundle.members for name in member.files}


def _write_zip(path: Path, bundle: Bundle, files: dict[str, Path]) -> None:
    """Stored, not deflated: weights hardly shrink, and deflate's bytes differ between versions of zlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporaries(path.parent) as temporary:
        with zipfile.ZipFile(temporary(path.name), "x", strict_timestamps=True) as archive:
            archive.writestr(_entry(BUNDLE_FILE), bundle.to_json())
            for name, source in files.items():
                with source.open("rb") as reading, archive.open(_entry(name), "w", force_zip64=True) as writing:
                    shutil.copyfileobj(reading, writing, 1 << 20)
        temporary(path.name).replace(path)


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3  # Unix, wherever it is written
    info.external_attr = 0o644 << 16
    return info


@contextlib.contextmanager
def _temporaries(folder: Path) -> Iterator[Callable[[str], Path]]:
    """A function from a file's name to a temporary path beside it; what is left of those is removed at the end."""
    made: set[Path] = set()

    def temporary(name: str) -> Path:
        made.add(path := folder / f".{name}.{os.getpid()}.part")
        return path

    try:
        yield temporary
    finally:
        for path in made:
            path.unlink(missing_ok=True)

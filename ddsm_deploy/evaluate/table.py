"""Several ways of running a model, scored one after the other on one data set: the table of `ddsm eval`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.datasets import Dataset
from ddsm_deploy.engines import BACKENDS, FILE_KINDS, EngineOptions, runs_at, usable_backends
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError
from ddsm_deploy.evaluate.accuracy import EvalResult, evaluate, without_nan
from ddsm_deploy.evaluate.metrics import BOUNDARY_TOLERANCE
from ddsm_deploy.runtime.segmenter import AUTO, Segmenter

Model = str | Path | Artifact | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Which rows a table has.

    Attributes:
        backends: one or more backends, or ``auto``; none is ``auto``, and with `everything` all of them, of which those
            that are not usable here say so.
        precisions: likewise; none is each file's own, and with `everything` all that a backend can make of a file.
        samplings: ``fused``, ``portable`` or both, a row each; none is fused where it can be had.
        everything: every file of each model on every backend that reads it. A file that was written for one of the
            backends that read ONNX runs on that one alone; one for TensorRT is scored on all that read ONNX, for its
            graph is what TensorRT computes.
        threads: threads of one inference.
        boundary_tolerance: of the boundary F-score, pixels of the labels.
    """

    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    samplings: tuple[str, ...] = ()
    everything: bool = False
    threads: int | None = None
    boundary_tolerance: int = BOUNDARY_TOLERANCE

    def __post_init__(self) -> None:
        for backend in self.backends:
            if backend not in (AUTO, *BACKENDS):
                raise ConfigError(f"backend is {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
        if self.everything and AUTO in self.backends:
            raise ConfigError("every backend and the one that is chosen by measurement: give --all or --backend auto")
        for precision in self.precisions or (None,):
            EngineOptions(precision=precision, threads=self.threads)  # says now what is wrong with them
        for sampling in self.samplings:
            EngineOptions(sampling=sampling)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one row runs.

    Attributes:
        artifact: the model, or one file of it.
        backend: one of `BACKENDS`, or ``auto``.
        precision: what it must run at; None is its own.
        sampling: how it must sample; None is fused where it can be had.
        named: whether the caller asked for this very row; if so, that it can't run is an error.
    """

    artifact: Artifact
    backend: str
    precision: str | None
    sampling: str | None
    named: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        file: name of the model file that ran, or of the model where none did.
        written: precision that the file is written in, with the backend that it was written for, if any.
        task: what was to run.
        result: the scores, and what ran at which precision; None where it could not run.
        error: why it could not.
        drop: points that the mIoU lies below that of the first row that ran (negative: above); None where it could not.
    """

    file: str
    written: str
    task: Task
    result: EvalResult | None = None
    error: str = ""
    drop: float | None = None

    def fields(self) -> dict[str, Any]:
        """The row as plain values: those of `EvalResult.fields`, and its own."""
        scores = {"backend": self.task.backend} if self.result is None else self.result.fields()
        own = {"file": self.file, "written": self.written, "drop": self.drop, "error": self.error or None}
        return without_nan({**scores, **own})


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows, in the order in which they ran; where Ctrl-C came between, those that were done."""

    rows: tuple[Row, ...]
    interrupted: bool = False

    def to_json(self) -> str:
        """``{"rows": [...]}`` as JSON text; a single row stands alone, as `EvalResult.to_json` has it."""
        if len(self.rows) == 1 and self.rows[0].result is not None:
            return self.rows[0].result.to_json()
        return json.dumps({"rows": [row.fields() for row in self.rows]}, indent=2, ensure_ascii=False)

    def failures(self, *, min_miou: float | None = None, max_drop: float | None = None) -> list[str]:
        """What misses a limit, a sentence each. Rows that did not run miss nothing: see `errors`.

        Args:
            min_miou: least mIoU, 0..100, of every row.
            max_drop: most points that a row's mIoU may lie below the first row's.
        """
        found = []
        for row in self.rows:
            if row.result is None:
                continue
            name = "" if len(self.rows) == 1 else f"{row.file} on {row.result.label}: "
            if min_miou is not None and not row.result.miou >= min_miou:
                found.append(f"{name}mIoU is {row.result.miou:.3f}; expected at least {min_miou:g}")
            if max_drop is not None and not (row.drop is not None and row.drop <= max_drop):
                found.append(f"{name}mIoU lies {row.drop:.3f} below the first row's; expected at most {max_drop:g}")
        return found

    def errors(self) -> list[str]:
        """Why rows that were asked for by name did not run; all reasons where no row ran at all."""
        broken = [row for row in self.rows if row.error]
        return [row.error for row in broken if row.task.named or len(broken) == len(self.rows)]


def score_all(
    models: Sequence[Model],
    dataset: Dataset,
    options: TableOptions | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Table:
    """Scores models on a data set in every way asked for. Ctrl-C ends it, with the rows that are done if there are any.

    Args:
        models: files, bundles or names of shipped models, at least one; None is the default shipped model.
        dataset: images and labels.
        options: see `TableOptions`.
        progress: called after each image with what runs, the number of images done and of all.

    Raises:
        ConfigError: an option is wrong.
        InputError: model and data set have different classes, or an image or label map is unreadable.
        ArtifactError: no such model, or it is damaged.
    """
    options = options or TableOptions()
    rows: list[Row] = []
    reference: float | None = None
    for task in tasks(models, options):
        try:
            row = _row(task, dataset, options, progress)
        except KeyboardInterrupt:
            if not rows:
                raise
            return Table(tuple(rows), interrupted=True)
        if row.result is not None:
            reference = row.result.miou if reference is None else reference
            row = dataclasses.replace(row, drop=reference - row.result.miou)
        rows.append(row)
    return Table(tuple(rows))


def tasks(models: Sequence[Model], options: TableOptions) -> list[Task]:
    """What the rows are going to run, in order: model by model, and the reference of each first."""
    found = []
    for model in models:
        artifact = model if isinstance(model, Artifact) else resolve(model)
        if options.everything:
            found += list(_everything(artifact, options))
        else:
            named = bool(options.backends or options.precisions or options.samplings or len(models) > 1)
            found += [
                Task(artifact=artifact, backend=backend, precision=precision, sampling=sampling, named=named)
                for backend in options.backends or (AUTO,)
                for precision in options.precisions or (None,)
                for sampling in options.samplings or (None,)
            ]
    return found


def _everything(artifact: Artifact, options: TableOptions) -> Iterator[Task]:
    usable = [status.backend for status in usable_backends() if status.available]
    order = [b for b in dict.fromkeys(("onnxruntime", "openvino", *BACKENDS)) if b in (options.backends or BACKENDS)]
    for part in artifact.parts():
        (kind,) = part.files
        readers = [b for b in order if FILE_KINDS[b] == kind]
        if FILE_KINDS.get(part.target) == kind:
            readers = [b for b in readers if b == part.target]
        for backend in readers:
            own: tuple[str | None, ...] = (None,)  # the file's own: what that is on this machine the engine says
            if backend in usable:
                with contextlib.suppress(BackendError):  # the row says the same when its turn comes
                    own = (None, *runs_at(backend, part)[1:])
            for precision in options.precisions or own:
                for sampling in options.samplings or (None,):
                    yield Task(artifact=part, backend=backend, precision=precision, sampling=sampling, named=False)


def _row(task: Task, dataset: Dataset, options: TableOptions, progress: Callable[[str, int, int], None] | None) -> Row:
    artifact = task.artifact
    try:
        asked = EngineOptions(precision=task.precision, threads=options.threads, sampling=task.sampling)
        segmenter = Segmenter.open(artifact, backend=task.backend, warm_up=False, options=asked)
    except (BackendError, ArtifactError) as exc:
        (part, *more) = artifact.parts()
        name = artifact.name if more else next(iter(part.files.values())).name
        return Row(file=name, written=_written(part), task=task, error=str(exc))
    with segmenter:
        text = segmenter.label
        result = evaluate(
            segmenter,
            dataset,
            boundary_tolerance=options.boundary_tolerance,
            progress=(lambda done, total: progress(text, done, total)) if progress else None,
        )
        file = segmenter.file
    if file is None:
        return Row(file=artifact.name, written=artifact.spec.precision, task=task, result=result)
    return Row(file=file.name, written=_written(resolve(file)), task=task, result=result)


def _written(part: Artifact) -> str:
    return part.spec.precision + (f" for {part.target}" if part.target else "")

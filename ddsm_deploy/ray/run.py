"""`segment_on_ray`: what `segment_files` does, in worker processes of Ray, on one machine or many.

The caller's process lists the inputs, hands them out in batches, and keeps the manifest; Ray Data places the workers,
feeds each no faster than it works, and starts it anew where its process dies. Frames and masks never pass through Ray:
a worker reads its inputs and writes its outputs itself, and gives back a few hundred bytes a frame.

An output comes once however often its batch was done: it has one name, its bytes follow from the input, and it appears
whole. An input counts once, by its first record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.ray.cluster import Shape, import_ray, quiet_data, ray_cluster
from ddsm_deploy.ray.inputs import find_inputs
from ddsm_deploy.ray.options import RayOptions
from ddsm_deploy.ray.outputs import existing, open_manifest, remove_halves
from ddsm_deploy.ray.places import Place, import_pyarrow, local_path, shown
from ddsm_deploy.ray.worker import BatchWorker, Job, Recipe
from ddsm_deploy.runtime.manifest import Manifest
from ddsm_deploy.runtime.pipeline import SegmentSummary, check_owners, check_targets, collect, identity_of
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sources import Source
from ddsm_deploy.runtime.worker import Frame


@dataclasses.dataclass(kw_only=True)
class RaySummary(SegmentSummary):
    """How a run on Ray went: `SegmentSummary`, whose `seconds` here hold the start of the workers, and more.

    Attributes:
        workers: asked for.
        threads: of each.
        processes: that gave back a batch; more than `workers` where some died and were started anew.
    """

    workers: int = 0
    threads: int = 0
    processes: int = 0


def segment_on_ray(
    sources: Sequence[str],
    segmenter: Segmenter,
    options: RayOptions,
    *,
    progress: Callable[[SegmentSummary], None] | None = None,
    stop: threading.Event | None = None,
) -> RaySummary:
    """Segments images into ``options.output`` and keeps a manifest there; see `segment_files`, whose results these are.

    Args:
        sources: files, folders and globs, as paths or URIs, see `find_inputs`.
        segmenter: says which model, backend and precision run; workers open their own from the bytes of its file.
        options: what to make, where, and by how many.
        progress: called in this thread at the start and after each batch, with the summary so far.
        stop: once set, the run ends; batches in hand are left for the next one.

    Raises:
        InputError: a source is missing, or the output folder can't be written.
        ConfigError: the folder was made by another model, with other settings or from other sources, or the model lacks
            an output that is asked for.
        BackendMissing: Ray is not installed.
        BackendError: no cluster, or a worker can't run the model.
    """
    if options.products.confidence and "confidence" not in segmenter.outputs:
        raise ConfigError(f"{segmenter.spec.name} was opened without its confidence output")
    import_ray()
    output = Place.of(options.output)
    if output.local:  # workers run in a folder of Ray's
        output = Place(str(local_path(output)))
    inputs = find_inputs(sources, output)
    if output.local and inputs.place.local:
        check_targets(inputs.sources, Path(output.path), options.products, overwrite=options.overwrite)
    identity = identity_of(segmenter)
    with open_manifest(output, identity, overwrite=options.overwrite) as manifest:
        check_owners(inputs.sources, manifest, str(output))
        todo = inputs.sources
        if manifest.finished:
            there, files = existing(output), options.products.files
            done = (s for s in todo if (record := manifest.finished.get(s.path)) and record == inputs.finished(s))
            finished = {source for source in done if there(files(source.name).values())}
            todo = [source for source in todo if source not in finished]
        found = len(inputs.sources)
        summary = RaySummary(output=shown(options.output), found=found, skipped=found - len(todo))
        report = progress or (lambda _: None)
        report(summary)
        if todo:
            with ray_cluster(options) as shape:
                summary.workers, summary.threads = shape.workers, shape.threads
                job = Job(
                    source=inputs.place,
                    output=output,
                    products=options.products,
                    max_pixels=options.max_pixels,
                    identity=identity,
                    threads=shape.threads,
                )
                rows = _rows(todo, Recipe.of(segmenter, shape.threads), job, shape, options)
                _gather(rows, todo, manifest, summary, stop or threading.Event(), report, options)
            remove_halves(output)
    return summary


def _rows(
    todo: Sequence[Source], recipe: Recipe, job: Job, shape: Shape, options: RayOptions
) -> Iterator[list[dict[str, Any]]]:
    """What the workers give back, a batch at a time, as they finish."""
    import ray
    from ray.data import ActorPoolStrategy

    pyarrow = import_pyarrow()
    texts = [json.dumps(source) for source in todo]
    batch = min(options.batch, -(-len(texts) // shape.workers))
    tables = [pyarrow.table({"json": texts[at : at + batch]}) for at in range(0, len(texts), batch)]
    with quiet_data(options.retries):
        table: Any  # a pyarrow.Table, as asked for
        with warnings.catch_warnings():
            # Ray 2.60 announces that 2.64 takes max_task_retries away, and names nothing in its place
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            done = ray.data.from_arrow(tables).map_batches(
                BatchWorker,
                fn_constructor_args=(ray.put(recipe), job),
                batch_size=None,  # a table is a batch
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=min(shape.workers, len(tables))),
                num_cpus=shape.threads,
                max_task_retries=options.retries,
            )
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield [json.loads(text) for text in table["json"].to_pylist()]


def _gather(
    rows: Iterator[list[dict[str, Any]]],
    todo: Sequence[Source],
    manifest: Manifest,
    summary: RaySummary,
    stop: threading.Event,
    report: Callable[[SegmentSummary], None],
    options: RayOptions,
) -> None:
    import ray

    begin = time.perf_counter()
    left = {source.path for source in todo}
    processes: set[str] = set()
    try:
        with contextlib.closing(rows):  # type: ignore[type-var] # a generator
            for batch in rows:
                for row in batch:
                    _check(row)
                    processes.add(row["worker"])
                    if row["record"]["source"] in left:  # else a batch that was done again after it had been counted
                        left.remove(row["record"]["source"])
                        collect(Frame(row["record"], row["hopeless"]), manifest, summary)
                summary.seconds = time.perf_counter() - begin
                summary.processes = len(processes)
                report(summary)
                if stop.is_set() or summary.stopped:
                    break
    except ray.exceptions.RayError as exc:
        raise BackendError(f"Ray ended the run ({' '.join(str(exc).split())}); the same command goes on") from exc
    summary.interrupted = stop.is_set() and bool(left)
    if not summary.interrupted and not summary.stopped:
        why = f"its worker process died {options.retries + 1} times over its batch; --batch 1 tells which frame it is"
        for source in todo:
            if source.path in left:
                collect(Frame({"source": source.path, "error": f"{source.path}: {why}"}), manifest, summary)


def _check(row: dict[str, Any]) -> None:
    if "fatal" in row:
        raise BackendError(f"a worker can't run the model: {row['fatal']}")
    if "bug" in row:
        raise RuntimeError(f"in a worker of Ray:\n{row['bug']}")

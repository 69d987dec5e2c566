"""What `ddsm segment` does with `--engine`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddsm_deploy.cli.stream import Wanted
    from ddsm_deploy.runtime.pipeline import SegmentSummary
    from ddsm_deploy.runtime.worker import SegmentOptions

ENGINES = ("local", "ray")

_STORES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Options of `ddsm segment` that say on how many processes, and where.

    Attributes:
        engine: one of `ENGINES`.
        workers: and the others are for ray alone; None where they were not given.
    """

    engine: str
    workers: int | None
    batch: int | None
    address: str | None

    def check(self, sources: list[str], output: str, wanted: Wanted) -> None:
        """Refuses what does not go together.

        Raises:
            ConfigError: an option or a source is for the other engine.
        """
        from ddsm_deploy.errors import ConfigError
        from ddsm_deploy.streams.sources import is_stream

        if self.engine not in ENGINES:
            raise ConfigError(f"engine is {self.engine!r}; expected {' or '.join(ENGINES)}")
        if self.engine == "local":
            if self.workers or self.batch or self.address:
                raise ConfigError("--workers, --batch and --address are options of --engine ray")
            for place in (*sources, output):
                if place.partition("://")[0].lower() in _STORES and "://" in place:
                    raise ConfigError(f"{place}: the local engine takes files of this machine alone; take --engine ray")
            return
        if wanted.any:
            raise ConfigError("options of streams don't go with --engine ray, which takes images")
        for source in sources:
            if "://" not in source and is_stream(source):
                raise ConfigError(f"{source} is a stream, and --engine ray takes images")


def ray_run(spread: Spread, sources: list[str], output: str, options: SegmentOptions) -> Callable[..., SegmentSummary]:
    """What segments on Ray, given a segmenter, `progress` and `stop`; it says what is wrong before a model is opened.

    Raises:
        BackendMissing: Ray is not installed.
        ConfigError: a product is not made on ray.
    """
    from ddsm_deploy.ray.cluster import import_ray
    from ddsm_deploy.ray.options import RayOptions
    from ddsm_deploy.ray.run import segment_on_ray

    given = {} if spread.batch is None else {"batch": spread.batch}
    asked = RayOptions(
        output=output,
        products=options.products,
        overwrite=options.overwrite,
        max_pixels=options.max_pixels,
        workers=spread.workers,
        threads=options.workers,
        address=spread.address,
        **given,
    )
    import_ray()

    def run(segmenter: Any, **rest: Any) -> SegmentSummary:
        # Ray prints what becomes of its processes on standard output, which may be wanted for --json alone
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            return segment_on_ray(sources, segmenter, asked, **rest)

    return run

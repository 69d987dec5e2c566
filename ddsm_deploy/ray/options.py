"""How a run on Ray is asked for."""

from __future__ import annotations

import dataclasses

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.images import MAX_PIXELS
from ddsm_deploy.runtime.outputs import Products


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What `segment_on_ray` makes, where, and by how many.

    Attributes:
        output: the folder for everything, as a path or a URI such as ``s3://bucket/masks``; made where missing.
        products: which files beside the masks; not COCO, whose one file holds all frames.
        overwrite: make anew what is there, whoever made it.
        max_pixels: larger images are refused, by their header.
        workers: processes, each with the model loaded; None is one a machine, or as many as `threads` leave room for.
        threads: frames that a worker has side by side, each inferred on one thread; it takes as many cores of Ray.
            None shares the cores out among the workers.
        batch: frames handed to a worker at once: what is done again when it dies.
        retries: times that a batch is done again because its worker died; its frames then count as failed.
        address: of a Ray cluster, ``HOST:PORT``, or ``auto`` on one of its machines; None starts Ray on this machine,
            unless this process is connected to a cluster already.
    """

    output: str
    products: Products = dataclasses.field(default_factory=Products)
    overwrite: bool = False
    max_pixels: int = MAX_PIXELS
    workers: int | None = None
    threads: int | None = None
    batch: int = 32
    retries: int = 3
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "batch", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        if self.retries < 0:
            raise ConfigError(f"retries is {self.retries}; expected at least 0")
        if self.products.polygons == "coco":
            raise ConfigError("ray makes no COCO file, which holds all frames; take geojson, or the local engine")
        if self.address is not None and "://" in self.address:
            raise ConfigError(f"address is {self.address!r}; expected HOST:PORT of the cluster's head, or auto")

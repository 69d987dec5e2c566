"""Deploys DDSM segmentation networks: train, export, and run them wherever a robot or a car carries a computer.

    from ddsm_deploy import Segmenter, read_image

    with Segmenter.open() as segmenter:
        result = segmenter.predict(read_image("frame.png"))
    result.mask  # uint8 H×W, class ids

The names below are the package's face. They load on first use: importing the package itself loads no runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddsm_deploy.artifact import Artifact, resolve
    from ddsm_deploy.engines import EngineOptions, open_engine
    from ddsm_deploy.errors import ArtifactError, BackendError, BackendMissing, ConfigError, DdsmError, InputError
    from ddsm_deploy.images import read_image
    from ddsm_deploy.runtime.segmentation import Polygon, Segmentation
    from ddsm_deploy.runtime.segmenter import Segmenter
    from ddsm_deploy.spec import ModelSpec

    __version__: str

_HOMES = {
    "ArtifactError": "errors",
    "Artifact": "artifact",
    "BackendError": "errors",
    "BackendMissing": "errors",
    "ConfigError": "errors",
    "DdsmError": "errors",
    "EngineOptions": "engines",
    "InputError": "errors",
    "ModelSpec": "spec",
    "Polygon": "runtime.segmentation",
    "Segmentation": "runtime.segmentation",
    "Segmenter": "runtime.segmenter",
    "open_engine": "engines",
    "read_image": "images",
    "resolve": "artifact",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "BackendError",
    "BackendMissing",
    "ConfigError",
    "DdsmError",
    "EngineOptions",
    "InputError",
    "ModelSpec",
    "Polygon",
    "Segmentation",
    "Segmenter",
    "open_engine",
    "read_image",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ddsm-deploy")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

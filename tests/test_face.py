"""The package's face: every name on it loads, and is where its home says."""

from __future__ import annotations

import importlib.metadata

import pytest

import ddsm_deploy


@pytest.mark.parametrize("name", ddsm_deploy.__all__)
def test_every_name_loads(name: str) -> None:
    thing = getattr(ddsm_deploy, name)
    assert thing.__name__ == name
    assert thing.__module__.startswith("ddsm_deploy.")
    assert name in dir(ddsm_deploy)


def test_version() -> None:
    assert ddsm_deploy.__version__ == importlib.metadata.version("ddsm-deploy")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'segmenter_'"):
        _ = ddsm_deploy.segmenter_  # type: ignore[attr-defined]

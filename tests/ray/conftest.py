"""A real Ray on this machine, shared by the tests of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ddsm_deploy.ray.cluster import ray_cluster
from ddsm_deploy.ray.options import RayOptions


@pytest.fixture(scope="session")
def cluster(need) -> Iterator[str]:
    """Started as a run starts it, with two cores or as many as there are; gives its address."""
    need("ray")
    with ray_cluster(RayOptions(output="", workers=2, threads=1)):
        import ray

        yield ray.get_runtime_context().gcs_address

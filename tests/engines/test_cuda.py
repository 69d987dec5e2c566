"""CUDA's errors become ours. Where there is no driver, that is what every call says, for real."""

from __future__ import annotations

import pytest

from ddsm_deploy.errors import BackendError


@pytest.fixture
def no_gpu(need, missing) -> None:
    need("cuda")
    from ddsm_deploy.engines.cuda import find_gpu

    if find_gpu() is not None:
        missing("no-gpu", "there is a GPU here")


def test_a_machine_without_a_gpu_is_told(no_gpu: None) -> None:
    from ddsm_deploy.engines.cuda import require_gpu

    with pytest.raises(BackendError, match="no NVIDIA GPU can be used here: "):
        require_gpu()


def test_calls_fail_with_what_they_were_for(no_gpu: None) -> None:
    from ddsm_deploy.engines import cuda

    for call, said in (
        (lambda: cuda.DeviceMemory(100), "CUDA can't get 100 bytes on the GPU: "),
        (lambda: cuda.PinnedMemory(100), "CUDA can't pin 100 bytes: "),
        (cuda.Stream, "CUDA can't create a stream: "),
    ):
        with pytest.raises(BackendError, match=said) as caught:
            call()
        assert "(cudaError" in str(caught.value)


@pytest.mark.gpu
def test_what_a_gpu_says_of_itself() -> None:
    from ddsm_deploy.engines.cuda import find_gpu, require_gpu

    gpu = require_gpu()
    assert find_gpu() == gpu
    assert gpu.name
    assert 50 <= int(gpu.compute_capability) < 1000
    assert gpu.memory > 1e8
    with pytest.raises(BackendError, match="there is no GPU 99 here"):
        require_gpu(99)

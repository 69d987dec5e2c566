"""`Segmenter.stream`, `submit`, and what a worker process gets."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from recordings import mask_of, picture, stamp_of, write_bag

from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import open_engine
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.runtime.segmenter import Segmenter


@pytest.fixture(scope="module")
def segmenter(colour_onnx: Path) -> Iterator[Segmenter]:
    with Segmenter.open(colour_onnx, backend="onnxruntime", threads=1) as opened:
        yield opened


def test_a_recording_by_its_path(segmenter: Segmenter, tmp_path: Path, need) -> None:
    need("rosbags")
    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(8)])
    seen = []
    for frame, result in segmenter.stream(tmp_path / "drive"):
        seen.append(frame.stamp)
        assert np.array_equal(result.mask, mask_of(picture(frame.index)))
    assert seen == [stamp_of(i) for i in range(8)]


def test_images_from_anywhere(segmenter: Segmenter) -> None:
    masks = [result.mask for _, result in segmenter.stream(picture(i) for i in range(5))]
    assert all(np.array_equal(mask, mask_of(picture(i))) for i, mask in enumerate(masks)) and len(masks) == 5
    with pytest.raises(InputError, match="one array"):
        segmenter.stream(picture(0))
    with pytest.raises(InputError, match="uint8"):
        list(segmenter.stream([picture(0).astype(float)]))  # type: ignore[list-item]


def test_submit(colour_onnx: Path) -> None:
    with Segmenter.open(colour_onnx, backend="onnxruntime", threads=1) as segmenter:
        futures = [segmenter.submit(picture(i)) for i in range(12)]
        for index, future in enumerate(futures):
            assert np.array_equal(future.result(30).mask, mask_of(picture(index)))
        last = segmenter.submit(picture(3))
    assert np.array_equal(last.result(0).mask, mask_of(picture(3)))  # closing finishes what was begun


def mask_in_a_process(segmenter: Segmenter, index: int) -> tuple[str, np.ndarray]:
    return segmenter.label, segmenter.predict(picture(index)).mask


def test_a_worker_process_opens_the_same(segmenter: Segmenter) -> None:
    again = pickle.loads(pickle.dumps(segmenter))
    assert (again.label, again.size, again.file) == (segmenter.label, segmenter.size, segmenter.file)
    again.close()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        label, mask = pool.submit(mask_in_a_process, segmenter, 4).result(60)
    assert label == segmenter.label and np.array_equal(mask, mask_of(picture(4)))


def test_an_engine_of_ones_own_is_not_pickled(segmenter: Segmenter, colour_onnx: Path) -> None:
    engine = open_engine(resolve(colour_onnx), backend="onnxruntime")
    own = Segmenter(engine, segmenter.spec, fit="stretch", size=None, choice="mine")
    with own, pytest.raises(ConfigError, match="can't be pickled"):
        pickle.dumps(own)

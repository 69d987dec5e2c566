"""What goes to a worker opens there, wherever the model's weights lay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from painted_graph import paint, write_painted

from ddsm_deploy.onnxfile import external_files
from ddsm_deploy.packing import make_bundle
from ddsm_deploy.ray.worker import Recipe
from ddsm_deploy.runtime.pipeline import open_for_batch


@pytest.fixture(autouse=True)
def _ray(need) -> None:
    need("ray")


def test_weights_beside_the_file_go_along(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", [write_painted(tmp_path / "painted.onnx", paint(1))])
    assert external_files(tmp_path / "bundle" / "model.onnx")
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    with open_for_batch(tmp_path / "bundle", backend="onnxruntime") as segmenter:
        recipe, mask = Recipe.of(segmenter, 1), segmenter.predict(image).mask
    (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    with recipe.open() as again:
        np.testing.assert_array_equal(again.predict(image).mask, mask)

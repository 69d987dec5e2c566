"""The search for sensitive layers, on a model where it is known which one is."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from outlier_graph import write_outlier_model

from ddsm_deploy.artifact import resolve
from ddsm_deploy.export.onnxgraph import load_graph, plain_graph
from ddsm_deploy.export.qdq import SCHEMES, layers
from ddsm_deploy.frames import frames_in
from ddsm_deploy.optimize.calibration import ranges_of
from ddsm_deploy.optimize.material import Material
from ddsm_deploy.optimize.plot import plot_sensitivity
from ddsm_deploy.optimize.quantize import JUDGES
from ddsm_deploy.optimize.sensitivity import Judge, Search, Searcher, search
from ddsm_deploy.parity import ParityBudget
from ddsm_deploy.runtime.segmenter import Segmenter

SIZE = (16, 24)


@pytest.fixture(scope="module", params=["tensorrt", "openvino"])
def searcher(request: pytest.FixtureRequest, need, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """For the targets that have pairs in front of convolutions alone: there the harm is the reader's."""
    backend = JUDGES[request.param]
    need(backend)
    need("onnxruntime")
    folder = tmp_path_factory.mktemp("outlier")
    (folder / "images").mkdir()
    rng = np.random.default_rng(1)
    for index in range(4):
        cv2.imwrite(str(folder / "images" / f"{index}.png"), rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    artifact = resolve(write_outlier_model(folder / "model.onnx", size=SIZE))
    graph = plain_graph(load_graph(folder / "model.onnx"))
    frames = frames_in(folder / "images")
    segmenter = Segmenter.open(artifact, backend=backend)
    request.addfinalizer(segmenter.close)
    return Searcher(
        graph=graph,
        spec=artifact.spec.replace(precision="int8"),
        layers=layers(graph),
        ranges=ranges_of(graph, artifact.spec, frames, method="minmax", fingerprint=str(folder)),
        scheme=SCHEMES[request.param],
        weight_bits=8,
        judge=Judge(Material(segmenter, frames), segmenter),
        backend=backend,
        threads=1,
    )


@pytest.fixture(scope="module")
def found(searcher: Searcher) -> Search:
    return search(searcher, ParityBudget(changed=5.0))


def test_the_harmed_layer_is_left_out_and_no_other(found: Search) -> None:
    assert [layer.label for layer in found.kept] == ["harmed"]
    assert found.quantized == ("conv_safe",)
    assert found.result and found.result.changed < 5
    assert not found.all_quantized and found.all_quantized.changed > 30  # two thirds, were the classes drawn by lot


def test_costs_are_each_layers_own(found: Search) -> None:
    costs = {cost.layer.label: cost for cost in found.costs}
    assert list(costs) == ["safe", "harmed"]
    assert costs["harmed"].changed > 30
    assert costs["safe"].changed < 5
    assert costs["safe"].miou_drop is None  # there are no labels


def test_nothing_is_left_out_where_nothing_must_be(searcher: Searcher) -> None:
    easy = search(searcher, ParityBudget(changed=100.0))
    assert easy.kept == () and easy.costs == () and easy.runs == 1
    assert set(easy.quantized) == {"conv_safe", "conv_harmed"}
    asked = search(searcher, ParityBudget(changed=100.0), always=True)
    assert asked.kept == () and len(asked.costs) == 2


def test_a_budget_of_nothing_leaves_what_changes_nothing(searcher: Searcher) -> None:
    strict = search(searcher, ParityBudget(changed=0.0))
    assert strict.result.changed == 0.0
    assert "harmed" in [layer.label for layer in strict.kept]


def test_progress_is_told(searcher: Searcher) -> None:
    told: list[tuple[str, int, int]] = []
    search(searcher, ParityBudget(changed=5.0), progress=lambda *step: told.append(step))
    assert ("layer by layer", 1, 2) in told
    assert all(done <= planned for _, done, planned in told)


def test_the_plot_is_a_picture(found: Search, tmp_path: Path, need) -> None:
    need("matplotlib")
    plot_sensitivity(found, tmp_path / "plot.png", title="outlier")
    picture = cv2.imread(str(tmp_path / "plot.png"))
    assert min(picture.shape[:2]) > 300
    red = (picture[..., 2] > 150) & (picture[..., 0] < 120) & (picture[..., 1] < 120)
    blue = (picture[..., 0] > 150) & (picture[..., 2] < 120)
    assert red.sum() > 20 * max(1, blue.sum())  # the harmed layer's bar is red, and far higher than the other's

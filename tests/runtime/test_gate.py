"""The gate: what it allows, and that it tells rounding from a wrong graph."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from colour_graph import colour_spec, write_colour_model

from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import open_engine
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.runtime.gate import MAX_NOISE, Gate, frames_for, own_frames

STRIPES = np.zeros((8, 12, 3), np.uint8)
STRIPES[:, :4, 2] = STRIPES[:, 4:8, 1] = STRIPES[:, 8:, 0] = 200  # BGR: red, green, blue, far beyond any noise


def gray(share: float) -> np.ndarray:
    """`STRIPES` with so large a share of the rows in grey, where noise alone decides the class."""
    image = STRIPES.copy()
    image[: round(8 * share)] = 100
    return image


def test_the_packages_own_frames_are_the_example_frames() -> None:
    folder = Path(__file__).parents[2] / "examples" / "frames"
    frames = own_frames()
    assert len(frames) == 3
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, cv2.imread(str(folder / f"street_{index}.jpg")))


def test_frames_have_the_networks_size_and_channel_order() -> None:
    wide = STRIPES.repeat(2, 0).repeat(2, 1)
    bgr = frames_for(colour_spec(), [wide], (8, 12))
    np.testing.assert_array_equal(bgr.feeds[0][0][:, [0, 5, 11]], STRIPES[:, [0, 5, 11]])
    rgb = frames_for(colour_spec(channel_order="rgb"), [wide], (8, 12))
    np.testing.assert_array_equal(rgb.feeds[0], bgr.feeds[0][..., ::-1])
    assert rgb.digest == bgr.digest
    assert frames_for(colour_spec(), [wide[:, ::-1]], (8, 12)).digest not in ("", bgr.digest)
    assert frames_for(colour_spec(), None, (8, 12)).digest == ""


@pytest.mark.parametrize("wrong", [np.zeros((8, 12), np.uint8), np.zeros((8, 12, 3)), "frame.png"])
def test_what_is_no_frame(wrong: object) -> None:
    with pytest.raises(InputError, match="no image"):
        frames_for(colour_spec(), [wrong], (8, 12))  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no frame to compare on"):
        frames_for(colour_spec(), [], (8, 12))


def test_clear_frames_allow_what_is_stated(tmp_path: Path) -> None:
    with open_engine(resolve(write_colour_model(tmp_path / "a.onnx")), "onnxruntime") as engine:  # type: ignore[attr-defined]
        gate = Gate(engine, frames_for(colour_spec(), [STRIPES], (8, 12)), colour_spec())
        assert gate.noise == 0
        assert [gate.allowed(p) for p in ("fp32", "fp16", "bf16", "int8", "int8+bf16")] == [1, 1, 1, 3, 3]
        result = gate.judge(engine, "bf16")
        assert (result.changed, gate.objection(result, "bf16")) == (0, "")


def test_a_wrong_graph_is_passed_over(tmp_path: Path) -> None:
    """The other graph takes red for blue: 8 of 12 columns change."""
    right = resolve(write_colour_model(tmp_path / "a.onnx"))
    wrong = resolve(write_colour_model(tmp_path / "b.onnx", channel_order="rgb"))
    with open_engine(right, "onnxruntime") as engine, open_engine(wrong, "onnxruntime") as other:  # type: ignore[attr-defined]
        gate = Gate(engine, frames_for(colour_spec(), [STRIPES], (8, 12)), colour_spec())
        result = gate.judge(other, "int8")
        assert result.changed == pytest.approx(100 * 8 / 12)
        assert gate.objection(result, "int8") == "66.7 % of the pixels changed class, expected at most 3 %"


def test_unsteady_frames_allow_more_and_at_last_judge_nothing(tmp_path: Path) -> None:
    with open_engine(resolve(write_colour_model(tmp_path / "a.onnx")), "onnxruntime") as engine:  # type: ignore[attr-defined]
        little = Gate(engine, frames_for(colour_spec(), [STRIPES] * 9 + [gray(0.5)], (8, 12)), colour_spec())
        # five per cent of the pixels are grey; noise moves two thirds of them, roughly
        assert 2 < little.noise < 5
        assert little.allowed("bf16") == little.noise
        assert little.allowed("int8") == 2 * little.noise
        much = Gate(engine, frames_for(colour_spec(), [gray(0.5)], (8, 12)), colour_spec())
        assert much.noise > MAX_NOISE
        result = much.judge(engine, "bf16")
        assert "can't be judged: noise of 2 levels alone changes" in much.objection(result, "bf16")
        assert much.objection(result, "fp32") == ""

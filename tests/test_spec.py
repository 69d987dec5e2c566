"""The model's record: text and back without loss, and every check that it makes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from ddsm_deploy.errors import ArtifactError, ConfigError
from ddsm_deploy.spec import FORMAT, FUSIONS, ModelSpec, NetworkConfig, default_palette, parse_size, sha256_of

LEVEL = st.integers(0, 255)
POSITIVE = st.floats(1e-3, 1e3)

networks = st.builds(
    NetworkConfig,
    backbone=st.from_regex(r"[A-Za-z0-9_.-]+", fullmatch=True),
    fusion=st.sampled_from(FUSIONS),
    channels=st.integers(1, 20).map(lambda side: side * side),
    sample_channels=st.integers(1, 512),
    samples=st.sampled_from([1, 4, 9, 16, 25]),
    dilation=st.integers(1, 16),
    pooled=st.integers(1, 32),
    detail=st.integers(0, 64),
    enlarge=st.floats(1, 4),
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    count = draw(st.integers(1, 30))
    return ModelSpec(
        name=draw(st.text()),
        classes=tuple(draw(st.lists(st.text(min_size=1), min_size=count, max_size=count, unique=True))),
        palette=tuple(draw(st.lists(st.tuples(LEVEL, LEVEL, LEVEL), min_size=count, max_size=count))),
        height=draw(st.integers(1, 4096)),
        width=draw(st.integers(1, 4096)),
        mean=draw(st.tuples(POSITIVE, POSITIVE, POSITIVE)),
        std=draw(st.tuples(POSITIVE, POSITIVE, POSITIVE)),
        channel_order=draw(st.sampled_from(["bgr", "rgb"])),
        precision=draw(st.sampled_from(["fp32", "fp16", "bf16", "int8"])),
        network=draw(networks),
        provenance=draw(st.dictionaries(st.text(), st.text())),
    )


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{"classes": ("road", "sky"), **changes})


def record(**changes: Any) -> dict[str, Any]:
    """The JSON fields of a right record, some of them changed."""
    return {**json.loads(spec().to_json()), **changes}


class TestJson:
    @hypothesis.given(specs())
    @hypothesis.settings(deadline=None)
    def test_round_trip(self, one: ModelSpec) -> None:
        assert ModelSpec.from_json(one.to_json()) == one

    def test_equal_specs_give_equal_bytes(self) -> None:
        one = spec(provenance={"a": "1", "b": "2"})
        two = spec(provenance={"b": "2", "a": "1"})
        assert one.to_json() == two.to_json()

    def test_names_in_any_script_stay_readable(self) -> None:
        assert "Straße 道" in spec(classes=("Straße 道", "sky")).to_json()

    def test_a_newer_format_names_the_cure(self) -> None:
        text = json.dumps(record(format=FORMAT + 1))
        with pytest.raises(ArtifactError, match=f"m.onnx: its record has format {FORMAT + 1}.*update ddsm-deploy"):
            ModelSpec.from_json(text, source="m.onnx")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "nonsense",
            "[]",
            "null",
            "3",
            "{}",
            "[" * 100_000,
            json.dumps(record(format="one")),
            json.dumps(record(classes=3)),
            json.dumps(record(classes=[])),
            json.dumps(record(height="tall")),
            json.dumps(record(height=0)),
            json.dumps(record(palette=[[0, 0, 0]])),
            json.dumps(record(palette=7)),
            json.dumps(record(std=[1, 0, 1])),
            json.dumps(record(network=None)),
            json.dumps(record(network={"samples": 8})),
            json.dumps(record(network={"unheard_of": 1})),
            json.dumps(record(unheard_of=1)),
            json.dumps({k: v for k, v in record().items() if k != "network"}),
        ],
    )
    def test_a_damaged_record_is_one_line_with_its_source(self, text: str) -> None:
        with pytest.raises(ArtifactError, match=r"^m\.onnx: its model record can't be read") as caught:
            ModelSpec.from_json(text, source="m.onnx")
        assert "\n" not in str(caught.value)

    def test_what_development_versions_wrote(self) -> None:
        text = json.dumps(record(network={"detail": 8, "detail_samples": 0}))
        assert ModelSpec.from_json(text).network == NetworkConfig(detail=8)
        text = json.dumps(record(network={"detail": 8, "detail_samples": 4}))
        with pytest.raises(
            ArtifactError, match=r"it has detail_samples, which this version does not know; use the ver"
        ):
            ModelSpec.from_json(text)


class TestChecks:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"classes": ()}, "got 0 classes; expected 1 to 255"),
            ({"classes": tuple(map(str, range(256)))}, "got 256 classes; expected 1 to 255"),
            ({"palette": ((0, 0, 0),)}, "got 1 colours for 2 classes"),
            ({"palette": ((0, 0, 0), (0, 0))}, "not an RGB triple"),
            ({"palette": ((0, 0, 0), (0, 0, 256))}, "not an RGB triple"),
            ({"height": 0}, "input size is 0x480"),
            ({"width": -1}, "input size is 360x-1"),
            ({"mean": (1.0, 2.0)}, "mean and std need three values"),
            ({"std": (1.0, 2.0, 0.0)}, "std above zero"),
            ({"channel_order": "gbr"}, "channel order is 'gbr'; expected bgr or rgb"),
            ({"std": (1.0, 2.0, math.nan)}, "std above zero"),
            ({"mean": (1.0, 2.0, math.nan)}, "expected finite numbers"),
            ({"std": (1.0, 2.0, math.inf)}, "expected finite numbers"),
            ({"precision": "fp8"}, "precision is 'fp8'; expected one of fp32"),
            ({"classes": ("a", "b", "a")}, "same name"),
        ],
    )
    def test_spec(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            spec(**changes)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"fusion": "sum"}, "fusion is 'sum'; expected one of ddsm, spatial, channel, add"),
            ({"samples": 8}, r"samples \(N\) is 8; expected a square number from 1 to 25"),
            ({"samples": 0}, r"samples \(N\) is 0"),
            ({"samples": 36}, r"samples \(N\) is 36"),
            ({"samples": 4.0}, r"samples \(N\) is 4.0"),
            ({"samples": True}, r"samples \(N\) is True"),
            ({"channels": 60}, r"channels \(C\) is 60; .* 64, 144 or 256"),
            ({"channels": 60, "fusion": "channel"}, r"channels \(C\) is 60"),
            ({"channels": 0, "fusion": "add"}, "channels is 0; expected an integer of at least 1"),
            ({"sample_channels": 0}, "sample_channels is 0"),
            ({"dilation": 1.5}, "dilation is 1.5"),
            ({"backbone": "hf-hub:somebody/something"}, "backbone is 'hf-hub:somebody/something'; expected the name"),
            ({"backbone": "local-dir:/nowhere"}, "backbone is 'local-dir:/nowhere'"),
            ({"pooled": True}, "pooled is True"),
            ({"enlarge": 0.5}, "enlarge is 0.5; expected a number from 1 to 4"),
            ({"detail": -1}, "detail is -1; expected an integer of at least 0"),
        ],
    )
    def test_network(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            NetworkConfig(**changes)

    @pytest.mark.parametrize("fusion", ["spatial", "add"])
    def test_only_the_channel_branch_needs_a_square_width(self, fusion: str) -> None:
        assert NetworkConfig(fusion=fusion, channels=60).channels == 60

    def test_it_cannot_be_changed_in_place(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            spec().height = 3  # type: ignore[misc]


def test_replace_and_provenance_leave_the_original_alone() -> None:
    one = spec(provenance={"data": "camvid"})
    two = one.replace(height=64).with_provenance(torch="2", data="city")
    assert (one.height, one.provenance) == (360, {"data": "camvid"})
    assert (two.height, two.provenance) == (64, {"data": "city", "torch": "2"})


def test_default_palette_is_the_voc_colour_map_without_black() -> None:
    # the first colours of the PASCAL VOC development kit's VOClabelcolormap, background left out
    assert default_palette(5) == ((128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128))
    assert len(set(default_palette(255))) == 255
    assert (0, 0, 0) not in default_palette(255)


def test_spec_without_a_palette_gets_one() -> None:
    assert spec().palette == default_palette(2)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 20) + 1])
def test_sha256_of_a_file(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("text", "size"), [("360x480", (360, 480)), (" 1x1 ", (1, 1)), ("1024×2048", (1024, 2048)), ("064x96", (64, 96))]
)
def test_parse_size(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "360", "360x", "x480", "0x480", "360x0", "360,480", "-1x4", "1e3x4", "100000x4"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HEIGHTxWIDTH, for instance 360x480"):
        parse_size(text)

"""How an engine samples: fused models are written out for builders without plugins; who may ask for the plugin."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddsm_deploy.artifact import resolve
from ddsm_deploy.enginefile import read_engine
from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.optimize.build import BuildOptions, build_engine
from ddsm_deploy.optimize.buildoptions import engine_name


def test_without_a_plugin_a_fused_model_is_written_out(tiny_fused: Path, tiny_onnx: Path, tmp_path: Path, need) -> None:
    """It makes the engine that the portable model makes, but for a constant here and there."""
    need("tensorrt_rtx")
    options = BuildOptions(target="tensorrt-rtx", precision="fp16", compute_capabilities=("86",))
    report = build_engine(tiny_fused, tmp_path / "fused.engine", options)
    portable = build_engine(tiny_onnx, tmp_path / "portable.engine", options)
    record = read_engine(report.path)
    assert (record.sampling, record.spec.provenance["sampling"]) == ("portable", "portable")
    assert (portable.record.sampling, resolve(tiny_fused).spec.provenance["sampling"]) == ("portable", "fused")
    assert record.layers == portable.record.layers
    assert record.notes == portable.record.notes == ()
    assert report.parity


def test_the_plugin_is_for_tensorrt_alone(tiny_fused: Path) -> None:
    with pytest.raises(ConfigError, match=r"tensorrt-rtx has no option 'sampling': fused sampling is a plugin"):
        BuildOptions(target="tensorrt-rtx", sampling="fused")
    with pytest.raises(ConfigError, match="sampling is 'gather'; expected portable or fused"):
        BuildOptions(target="tensorrt", sampling="gather")
    for name in ("version_compatible", "hardware_compatible"):
        with pytest.raises(ConfigError, match="nobody has tried it on others; leave out --version-compatible"):
            BuildOptions(target="tensorrt", sampling="fused", **{name: True})
    options = BuildOptions(target="tensorrt", sampling="fused")
    assert engine_name(resolve(tiny_fused), options) == "fused.fp32.fused.tensorrt.engine"


@pytest.mark.gpu
def test_the_plugin_samples_as_grid_sample_does(tiny_fused: Path, tmp_path: Path, missing) -> None:
    """No GPU has run this yet."""
    import numpy as np

    from ddsm_deploy.engines import EngineOptions, open_engine, usable_backends

    if not next(entry.available for entry in usable_backends() if entry.backend == "tensorrt"):
        missing("tensorrt", "it is not installed here")
    images = np.random.default_rng(3).integers(0, 256, (8, 1, 64, 96, 3), dtype=np.uint8)
    for precision in ("fp32", "fp16"):
        masks = {}
        for sampling in ("fused", "portable"):
            options = BuildOptions(target="tensorrt", precision=precision, sampling=sampling)
            engine_file = tmp_path / f"{precision}.{sampling}.engine"
            record = build_engine(tiny_fused, engine_file, options).record
            assert (record.sampling, record.spec.provenance["sampling"]) == (sampling, sampling)
            with open_engine(resolve(engine_file), "tensorrt") as engine:
                assert engine.sampling == sampling
                masks[sampling] = np.concatenate([engine.run({"image": image})["mask"] for image in images])
            other = {"fused": "portable", "portable": "fused"}[sampling]
            with pytest.raises(BackendError, match=rf"--sampling {other}"):
                open_engine(resolve(engine_file), "tensorrt", EngineOptions(sampling=other))
        assert (masks["fused"] != masks["portable"]).mean() < 0.001

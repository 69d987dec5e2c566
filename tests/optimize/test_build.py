"""The shipped models as TensorRT-RTX engines: every precision, fixed and open sizes, and what the build log proves.

Nothing here runs an engine. What is asserted of a graph's numbers was computed by a CPU runtime from the very graph.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from colour_graph import write_colour_model
from onnx import numpy_helper

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.enginefile import Profile, read_engine, record_path
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, GateError, InputError
from ddsm_deploy.export.sampling_function import inline_sampling
from ddsm_deploy.kernels import heap_path
from ddsm_deploy.onnxfile import read_spec
from ddsm_deploy.onnxweights import model_sha256
from ddsm_deploy.optimize.build import BuildOptions, BuildReport, build_engine
from ddsm_deploy.optimize.buildoptions import check_options, engine_name, parse_profile

REPO = Path(__file__).parents[2]
AMPERE_ON = ("86", "89", "120")  # one engine for all three is as large as one for each
BATCH = Profile(min=(1, 360, 480, 3), opt=(1, 360, 480, 3), max=(4, 360, 480, 3))
SIZES = Profile(min=(1, 128, 128, 3), opt=(1, 360, 480, 3), max=(4, 1024, 2048, 3))
PROFILES = {"none": None, "batch": BATCH, "batch,size": SIZES}

pytestmark = pytest.mark.timeout(900)  # an export with open sizes takes a minute, more where others use the machine


@pytest.fixture(scope="session")
def forms(kept, need, large_model: Path) -> dict[str, Path]:
    """The larger model's float32 ONNX by its open axes; kept until the network, the exporter or the weights change."""
    for module in ("tensorrt_rtx", "torch", "onnx", "onnxscript", "onnxruntime"):
        need(module)
    from ddsm_deploy.export import ExportOptions, export_onnx

    def make(folder: Path) -> None:
        for dynamic in ("batch", "batch,size"):
            path = folder / f"{dynamic.replace(',', '-')}.onnx"
            export_onnx(large_model / "model.safetensors", path, ExportOptions(dynamic=dynamic, verify=False))

    package = REPO / "ddsm_deploy"
    sources = [
        *(package / "model").glob("*.py"),
        *(package / "export").glob("*.py"),
        large_model / "model.safetensors",
    ]
    folder = kept("open-forms", sources, make)
    return {
        "none": large_model / "model.onnx",
        "batch": folder / "batch.onnx",
        "batch,size": folder / "batch-size.onnx",
    }


@pytest.fixture(scope="session")
def graph(forms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`graph(dynamic, precision)`: a file that can be built at that precision, made once.

    Of fixed size they are the shipped ones. The INT8 ones with open axes are for counting layers: their ranges are one
    for all, not calibrated, so their masks mean nothing.
    """
    folder = tmp_path_factory.mktemp("graphs")

    def make(dynamic: str, precision: str) -> Path:
        if not precision.startswith("int8"):
            return forms[dynamic]
        if dynamic == "none":
            return forms["none"].with_name("model.int8.tensorrt.onnx")
        path = folder / f"{dynamic}.int8.onnx"
        if not path.exists():
            from ddsm_deploy.export.onnxgraph import load_graph, plain_graph, save_graph
            from ddsm_deploy.export.qdq import SCHEMES, calibrated_tensors, insert_qdq, layers

            plain = plain_graph(load_graph(forms[dynamic]))
            names = [layer.name for layer in layers(plain)]
            ranges = dict.fromkeys(calibrated_tensors(plain), (-6.0, 6.0))
            # the last three stay in float, so that a mixture is counted
            quantized = insert_qdq(plain, ranges, names[:-3], SCHEMES["tensorrt"])
            spec = read_spec(forms[dynamic]).replace(precision="int8").with_provenance(target="tensorrt")
            save_graph(quantized, path, spec)
        return path

    return make


@pytest.fixture(scope="session")
def built(graph, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BuildReport]:
    """`built(dynamic, precision, *compute_capabilities)`: the report of a build, made once."""
    folder = tmp_path_factory.mktemp("engines")
    reports: dict[tuple[str, ...], BuildReport] = {}

    def make(dynamic: str, precision: str, *capabilities: str) -> BuildReport:
        key = (dynamic, precision, *capabilities)
        if key not in reports:
            options = BuildOptions(
                target="tensorrt-rtx",
                precision=precision,
                compute_capabilities=capabilities,
                profile=PROFILES[dynamic],
                verify=False,
            )
            reports[key] = build_engine(graph(dynamic, precision), folder / f"{len(reports)}.engine", options)
        return reports[key]

    return make


def expected_convolutions(path: Path, precision: str) -> collections.Counter[str]:
    """What the graph asks for, counted in the float32 or INT8 file: a convolution behind a DequantizeLinear is Int8."""
    model = onnx.load(path)
    quantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    rest = "Half" if "fp16" in precision else "Float"
    return collections.Counter(
        "Int8" if node.input[0] in quantized else rest for node in model.graph.node if node.op_type == "Conv"
    )


@pytest.mark.parametrize("dynamic", PROFILES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8+fp16"])
def test_every_precision_and_form_builds_and_computes_as_written(built, graph, dynamic: str, precision: str) -> None:
    report = built(dynamic, precision, *AMPERE_ON)
    record = read_engine(report.path)
    assert record == report.record
    assert (record.target, record.compute_capabilities) == ("tensorrt-rtx", AMPERE_ON)
    assert (record.spec.precision, record.spec.provenance["target"]) == (precision, "tensorrt-rtx")
    source = graph(dynamic, precision)
    assert record.layers["Conv"] == expected_convolutions(source, precision)
    assert sum(record.layers["Conv"].values()) == 85  # of ddsm-lite0-large
    # products of matrices are never quantized, and in float16 only where the graph says so
    assert set(record.layers["MatMul"]) == {"Half" if "fp16" in precision else "Float"}
    assert len(record.notes) == (dynamic != "none" and heap_path() is None)  # that another may have other bytes
    open_axes = {"none": (1, 360, 480, 3), "batch": (-1, 360, 480, 3), "batch,size": (-1, -1, -1, 3)}[dynamic]
    (image,) = record.inputs
    assert (image.name, image.dtype, image.shape) == ("image", "uint8", open_axes)
    assert [(mask.name, mask.dtype, mask.shape) for mask in record.outputs] == [("mask", "uint8", open_axes[:3])]
    assert record.profiles == ({"image": PROFILES[dynamic]} if PROFILES[dynamic] else {})
    assert record.onnx_sha256 == model_sha256(source)


@pytest.mark.parametrize("dynamic", PROFILES)
def test_turing_builds_in_float16(built, dynamic: str) -> None:
    record = built(dynamic, "fp16", "75").record
    assert record.layers["Conv"] == {"Half": 85}
    assert record.compute_capabilities == ("75",)


def test_turing_runs_no_int8_and_the_record_says_so(built, graph) -> None:
    record = built("none", "int8+fp16", "75").record
    assert record.layers["Conv"] == {"Half": 85}
    quantized = read_spec(graph("none", "int8+fp16")).provenance["quantized"].split()[0]
    assert record.notes[0].startswith(f"{quantized} nodes are not computed as written: ")
    assert "in Half, not Int8" in record.notes[0]


def test_turing_refuses_float32_at_once(graph, tmp_path: Path) -> None:
    options = BuildOptions(target="tensorrt-rtx", precision="fp32", compute_capabilities=("86", "75"), verify=False)
    with pytest.raises(BackendError, match=r"MatMul .*75 \(Turing\); build it with --precision fp16, or leave 75 out"):
        build_engine(graph("none", "fp32"), tmp_path / "x.engine", options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dynamic", "precision"),
    [
        *(("none", precision) for precision in ("fp32", "fp16", "int8", "int8+fp16")),
        ("batch", "int8"),
        *(("batch,size", precision) for precision in ("fp32", "fp16", "int8+fp16")),
    ],
)
def test_equal_input_gives_equal_bytes(
    built, graph, missing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamic: str, precision: str
) -> None:
    if dynamic != "none" and heap_path() is None:
        missing("kernels", "the heap for it was not built")
    first = built(dynamic, precision, *AMPERE_ON)
    monkeypatch.setenv("MORE", "x" * 3000)  # which moves what comes after it in memory
    options = BuildOptions(
        target="tensorrt-rtx",
        precision=precision,
        compute_capabilities=("120", "8.6", "sm_89"),  # the same three, said otherwise
        profile=PROFILES[dynamic],
        verify=False,
    )
    again = build_engine(graph(dynamic, precision), tmp_path / "again.engine", options)
    assert again.path.read_bytes() == first.path.read_bytes()
    assert record_path(again.path).read_bytes() == record_path(first.path).read_bytes()


def test_the_float16_graph_is_compared_before_it_is_built(shipped_model: Path, tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    need("onnxruntime")
    frames = (REPO / "examples" / "frames" / "street_0.jpg", REPO / "examples" / "frames" / "street_3.jpg")
    strict = BuildOptions(target="tensorrt-rtx", precision="fp16", images=frames, max_changed=0.0)
    with pytest.raises(GateError, match="not written; the fp16 graph is too far from the float32 model on 2 images"):
        build_engine(None, tmp_path / "none.engine", strict)
    assert not list(tmp_path.iterdir())

    seen: list[str] = []
    forced = dataclasses.replace(strict, force=True)
    report = build_engine(None, tmp_path / "lite.engine", forced, progress=lambda text, share: seen.append(text))
    assert report.parity is not None
    assert not report.parity
    assert report.parity.images == 2
    assert 0 < report.parity.changed < 0.5  # float16 has 11 bits: pixels whose two best classes nearly tie may move
    assert report.record.parity["changed"] == f"{report.parity.changed:.2f}"
    assert seen[0] == "comparing with the float32 graph"
    assert any(text.startswith("building: ") for text in seen)
    assert resolve(tmp_path / "lite.engine").spec.precision == "fp16"
    if report.engine_parity is None:
        assert report.record.parity["engine"] == "not run: no GPU here that could"


def test_int8_with_float16_is_compared_on_openvino(shipped_model: Path, tmp_path: Path, need) -> None:
    for module in ("tensorrt_rtx", "openvino"):
        need(module)
    frames = (REPO / "examples" / "frames" / "street_0.jpg",)
    options = BuildOptions(target="tensorrt-rtx", precision="int8+fp16", images=frames)
    report = build_engine(None, tmp_path / "lite.engine", options)
    assert report.parity
    assert 0 < report.parity.changed < 5
    assert report.record.onnx_sha256 == model_sha256(shipped_model / "model.int8.tensorrt.onnx")


def test_ranges_that_nobody_calibrated_do_not_pass(graph, forms, tmp_path: Path, need) -> None:
    need("openvino")
    variant = Artifact("lite", read_spec(graph("batch", "int8")), {"onnx": graph("batch", "int8")})
    model = Artifact("lite", read_spec(forms["batch"]), {"onnx": forms["batch"]}, (variant,))
    options = BuildOptions(target="tensorrt-rtx", precision="int8+fp16", profile=BATCH)
    with pytest.raises(GateError, match=r"the int8\+fp16 graph is too far .* % of the pixels"):
        build_engine(model, tmp_path / "x.engine", options)
    assert not list(tmp_path.iterdir())


def test_a_variant_is_found_by_its_precision(graph, forms, tmp_path: Path) -> None:
    variant = Artifact("lite", read_spec(graph("none", "int8")), {"onnx": graph("none", "int8")})
    model = Artifact("lite", read_spec(forms["none"]), {"onnx": forms["none"]}, (variant,))
    options = BuildOptions(target="tensorrt-rtx", precision="int8", compute_capabilities=AMPERE_ON, verify=False)
    record = build_engine(model, tmp_path / "x.engine", options).record
    assert record.onnx_sha256 == model_sha256(graph("none", "int8"))
    assert record.options == {"source": "lite"}
    assert record.parity["graph"] == "not compared: verification was off"


def test_int8_that_is_not_there_says_how_to_make_it(forms, tmp_path: Path) -> None:
    for precision, flag in (("int8", ""), ("int8+fp16", " --fp16")):
        options = BuildOptions(target="tensorrt-rtx", precision=precision)
        line = f"ddsm quantize {forms['none']} --calibration DIR --target tensorrt{flag} -o model-int8.onnx"
        with pytest.raises(ConfigError) as caught:
            build_engine(forms["none"], tmp_path / "x.engine", options)
        assert str(caught.value).endswith(f"make one with: {line}")


def test_int8_for_a_cpu_runtime_is_refused(graph, tmp_path: Path) -> None:
    """What OpenVINO is fastest on, uint8 activations, TensorRT would read as int8."""
    model = onnx.load(graph("none", "int8"))
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in zeros:
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), tensor.name))
    onnx.save(model, tmp_path / "unsigned.onnx")
    options = BuildOptions(target="tensorrt-rtx", verify=False)
    with pytest.raises(BackendError, match=r"QuantizeLinear .* is of uint8, which TensorRT reads as int8"):
        build_engine(tmp_path / "unsigned.onnx", tmp_path / "x.engine", options)


def test_opset_20_is_refused_before_nvidia_sees_it(forms, tmp_path: Path) -> None:
    model = inline_sampling(onnx.load(forms["none"]))
    model.opset_import[0].version = 20
    for node in model.graph.node:
        if node.op_type == "GridSample":
            next(a for a in node.attribute if a.name == "mode").s = b"linear"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "twenty.onnx")
    with pytest.raises(BackendError, match=r"GridSample '[^']+' is of opset 20.*export it at opset 19"):
        build_engine(tmp_path / "twenty.onnx", tmp_path / "x.engine", BuildOptions(target="tensorrt-rtx"))


def test_too_little_workspace_is_told(graph, tmp_path: Path) -> None:
    options = BuildOptions(
        target="tensorrt-rtx",
        precision="fp16",
        profile=SIZES,
        workspace=0.25,
        verify=False,
        compute_capabilities=("86",),
    )
    with pytest.raises(BackendError, match="give it more with --workspace, or narrow the profile"):
        build_engine(graph("batch,size", "fp16"), tmp_path / "x.engine", options)


def test_the_graph_is_not_written_over(need, tmp_path: Path) -> None:
    need("tensorrt_rtx")
    source = write_colour_model(tmp_path / "m.onnx")
    before = source.read_bytes()
    link = tmp_path / "m.engine"
    link.hardlink_to(source)
    for output, said in ((source, r"ends in \.engine"), (link, "belongs to the model that is read")):
        with pytest.raises(InputError, match=said):
            build_engine(source, output, BuildOptions(target="tensorrt-rtx", verify=False))
    assert source.read_bytes() == before


def test_a_profile_is_asked_for_and_checked(graph, tmp_path: Path) -> None:
    for dynamic, profile, said in (
        ("batch", None, r"takes \?x360x480 .*for instance: --profile 1x360x480:1x360x480:4x360x480"),
        ("none", BATCH, "fixed to 1x360x480; leave it out, or export the model with --dynamic"),
        ("batch", SIZES, "the profile says 128 on axis 1, where the model is fixed to 360"),
    ):
        options = BuildOptions(target="tensorrt-rtx", profile=profile)
        with pytest.raises(ConfigError, match=said):
            build_engine(graph(dynamic, "fp32"), tmp_path / "x.engine", options)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target": "onnxruntime"}, "target is 'onnxruntime'; expected tensorrt or tensorrt-rtx"),
        ({"precision": "bf16"}, "precision is 'bf16'; expected one of fp32, fp16, int8, int8+fp16"),
        ({"timing_cache": Path("t")}, "no option 'timing cache': it times nothing"),
        ({"version_compatible": True}, "no option 'version compatible': its package has no lean runtime"),
        ({"hardware_compatible": True}, "no option 'hardware compatible': its engines run on every GPU"),
        ({"dla_core": 0}, "no option 'dla core': it runs on RTX GPUs"),
        ({"builder_optimization_level": 0}, "no option 'builder optimization level'"),
        ({"target": "tensorrt", "compute_capabilities": ("86",)}, "it builds for the GPU on which it runs"),
        ({"compute_capabilities": ("Ampere",)}, "compute capability is 'Ampere'; expected a number such as 86 or 8.6"),
        ({"workspace": 0.0}, "workspace is 0.0 GiB"),
        ({"target": "tensorrt", "builder_optimization_level": 6}, "expected 0 to 5"),
        ({"verify": False, "images": (Path("a"),)}, "drop one of the two"),
    ],
)
def test_options_that_a_target_lacks_are_errors(fields: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BuildOptions(**{"target": "tensorrt-rtx", **fields})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("version", "precision", "said"),
    [
        ("10.3.0", "fp16", ""),
        ("10.7.0.23", "int8", ""),
        ("10.13.3.9", "fp16", "10.7 was the last version with one, and 11.4.1 brings it back"),
        ("11.4.0.106", "fp16", "has no DLA"),
        ("11.4.1.12", "fp16", ""),
        ("10.7.0.23", "fp32", "computes in fp16 and int8 only"),
    ],
)
def test_which_versions_have_a_dla(version: str, precision: str, said: str) -> None:
    options = BuildOptions(target="tensorrt", precision=precision, dla_core=0)
    if said:
        with pytest.raises(ConfigError, match=said):
            check_options(options, version)
    else:
        check_options(options, version)


def test_profiles_as_text() -> None:
    assert parse_profile("1x128x128:1x360x480:4x1024x2048") == SIZES
    for text in ("", "1x2x3", "1x2x3:1x2x3", "1x2:1x2:1x2", "a:b:c", "1x2x3:1x2x3:1x2x3:1x2x3"):
        with pytest.raises(ConfigError, match="expected MIN:OPT:MAX"):
            parse_profile(text)
    with pytest.raises(ConfigError, match="grow"):
        parse_profile("2x64x64:1x64x64:4x64x64")


def test_names_of_engines(forms) -> None:
    options = BuildOptions(target="tensorrt-rtx", precision="int8+fp16")
    assert engine_name(resolve(forms["none"]), options) == "model.int8+fp16.tensorrt-rtx.engine"


def test_bad_files(forms, tmp_path: Path, tiny_checkpoint: Path) -> None:
    options = BuildOptions(target="tensorrt-rtx", verify=False)
    (tmp_path / "cut.onnx").write_bytes(forms["none"].read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        build_engine(tmp_path / "cut.onnx", tmp_path / "x.engine", options)
    with pytest.raises(ArtifactError, match="has no ONNX file; make one with: ddsm export"):
        build_engine(tiny_checkpoint, tmp_path / "x.engine", options)
    with pytest.raises(InputError, match="is a folder"):
        build_engine(forms["none"], tmp_path, options)
    with pytest.raises(InputError, match="can't be written"):
        build_engine(forms["none"], tmp_path / "cut.onnx" / "x.engine", options)


def test_what_is_not_in_a_record(built, tmp_path: Path) -> None:
    """No time, no path, nothing of one machine: so equal builds have equal records."""
    text = record_path(built("none", "fp16", *AMPERE_ON).path).read_text(encoding="utf-8")
    assert str(tmp_path.parent) not in text
    assert str(REPO) not in text
    fields = json.loads(text)
    assert "seconds" not in fields
    assert fields["versions"].keys() == {"ddsm-deploy", "onnx", "python"}

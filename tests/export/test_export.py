"""Exported files: equal to torch on every runtime, of the promised form, with their record inside."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference
from torch import nn

from ddsm_deploy.errors import ConfigError, GateError
from ddsm_deploy.export import ExportOptions, ExportReport, export_onnx
from ddsm_deploy.export.sampling_function import inline_sampling
from ddsm_deploy.export.tensorrt.builder import Job, build
from ddsm_deploy.export.verify import synthetic_images
from ddsm_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from ddsm_deploy.onnxfile import read_metadata
from ddsm_deploy.spec import METADATA_KEY, ModelSpec, sha256_of

Run = Callable[[Path | bytes, dict[str, npt.NDArray]], list[npt.NDArray]]
Exported = Callable[..., ExportReport]

pytestmark = pytest.mark.timeout(1200)  # the exporter takes minutes where other work fills the machine

ALL = ("mask", "logits", "confidence")
FULL = {"outputs": ALL}
HALF = {"outputs": ALL, "weights": "fp16", "half": True}
EXPORTS = {
    "ddsm, float16 weights": ("ddsm", HALF),
    "ddsm, any batch": ("ddsm", {"outputs": ALL, "dynamic": "batch"}),
    "ddsm, any batch and size": ("ddsm", {"outputs": ALL, "dynamic": "batch,size"}),
    "spatial, gather, any batch, rgb": (
        "spatial",
        {"outputs": ALL, "sampling": "gather", "dynamic": "batch", "channel_order": "rgb"},
    ),
    "channel, gather": ("channel", {"outputs": ALL, "sampling": "gather"}),
    "add": ("add", FULL),
    "detail, enlarged": ("detail", FULL),
    "detail, enlarged, any batch and size": ("detail", {"outputs": ALL, "dynamic": "batch,size"}),
    "ddsm, fused, float16 weights": ("ddsm", {**HALF, "sampling": "fused"}),
}
TOLERANCE = 2e-4  # of logits that reach into the tens: float32 over some forty layers, summed in another order


@pytest.fixture(scope="module", params=EXPORTS)
def report(request: pytest.FixtureRequest, exported: Exported) -> ExportReport:
    fusion, options = EXPORTS[request.param]
    return exported(fusion, **options)


@pytest.fixture
def source(report: ExportReport, checkpoint: Callable[..., Path]) -> Path:
    """The checkpoint that `report` was made from."""
    spec = report.spec
    return checkpoint(
        "detail" if spec.network.detail else spec.network.fusion, half=spec.provenance["weights"] == "fp16"
    )


def images(report: ExportReport) -> list[npt.NDArray[np.uint8]]:
    """Batches that the file must take: what its input leaves open is used."""
    height, width = report.spec.height, report.spec.width
    dynamic = report.spec.provenance["dynamic"]
    batches = [synthetic_images(height, width, 2)[1]]
    if "batch" in dynamic:
        batches.append(np.concatenate(synthetic_images(height, width, 3)))
    if "size" in dynamic:
        batches += [np.concatenate(synthetic_images(77, 121, 2)), *synthetic_images(33, 32, 1)]
    return batches


def torch_logits(network: nn.Module, image: npt.NDArray[np.uint8], spec: ModelSpec) -> npt.NDArray[np.float32]:
    """What the network says, normalised here by hand as the spec says."""
    rgb = image[..., ::-1] if spec.channel_order == "bgr" else image
    normalised = (rgb.astype(np.float64) - spec.mean) / spec.std
    with torch.inference_mode():
        return network(torch.from_numpy(normalised).float().permute(0, 3, 1, 2)).numpy()


def test_equals_torch(run: Run, report: ExportReport, source: Path) -> None:
    network, _ = load_checkpoint(source)
    for image in images(report):
        mask, logits, confidence = run(report.path, {"image": image})
        want = torch_logits(network, image, report.spec)
        np.testing.assert_allclose(logits, want, rtol=0, atol=TOLERANCE)

        assert (mask.dtype, mask.shape) == (np.uint8, image.shape[:3])
        second, best = np.sort(want, axis=1)[:, -2:].swapaxes(0, 1)
        clear = best - second > 2 * TOLERANCE  # elsewhere rounding may decide
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(mask[clear], want.argmax(1)[clear])

        exponentials = np.exp(want.astype(np.float64) - want.max(1, keepdims=True))
        probability = 1.0 / exponentials.sum(1)
        assert (confidence.dtype, confidence.shape) == (np.uint8, image.shape[:3])
        np.testing.assert_allclose(confidence, 255 * probability, rtol=0, atol=1)


def test_the_exports_own_comparison(report: ExportReport) -> None:
    assert report.parity
    assert report.parity.changed <= 0.1
    assert report.parity.images >= 4
    assert report.parity.max_logit_error is not None
    assert report.parity.max_logit_error < TOLERANCE


def test_form_of_the_graph(report: ExportReport) -> None:
    model = onnx.load(report.path)
    onnx.checker.check_model(model, full_check=True)
    fused = report.spec.provenance["sampling"] == "fused"
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 19), *[("ddsm", 1)] * fused]
    assert [f.name for f in model.functions] == ["DynamicSampleAttention"] * fused

    graph = model.graph
    found = collections.Counter(node.op_type for node in graph.node)
    forbidden = {"Einsum", "Loop", "If", "Scan", "BatchNormalization", "AveragePool", "GlobalAveragePool"}
    if report.spec.network.enlarge != 1 and "size" in report.spec.provenance["dynamic"]:
        # a known flaw: the exporter reads sizes off five convolutions, and leaves their batch norms unfolded
        assert found["BatchNormalization"] <= 5
        forbidden.remove("BatchNormalization")
    assert not found.keys() & forbidden
    calls = {"ddsm": 6, "spatial": 3, "channel": 3, "add": 0}[report.spec.network.fusion]
    sampler = {"portable": "GridSample", "fused": "DynamicSampleAttention"}.get(report.spec.provenance["sampling"])
    assert {op: found[op] for op in ("GridSample", "DynamicSampleAttention")} == {
        op: calls if op == sampler else 0 for op in ("GridSample", "DynamicSampleAttention")
    }

    makers = {output: node for node in graph.node for output in node.output}
    assert (graph.node[0].op_type, list(graph.node[0].input)) == ("Cast", ["image"])
    assert makers["mask"].op_type == "Cast"
    assert makers[makers["mask"].input[0]].op_type == "ArgMax"
    assert sum("image" in node.input for node in graph.node) == 1
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    assert inferred
    assert not [info.name for info in inferred if info.type.tensor_type.elem_type == TensorProto.UINT8]


def test_inputs_and_outputs(report: ExportReport) -> None:
    graph = onnx.load(report.path).graph
    size = (report.spec.height, report.spec.width)
    n, h, w = {"none": (1, *size), "batch": ("N", *size), "batch,size": ("N", "H", "W")}[
        report.spec.provenance["dynamic"]
    ]

    def described(info: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
        tensor = info.type.tensor_type
        return info.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]

    assert [described(i) for i in graph.input] == [("image", TensorProto.UINT8, [n, h, w, 3])]
    assert [described(o) for o in graph.output] == [
        ("mask", TensorProto.UINT8, [n, h, w]),
        ("logits", TensorProto.FLOAT, [n, 11, h, w]),
        ("confidence", TensorProto.UINT8, [n, h, w]),
    ]


def test_record(report: ExportReport, source: Path) -> None:
    metadata = read_metadata(report.path)
    assert set(metadata) == {METADATA_KEY}
    spec = ModelSpec.from_json(metadata[METADATA_KEY])
    assert spec == report.spec
    _, trained = load_checkpoint(source)
    assert (spec.classes, spec.palette, spec.mean, spec.std) == (
        trained.classes,
        trained.palette,
        trained.mean,
        trained.std,
    )
    assert (spec.height, spec.width, spec.precision) == (64, 96, "fp32")
    assert spec.provenance["source_sha256"] == sha256_of(source)
    assert report.parity
    assert float(spec.provenance["parity.changed"]) == pytest.approx(report.parity.changed, abs=0.005)
    assert spec.provenance["parity.images"] == str(report.parity.images)
    assert spec.provenance["version.torch"] == torch.__version__.split("+")[0]
    assert (report.sha256, report.bytes) == (sha256_of(report.path), report.path.stat().st_size)


def test_nothing_of_this_machine_in_the_file(report: ExportReport) -> None:
    model = onnx.load(report.path)
    graph = model.graph
    assert not model.doc_string + graph.doc_string
    assert not any(
        item.metadata_props for item in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output)
    )
    data = report.path.read_bytes()
    for trace in (b".py", b"stack_trace", str(Path.home()).encode() + b"/", str(Path.cwd()).encode(), b"/tmp"):
        assert trace not in data


def test_float16_weights_are_those_of_the_checkpoint(exported: Exported, checkpoint: Callable[..., Path]) -> None:
    report = exported("ddsm", **HALF)
    assert report.half_share > 0.99
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer}
    network, _ = load_checkpoint(checkpoint("ddsm", half=True))
    convolutions = {f"network.{n}.weight": m.weight for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convolutions) > 50
    # the channel branch's last convolution is part of a matrix at inference, and no convolution in the file
    gone = {name for name in convolutions if name.endswith(".channel.out.0.weight")}
    assert len(gone) == 3 and not gone & stored.keys()
    for name, weight in convolutions.items():
        if name in gone:
            continue
        assert stored[name].dtype == np.float16
        np.testing.assert_array_equal(stored[name].astype(np.float32), weight.detach().numpy(), err_msg=name)


def test_runtimes_fold_the_casts_of_float16_weights(exported: Exported, tmp_path: Path, need) -> None:
    path = exported("ddsm", **HALF).path
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that an optimised file fits this machine only
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(options.optimized_model_filepath).graph
    assert sum(node.op_type == "Cast" for node in optimised.node) == 3  # of the image, the mask and the confidence
    assert not [t.name for t in optimised.initializer if t.data_type == TensorProto.FLOAT16]

    need("openvino")
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = collections.Counter(op.get_rt_info()["layerType"] for op in compiled.get_runtime_model().get_ordered_ops())
    assert kinds["Convert"] <= 4  # those, and one of the class ids to 32 bits


def test_fused_is_portable_in_other_words(run: Run, exported: Exported) -> None:
    """The same network both ways: six nodes and one body, which inlined are the very operators of the portable file."""
    fused = onnx.load(exported("ddsm", **HALF, sampling="fused").path)
    portable = onnx.load(exported("ddsm", **HALF).path)
    calls = [node for node in fused.graph.node if node.domain == "ddsm"]
    assert len(calls) == 6
    for node in calls:
        assert [(a.name, helper.get_attribute_value(a)) for a in node.attribute] == [
            ("plugin_namespace", b"ddsm"),
            ("plugin_version", b"1"),
            ("samples", 9),
        ]
    inlined = inline_sampling(fused)
    onnx.checker.check_model(inlined, full_check=True)
    kinds = [collections.Counter(node.op_type for node in model.graph.node) for model in (inlined, portable)]
    assert kinds[0] == kinds[1]
    image = synthetic_images(64, 96, 1)[0]
    want = run(portable.SerializeToString(), {"image": image})
    for model in (fused, inlined):
        got = run(model.SerializeToString(), {"image": image})
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(got[1], want[1], rtol=0, atol=TOLERANCE)


def test_tensorrt_builds_a_fused_file(exported: Exported, tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    file = exported("ddsm", **HALF, sampling="fused").path
    engine = tmp_path / "fused.engine"
    built = build(Job(target="tensorrt-rtx", onnx=file, engine=engine, sampling=("linear",) * 6))
    assert [(t.name, t.shape) for t in built.outputs] == [
        ("mask", (1, 64, 96)),
        ("logits", (1, 11, 64, 96)),
        ("confidence", (1, 64, 96)),
    ]


def test_weights_that_are_no_float16_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="half=True"):
        export_onnx(checkpoint("add"), tmp_path / "model.onnx", ExportOptions(weights="fp16"))
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_with_torch_is_not_written(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Two classes whose logits differ by rounding alone: torch and ONNX Runtime then choose each in its own way."""
    network, spec = load_checkpoint(checkpoint("add"))
    weight, bias = network.head[1].weight.detach(), network.head[1].bias.detach()
    bias[:2] += 1000.0
    weight[1] = weight[0] * (1 + 1e-6 * torch.randn(weight[0].shape, generator=torch.Generator().manual_seed(0)))
    bias[1] = bias[0]
    twins = tmp_path / "twins.safetensors"
    save_checkpoint(twins, network, spec)
    with pytest.raises(GateError, match=r"not written, .* 4 images: .* % of the pixels changed class"):
        export_onnx(twins, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["twins.safetensors"]

"""A Triton model repository: what is in it, by Triton's own schema, and when none is written."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from colour_graph import CLASSES, colour_graph, colour_spec, write_colour_model
from onnx import helper
from painted_graph import paint, painted_graph

from ddsm_deploy.artifact import resolve
from ddsm_deploy.enginefile import EngineRecord, Profile, TensorRecord, writing_engine
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, DdsmError, InputError
from ddsm_deploy.spec import ModelSpec, sha256_of


@pytest.fixture(autouse=True)
def _tritonclient(need) -> None:
    need("tritonclient")


def deploy(model: object, repository: Path, **options: object):
    from ddsm_deploy.export.triton.config import TritonOptions
    from ddsm_deploy.export.triton.repository import deploy

    return deploy(model, repository, TritonOptions(**options))  # type: ignore[arg-type]


def configured(folder: Path):
    """``config.pbtxt``, read by the schema of tritonclient and nothing of ours."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    return write_colour_model(tmp_path / "fixed.onnx")


@pytest.fixture
def open_batch(tmp_path: Path) -> Path:
    """The colour model with the batch alone left open."""
    model = colour_graph(colour_spec())
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.save(model, tmp_path / "colours.onnx")
    return tmp_path / "colours.onnx"


def test_an_open_batch(open_batch: Path, tmp_path: Path) -> None:
    report = deploy(open_batch, tmp_path / "repository", batch_delay_us=500, instances=2, threads=3)
    assert contents(tmp_path / "repository") == ["colours/1/model.onnx", "colours/config.pbtxt"]
    assert report.file.read_bytes() == open_batch.read_bytes()
    assert (report.name, report.version, report.max_batch, report.notes) == ("colours", 1, 8, ())

    config = configured(report.folder)
    assert (config.name, config.platform, config.backend) == ("colours", "onnxruntime_onnx", "onnxruntime")
    assert (config.max_batch_size, config.default_model_filename) == (8, "model.onnx")
    (image,), (mask,) = config.input, config.output
    assert (image.name, image.data_type, list(image.dims)) == ("image", 2, [8, 12, 3])  # 2 is TYPE_UINT8
    assert (mask.name, mask.data_type, list(mask.dims)) == ("mask", 2, [8, 12])
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_CPU")
    assert [(w.batch_size, list(w.inputs["image"].dims), w.inputs["image"].zero_data) for w in config.model_warmup] == [
        (1, [8, 12, 3], True),
        (8, [8, 12, 3], True),
    ]
    texts = {name: value.string_value for name, value in config.parameters.items()}
    assert ModelSpec.from_json(texts.pop("ddsm.spec")) == resolve(open_batch).spec
    assert texts == {
        "ddsm.sampling": "portable",
        "ddsm.sha256": sha256_of(open_batch),
        "intra_op_thread_count": "3",
    }


def test_a_fixed_batch_is_not_batched_and_says_so(fixed: Path, tmp_path: Path) -> None:
    report = deploy(fixed, tmp_path / "repository", name="street")
    config = configured(report.folder)
    assert (config.name, config.max_batch_size, config.HasField("dynamic_batching")) == ("street", 0, False)
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([1, 8, 12, 3], [1, 8, 12])
    assert [(w.batch_size, list(w.inputs["image"].dims)) for w in config.model_warmup] == [(1, [1, 8, 12, 3])]
    assert report.notes == (
        "its batch is fixed at 1, so Triton runs one request a time and batches nothing "
        "(open it with: ddsm export CKPT --dynamic batch)",
    )


def test_open_sizes_are_warmed_up_at_the_specs(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "any.onnx", dynamic=True)
    config = configured(deploy(model, tmp_path / "repository", max_batch=1).folder)
    assert (config.max_batch_size, list(config.input[0].dims)) == (1, [-1, -1, 3])
    assert not config.HasField("dynamic_batching")
    assert [(w.batch_size, list(w.inputs["image"].dims)) for w in config.model_warmup] == [(1, [8, 12, 3])]


def test_the_gpu(fixed: Path, tmp_path: Path) -> None:
    config = configured(deploy(fixed, tmp_path / "a", device="gpu").folder)
    assert config.instance_group[0].Kind.Name(config.instance_group[0].kind) == "KIND_GPU"
    assert not config.HasField("optimization")
    config = configured(deploy(fixed, tmp_path / "b", device="gpu", accelerator="tensorrt").folder)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("tensorrt", {"precision_mode": "FP32"})


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_stock_onnxruntime_runs_what_is_deployed(shipped_model: Path, tmp_path: Path, precision: str, need) -> None:
    """A process that never imports this package, so without its kernels; the shipped files are fused."""
    need("onnxruntime")
    report = deploy(shipped_model, tmp_path / "repository", precision=precision)
    assert report.spec.precision == precision
    assert any(note.startswith("the server samples by standard operators") for note in report.notes)
    onnx.checker.check_model(onnx.load(report.file), full_check=True)
    script = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "(mask,) = session.run(['mask'], {'image': numpy.zeros((1, 360, 480, 3), numpy.uint8)})\n"
        "assert 'ddsm_deploy' not in sys.modules\n"
        "print(mask.dtype, mask.shape)"
    )
    done = subprocess.run([sys.executable, "-c", script, report.file], capture_output=True, text=True, check=True)
    assert done.stdout == "uint8 (1, 360, 480)\n"


def engine_file(path: Path, **changes: object) -> Path:
    """An engine by its record; its bytes are none, which nothing here looks at."""
    blob = b"engine"
    spec = ModelSpec(classes=CLASSES, height=64, width=96, precision="fp16").with_provenance(target="tensorrt")
    fields = {
        "sha256": hashlib.sha256(blob).hexdigest(),
        "bytes": len(blob),
        "target": "tensorrt",
        "version": "10.9.0.34",
        "spec": spec,
        "onnx_sha256": "0" * 64,
        "graph_sha256": "1" * 64,
        "compute_capabilities": ("87",),
        "gpu": "Orin",
        "inputs": (TensorRecord(name="image", dtype="uint8", shape=(-1, 64, 96, 3)),),
        "outputs": (TensorRecord(name="mask", dtype="uint8", shape=(-1, 64, 96)),),
        "profiles": {"image": Profile(min=(1, 64, 96, 3), opt=(2, 64, 96, 3), max=(4, 64, 96, 3))},
        "layers": {},
        "options": {},
        "versions": {},
        "sampling": "portable",
        "parity": {},
    }
    record = EngineRecord(**{**fields, **changes})  # type: ignore[arg-type]
    with writing_engine(path) as (engine, beside):
        engine.write_bytes(blob)
        beside.write_text(record.to_json(), encoding="utf-8")
    return path


def test_a_tensorrt_engine(tmp_path: Path) -> None:
    report = deploy(engine_file(tmp_path / "street.engine"), tmp_path / "repository", platform="tensorrt")
    assert contents(tmp_path / "repository") == ["street/1/model.plan", "street/config.pbtxt"]
    config = configured(report.folder)
    assert (config.platform, config.backend, config.default_model_filename) == (
        "tensorrt_plan",
        "tensorrt",
        "model.plan",
    )
    assert config.max_batch_size == 4  # the profile's most
    assert config.instance_group[0].Kind.Name(config.instance_group[0].kind) == "KIND_GPU"
    assert report.notes == (
        "the server's TensorRT must be 10.9.0.34, which built the engine",
        "its profile ends at batches of 4",
    )


def test_engines_that_triton_can_not_run(tmp_path: Path, fixed: Path) -> None:
    with pytest.raises(BackendError, match="is for tensorrt-rtx, which Triton has no backend for"):
        deploy(engine_file(tmp_path / "rtx.engine", target="tensorrt-rtx"), tmp_path / "r", platform="tensorrt")
    with pytest.raises(ArtifactError, match="fixed has no engine, only onnx fp32; make one with: ddsm build"):
        deploy(fixed, tmp_path / "r", platform="tensorrt")
    engine = engine_file(tmp_path / "cut.engine")
    engine.write_bytes(b"eng")
    with pytest.raises(ArtifactError, match="cut short"):
        deploy(engine, tmp_path / "r", platform="tensorrt")
    assert not (tmp_path / "r").exists()


def test_a_second_deployment(open_batch: Path, fixed: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    first = deploy(open_batch, repository)
    before = first.folder.joinpath("config.pbtxt").read_bytes()
    with pytest.raises(ConfigError, match="colours is there; add a version with --new-version, or replace it with"):
        deploy(open_batch, repository)
    assert deploy(open_batch, repository, new_version=True, instances=2).version == 2
    assert deploy(open_batch, repository, new_version=True).version == 3
    assert contents(first.folder) == ["1/model.onnx", "2/model.onnx", "3/model.onnx", "config.pbtxt"]
    with pytest.raises(
        ConfigError, match="share one configuration, and the new one's max batch size, input, output di"
    ):
        deploy(fixed, repository, name="colours", new_version=True)
    assert contents(first.folder) == ["1/model.onnx", "2/model.onnx", "3/model.onnx", "config.pbtxt"]
    assert deploy(open_batch, repository, overwrite=True).version == 1
    assert contents(repository) == ["colours/1/model.onnx", "colours/config.pbtxt"]
    assert first.folder.joinpath("config.pbtxt").read_bytes() == before  # equal options, equal bytes
    assert [path.name for path in repository.iterdir()] == ["colours"]


def test_another_model_is_no_version_of_it(open_batch: Path, tmp_path: Path) -> None:
    deploy(open_batch, tmp_path / "r")
    model = onnx.load(open_batch)
    spec = colour_spec().replace(classes=("red", "green", "sky"))
    helper.set_model_props(model, {"ddsm.spec": spec.to_json()})
    onnx.save(model, open_batch)
    with pytest.raises(ConfigError, match="the new one's classes differ; take another --name, or --overwrite"):
        deploy(open_batch, tmp_path / "r", new_version=True)


def test_what_is_not_ours_is_left_alone(fixed: Path, tmp_path: Path) -> None:
    mine = tmp_path / "repository" / "mine"
    mine.mkdir(parents=True)
    (mine / "letter.txt").write_text("dear", encoding="utf-8")
    for text in (None, 'name: "mine"', "not a configuration"):
        if text is not None:
            (mine / "config.pbtxt").write_text(text, encoding="utf-8")
        for choice in ("overwrite", "new_version"):
            with pytest.raises(DdsmError, match=r"was not made by `ddsm deploy triton`|no configuration of Triton's"):
                deploy(fixed, tmp_path / "repository", name="mine", **{choice: True})
    assert (mine / "letter.txt").read_text(encoding="utf-8") == "dear"


def test_a_repository_that_can_not_be_written(fixed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="can't be written"):
        deploy(fixed, tmp_path / "file")


def test_weights_beside_the_file_are_put_into_it(tmp_path: Path) -> None:
    model = painted_graph(paint(1))
    whole = model.SerializeToString()
    onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="outside.bin", size_threshold=0)
    assert deploy(tmp_path / "outside.onnx", tmp_path / "r").file.read_bytes() == whole


def test_graphs_that_stock_triton_can_not_run(tmp_path: Path) -> None:
    model = colour_graph(colour_spec())
    model.graph.node[1].op_type, model.graph.node[1].domain = "Sharpen", "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(BackendError, match="Triton has no operator mine::Sharpen, and the file has no body for it"):
        deploy(tmp_path / "foreign.onnx", tmp_path / "r")

    model = colour_graph(colour_spec().replace(precision="int8+fp16"))
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(BackendError, match=r"INT8 with float16 .* wrongly on CPUs"):
        deploy(tmp_path / "half.onnx", tmp_path / "r")
    with pytest.raises(ConfigError, match=r"accelerator runs fp32, fp16, int8, and half.onnx is int8\+fp16"):
        deploy(tmp_path / "half.onnx", tmp_path / "r", device="gpu", accelerator="tensorrt")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"platform": "pytorch"}, "platform is 'pytorch'; expected onnxruntime or tensorrt"),
        ({"device": "npu"}, "device is 'npu'; expected cpu or gpu"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"max_batch": 0}, "max batch is 0; expected an integer of at least 1"),
        ({"batch_delay_us": -1}, "batch delay us is -1; expected an integer of at least 0"),
        ({"instances": True}, "instances is True"),
        ({"threads": 0}, "threads is 0"),
        ({"name": "../street"}, "name is '../street'; expected letters, digits"),
        ({"platform": "tensorrt", "device": "cpu"}, "tensorrt runs on GPUs alone"),
        ({"accelerator": "tensorrt"}, "an accelerator is for --platform onnxruntime --device gpu"),
        ({"threads": 2, "device": "gpu"}, "threads are for --platform onnxruntime --device cpu"),
        ({"overwrite": True, "new_version": True}, "exclude each other"),
    ],
)
def test_options_that_are_refused(fixed: Path, tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deploy(fixed, tmp_path / "r", **options)
    assert said in str(caught.value)


def test_a_name_that_triton_can_not_have(fixed: Path, tmp_path: Path) -> None:
    spaced = fixed.rename(tmp_path / "my model.onnx")
    with pytest.raises(ConfigError, match="a model on Triton can't be called 'my model'; name it with --name"):
        deploy(spaced, tmp_path / "r")
    assert deploy(spaced, tmp_path / "r", name="my_model").name == "my_model"


def test_a_precision_that_is_not_there(fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="fixed has no onnx for onnxruntime at int8, only onnx fp32"):
        deploy(fixed, tmp_path / "r", precision="int8")

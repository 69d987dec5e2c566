"""`ddsm info`, run as the command that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from colour_graph import CLASSES, colour_spec, write_colour_model

from ddsm_deploy import kernels
from ddsm_deploy.artifact import shipped_models
from ddsm_deploy.engines import BACKENDS
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import sha256_of

HIDE = "import sys; sys.modules[{module!r}] = None; from ddsm_deploy.cli import main; sys.argv[0] = 'ddsm'; main()"


def ddsm(*arguments: str | Path, hide: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own; `hide` names a module that can't be imported there."""
    start = ["-m", "ddsm_deploy"] if hide is None else ["-c", HIDE.format(module=hide)]
    command = [sys.executable, "-W", "error", *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=120)


def test_the_record_of_a_model(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "frames.onnx", size=(8, 12), channel_order="rgb")
    done = ddsm("info", model)
    assert (done.returncode, done.stderr) == (0, "")
    for expected in ("frames", "8x12 (rgb)", "fp32", ", ".join(CLASSES), str(model), sha256_of(model), *BACKENDS):
        assert expected in done.stdout


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no other test's decision on an equal model
    model = write_colour_model(tmp_path / "frames.onnx")
    done = ddsm("info", model, "--json", "-")
    assert done.returncode == 0
    assert "8x12 (bgr)" in done.stderr  # what people read goes aside, so that a pipe gets the JSON alone
    result = json.loads(done.stdout)
    spec = colour_spec()
    assert result["model"]["size"] == [8, 12]
    assert result["model"]["classes"] == [
        {"id": i, "name": name, "color": list(color)}
        for i, (name, color) in enumerate(zip(spec.classes, spec.palette, strict=True))
    ]
    assert result["model"]["files"] == [
        {
            "kind": "onnx",
            "precision": "fp32",
            "target": "",
            "file": str(model),
            "bytes": model.stat().st_size,
            "sha256": sha256_of(model),
            "parity": {},
            "weights": [],
        }
    ]
    assert result["decisions"] == []
    assert [entry["backend"] for entry in result["backends"]] == list(BACKENDS)

    assert ddsm("info", model, "--json", tmp_path / "info.json").returncode == 0
    assert json.loads((tmp_path / "info.json").read_text(encoding="utf-8")) == result


def test_every_file_of_a_bundle_with_what_it_was_found_to_be(tiny_bundle: Path) -> None:
    done = ddsm("info", tiny_bundle, "--json", "-")
    assert done.returncode == 0, done.stderr
    files = {(f["kind"], f["precision"], f["target"]): f for f in json.loads(done.stdout)["model"]["files"]}
    assert files.keys() == {
        ("onnx", "fp32", ""),
        ("checkpoint", "fp32", ""),
        ("onnx", "fp16", ""),
        ("onnx", "int8", "onnxruntime"),
        ("onnx", "int8", "openvino"),
    }
    assert files["checkpoint", "fp32", ""]["parity"] == {}  # it is compared with nothing
    assert files["onnx", "fp32", ""]["parity"]
    for target in ("onnxruntime", "openvino"):
        entry = files["onnx", "int8", target]
        assert float(entry["parity"]["parity.changed"]) < 10
        shown = [" ".join(line.split()) for line in done.stderr.splitlines()]
        assert any(line.startswith(f"onnx int8 for {target} {entry['file']} (") for line in shown)
        assert f"sha256 {entry['sha256']}" in shown
        assert f"parity.on {target} int8" in shown


def test_the_kept_decision_with_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need) -> None:
    need("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_colour_model(tmp_path / "frames.onnx")
    Segmenter.open(model).close()
    done = ddsm("info", model, "--json", "-")
    (decision,) = json.loads(done.stdout)["decisions"]
    assert Path(decision["kept_in"]).is_file()
    assert f"auto for latency, measured {decision['measured']}" in done.stderr
    assert decision["kept_in"] in done.stderr
    for trial in decision["trials"]:
        figures = f"{trial['ms']:.1f} ms, {trial['changed']:.2f} % changed of {trial['allowed']:.2f} allowed"
        assert f"{figures}, {trial['verdict']}" in done.stderr
        assert f"{trial['backend']} {trial['precision']}" in done.stderr


def test_a_backend_that_is_not_installed_comes_with_its_pip_line(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "frames.onnx")
    result = json.loads(ddsm("info", model, "--json", "-", hide="openvino").stdout)
    (openvino,) = [entry for entry in result["backends"] if entry["backend"] == "openvino"]
    assert openvino["available"] is False
    assert "pip install 'ddsm-deploy[cpu]'" in openvino["reason"]


def test_how_a_fused_file_is_sampled(tiny_fused: Path, tmp_path: Path, missing) -> None:
    status = kernels.status()
    if not status.available:
        missing("kernels", status.reason)
    done = ddsm("info", tiny_fused, "--json", "-")
    result = json.loads(done.stdout)
    assert result["kernels"]["available"] is True
    assert result["kernels"]["instruction_sets"] == list(status.instruction_sets)
    assert f"usable ({', '.join(status.instruction_sets)})" in done.stderr
    ways = {entry["backend"]: entry.get("sampling") for entry in result["backends"]}
    assert (ways["onnxruntime"], ways["openvino"], ways["torch"]) == ("fused", "fused", None)  # torch has no file here

    hidden = HIDE.replace(
        "sys.modules[{module!r}] = None",
        "from pathlib import Path; from ddsm_deploy import kernels; kernels._FOLDER = Path({module!r})",
    )
    command = [sys.executable, "-c", hidden.format(module=str(tmp_path)), "info", str(tiny_fused)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    reason = "the fused kernels were not built (reinstall ddsm-deploy where there is a C++ compiler)"
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert f"fused sampling {reason}" in rows
    assert any(row.startswith("openvino") and row.endswith(f"usable, samples portable ({reason})") for row in rows)


def test_load_says_what_each_runtime_can_do(tmp_path: Path, need) -> None:
    need("onnxruntime")
    model = write_colour_model(tmp_path / "frames.onnx")
    done = ddsm("info", model, "--load", "--json", "-", hide="torch")
    entries = {entry["backend"]: entry for entry in json.loads(done.stdout)["backends"]}
    assert entries["onnxruntime"]["precisions"] == ["fp32"]
    assert entries["torch"]["available"] is False


def test_the_default_is_the_shipped_model() -> None:
    done = ddsm("info")
    if "ddsm-lite0" in shipped_models():
        assert done.returncode == 0
        assert "ddsm-lite0" in done.stdout
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("ddsm: no model 'ddsm-lite0'")


def test_errors_are_one_line(tmp_path: Path) -> None:
    cut = write_colour_model(tmp_path / "cut.onnx")
    cut.write_bytes(cut.read_bytes()[:100])
    model = write_colour_model(tmp_path / "frames.onnx")
    for arguments, said in (
        ((tmp_path / "none.onnx",), "No such file"),
        ((cut,), "damaged or cut short"),
        ((tmp_path,), "not a model bundle"),
        ((model, "--json", cut / "info.json"), "can't be written"),
    ):
        done = ddsm("info", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("ddsm: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_escape_codes_in_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    import onnx
    from colour_graph import colour_graph

    spec = colour_spec().with_provenance(note="\x1b[2Jgone\nmodel  forged")
    onnx.save(colour_graph(spec), tmp_path / "frames.onnx")
    done = ddsm("info", tmp_path / "frames.onnx")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "?[2Jgone?model  forged" in done.stdout

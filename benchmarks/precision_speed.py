"""What each precision is worth on this CPU: the plain pyramid in FP32, BF16 and INT8 on every backend, in one run.

    python benchmarks/precision_speed.py --images FOLDER [--network plain|ddsm] [--threads 2] [--runs 100] [--json FILE]

FOLDER holds images to calibrate and run on (with CamVid: its ``train``). The plain pyramid is the shipped
`ddsm-lite0` with its sampling branches taken out: what it computes takes as long as a trained one's would, and its
masks mean little. Rounds of a few runs alternate over the rows, each row in a process of its own (see `ddsm bench`);
ratios are of medians, against FP32 on ONNX Runtime. Let nothing else run meanwhile; the load at the start is in the
JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from ddsm_deploy.artifact import resolve
from ddsm_deploy.evaluate.benchmark import BenchOptions, bench
from ddsm_deploy.export import ExportOptions, export_onnx
from ddsm_deploy.frames import frames_in
from ddsm_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from ddsm_deploy.model.network import build_network
from ddsm_deploy.optimize.quantize import QuantizeOptions, quantize
from ddsm_deploy.packing import make_bundle

REFERENCE = ("onnxruntime", "fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--network", choices=["plain", "ddsm"], default="plain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        bundle = make_model(Path(folder), args.network, args.images)
        options = BenchOptions(
            backends=("onnxruntime", "openvino"), threads=args.threads, runs=args.runs, images=args.images
        )
        result = json.loads(bench(bundle, options).to_json())

    rows = {(row["backend"], row["precision"]): row for row in result["rows"] if "p50_ms" in row}
    reference = rows[REFERENCE]["p50_ms"]
    machine = result["machine"]
    print(f"{args.network} pyramid, {result['height']}x{result['width']}, batch 1, {args.threads} threads")
    print(f"{machine['cpu']}, {machine['cores_usable']} cores, load {machine['load_average'][0]:.1f} at the start")
    for (backend, precision), row in rows.items():
        row["ratio"] = reference / row["p50_ms"]
        print(
            f"{backend:12} {precision:10} p50 {row['p50_ms']:7.2f} ms  p99 {row['p99_ms']:7.2f} ms  "
            f"{row['ratio']:5.2f} × the speed of FP32 on ONNX Runtime"
        )
    for row in result["rows"]:
        if "error" in row:
            print(f"{row['backend']:12} {row['precision'] or '':10} {row['error']}")
    if args.json:
        args.json.write_text(json.dumps({"network": args.network, **result}, indent=2) + "\n", encoding="utf-8")


def make_model(folder: Path, network: str, images: Path) -> Path:
    """A bundle of the network in FP32, and in INT8 for either backend."""
    checkpoint = resolve("ddsm-lite0").file("checkpoint")
    if network == "plain":
        checkpoint = without_branches(checkpoint, folder / "plain.safetensors")
    onnx = folder / "model.onnx"
    export_onnx(checkpoint, onnx, ExportOptions())
    frames = frames_in(images)
    files = [checkpoint, onnx]
    for target in ("onnxruntime", "openvino"):
        files.append(folder / f"{target}.onnx")
        quantize(onnx, files[-1], frames, QuantizeOptions(target=target, changed=5.0))
    return make_bundle(folder / "bundle", files, name=network).path


def without_branches(checkpoint: Path, output: Path) -> Path:
    """A DDSM checkpoint as a plain pyramid: the same weights, less those of the two branches."""
    network, spec = load_checkpoint(checkpoint)
    config = dataclasses.replace(spec.network, fusion="add")
    plain = build_network(config, len(spec.classes))
    weights = network.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    save_checkpoint(output, plain.eval(), spec.replace(name="plain", network=config))
    return output


if __name__ == "__main__":
    main()

"""What it saves that OpenVINO gives classes straight from small logits (`engines/openvino_mask.py`).

    python benchmarks/class_map.py --data CAMVID [--model ddsm-lite0] [--threads 2] [--runs 80]

The model at each precision, with and without that step, in turns: median milliseconds of an inference (image bytes to
class ids), their ratio, and how many per cent of the pixels of every fifth val frame get another class. Let nothing
else run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from unittest import mock

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.datasets import open_dataset
from ddsm_deploy.engines import Engine, EngineOptions, open_engine
from ddsm_deploy.engines.openvino import OpenVinoEngine
from ddsm_deploy.frames import frames_of
from ddsm_deploy.images import read_image

PRECISIONS = ("fp32", "bf16", "int8", "int8+bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CamVid's folder")
    parser.add_argument("--model", default="ddsm-lite0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=80)
    args = parser.parse_args()
    model = resolve(args.model)
    frames = [read_image(frame.path)[None] for frame in frames_of(open_dataset("camvid", args.data, "val"))][::5]
    print("| precision | ms with | without | ratio | pixels changed |")
    print("| --- | --- | --- | --- | --- |")
    for precision in PRECISIONS:
        if "bf16" not in precision or "bf16" in OpenVinoEngine.precisions():
            print(row(model, precision, frames, args), flush=True)


def row(model: Artifact, precision: str, frames: list, args: argparse.Namespace) -> str:
    """One precision as a line of Markdown."""
    file = model.pick("onnx", precisions=("int8",), target="openvino") if "int8" in precision else model
    assert file is not None, f"{model.name} has no INT8 file for OpenVINO"
    options = EngineOptions(precision=precision, threads=args.threads)
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = [stack.enter_context(open_engine(file, "openvino", options))]
        with mock.patch("ddsm_deploy.engines.openvino.join_mask", return_value=False):
            engines.append(stack.enter_context(open_engine(file, "openvino", options)))
        masks = [[engine.run({"image": frame})["mask"] for frame in frames] for engine in engines]
        times: list[list[float]] = [[], []]
        for index in range(args.runs):
            for engine, values in zip(engines, times, strict=True):
                start = time.perf_counter()
                engine.run({"image": frames[index % len(frames)]})
                values.append(1000 * (time.perf_counter() - start))
    ours, theirs = map(statistics.median, times)
    changed = 100 * statistics.mean(float((a != b).mean()) for a, b in zip(*masks, strict=True))
    return f"| {precision} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {changed:.3f} % |"


if __name__ == "__main__":
    main()

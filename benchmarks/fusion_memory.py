"""Peak resident memory of inference with DDSM against ``fusion="add"``, each in a process of its own.

The peak is that of the whole process as the system counts it (VmHWM; elsewhere ru_maxrss): Python, numpy, the runtime,
the weights, what compiling the model took, and three inferences. Beside it stand the peak once the runtime was
imported, before any model, and the peak once the model was loaded, before it ran: a peak that loading reached hides
what running needs below it, which is then no more than that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import EngineOptions, available_precisions, open_engine
from ddsm_deploy.evaluate.machine import peak_memory_mb

RUNS = 3


def measure(pair: Any, options: EngineOptions, backend: str) -> dict[str, Any]:
    """One row: megabytes (10⁶ bytes) of both sides of a `fusion_support.Pair`.

    Raises:
        RuntimeError: a side could not run.
    """
    found = {side: _child(file, options, backend) for side, file in pair.files.items()}
    fused, add = found["ddsm"], found["add"]
    return {
        "kind": "memory",
        "backend": backend,
        "precision": options.precision,
        "size": f"{pair.size[0]}x{pair.size[1]}",
        "threads": options.threads,
        "sampling": fused["sampling"],
        "peak_mb_fused": fused["peak_mb"],
        "peak_mb_add": add["peak_mb"],
        "ratio": fused["peak_mb"] / add["peak_mb"],
        "ratio_without_runtime": (fused["peak_mb"] - fused["runtime_mb"]) / (add["peak_mb"] - add["runtime_mb"]),
        "stages_fused": fused,
        "stages_add": add,
    }


def _child(file: Path, options: EngineOptions, backend: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(file), backend, str(options.precision), str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{backend} {options.precision}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """The child: one model on one runtime, and its peaks as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("backend")
    parser.add_argument("precision")
    parser.add_argument("threads", type=int)
    args = parser.parse_args()

    import numpy as np  # part of "runtime" below, as it is of every use

    artifact = resolve(str(args.file))
    available_precisions(args.backend)  # imports the runtime, and has OpenVINO start its CPU plugin
    peaks: dict[str, Any] = {"runtime_mb": peak_memory_mb()}
    engine = open_engine(artifact, args.backend, EngineOptions(precision=args.precision, threads=args.threads))
    peaks["loaded_mb"] = peak_memory_mb()
    image = np.zeros((1, artifact.spec.height, artifact.spec.width, 3), np.uint8)
    for _ in range(RUNS):
        engine.run({engine.inputs[0].name: image})
    peaks |= {"peak_mb": peak_memory_mb(), "sampling": engine.sampling}
    engine.close()
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()

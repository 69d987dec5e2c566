"""Scores a model on labelled frames from Python; here on rendered scenes, which any folder of your own can replace.

    python examples/04_score_a_model.py [FOLDER]

FOLDER holds images/, labels/ (8-bit PNG, the pixel is the class id) and classes.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from render_scenes import write_scenes

from ddsm_deploy import Segmenter
from ddsm_deploy.datasets import open_dataset
from ddsm_deploy.evaluate.accuracy import evaluate


def main(folder: Path) -> None:
    """Prints mIoU and each class's IoU."""
    dataset = open_dataset("folder", folder, "val")
    with Segmenter.open() as segmenter:
        result = evaluate(segmenter, dataset)
    print(f"mIoU {result.miou:.2f}, pixel accuracy {result.pixel_accuracy:.2f} ({result.backend}, {result.precision})")
    for name, iou in result.per_class.items():
        print(f"{name:<12} {iou:6.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scenes:
            write_scenes(Path(scenes), count=2, height=360, width=480, seed=5)
            main(Path(scenes))

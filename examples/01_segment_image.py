"""Segments one image and saves the picture with the coloured mask over it.

python examples/01_segment_image.py [IMAGE] [OUTPUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

from ddsm_deploy import Segmenter, read_image

HERE = Path(__file__).parent


def main(source: Path = HERE / "frames" / "street_0.jpg", output: Path = Path("overlay.png")) -> None:
    """Prints the share of each class and writes `output`."""
    image = read_image(source)  # uint8 H×W×3, BGR
    with Segmenter.open() as segmenter:
        print(f"backend: {segmenter.choice}")
        result = segmenter.predict(image)

    shares = np.bincount(result.mask.ravel(), minlength=len(result.classes)) / result.mask.size
    for name, share in sorted(zip(result.classes, shares, strict=True), key=lambda pair: -pair[1]):
        print(f"{name:<12} {share:6.1%}")
    cv2.imwrite(str(output), result.overlay(image))
    print(f"wrote {output}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))

"""Makes the picture at the top of the README: frame, mask and overlay of two example frames.

python examples/make_readme_picture.py [--model MODEL] [--output FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import PIL.Image

from ddsm_deploy import Segmenter, read_image

HERE = Path(__file__).parent
FRAMES = ("street_0.jpg", "street_2.jpg")
WIDTH = 320
"""Of one column, pixels; three of them fit a README."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="file, bundle folder or shipped name; the default model if left out")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "images" / "example.png")
    given = parser.parse_args()

    rows = []
    with Segmenter.open(given.model) as segmenter:
        for name in FRAMES:
            image = read_image(HERE / "frames" / name)
            result = segmenter.predict(image)
            columns = (image, result.color(), result.overlay(image))
            size = (WIDTH, round(WIDTH * image.shape[0] / image.shape[1]))
            rows.append(np.hstack([cv2.resize(column, size, interpolation=cv2.INTER_AREA) for column in columns]))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.Image.fromarray(np.ascontiguousarray(np.vstack(rows)[..., ::-1]))
    picture.quantize(256).save(given.output, optimize=True)  # a third of the bytes
    print(f"wrote {given.output} ({given.output.stat().st_size // 1024} KB)")


if __name__ == "__main__":
    main()

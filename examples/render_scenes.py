"""Renders street-like scenes with exact labels: frames for examples and tests that anybody may ship.

    python examples/render_scenes.py DIR --count N --size HEIGHTxWIDTH --seed S

writes DIR/images/*.png, DIR/labels/*.png (CamVid's 11 class ids, 255 to be ignored) and DIR/classes.json: together a
`folder` data set of this package. Only numpy and OpenCV are needed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
from street.scene import render

CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
"""Names and RGB colours, in the order of the ids."""


def write_scenes(folder: Path, *, count: int, height: int, width: int, seed: int = 0, suffix: str = ".png") -> None:
    """Writes `count` frames of height×width pixels, images as `suffix` says; equal arguments give equal files."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    classes = [{"name": name, "color": color, "value": value} for value, (name, color) in enumerate(CLASSES)]
    (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n", encoding="utf-8")
    for index in range(count):
        image, labels = render(seed, index, height, width)
        name = f"scene_{index:04d}"
        quality = [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else []
        cv2.imwrite(str(folder / "images" / f"{name}{suffix}"), image, quality)
        cv2.imwrite(str(folder / "labels" / f"{name}.png"), labels)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--size", default="360x480", help="HEIGHTxWIDTH")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--suffix", default=".png", choices=(".png", ".jpg"), help="of the images; labels are always PNG"
    )
    given = parser.parse_args()
    height, width = (int(n) for n in given.size.split("x"))
    write_scenes(given.folder, count=given.count, height=height, width=width, seed=given.seed, suffix=given.suffix)


if __name__ == "__main__":
    main()

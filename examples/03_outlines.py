"""Turns a mask into outlines: where are the cars, and how large?

python examples/03_outlines.py [CLASS]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ddsm_deploy import Segmenter, read_image

FRAMES = Path(__file__).parent / "frames"


def main(wanted: str = "car") -> None:
    """Prints each region of class `wanted` in every example frame."""
    with Segmenter.open() as segmenter:
        for frame in sorted(FRAMES.iterdir()):
            result = segmenter.predict(read_image(frame))
            for polygon in result.polygons(min_area=100):
                if polygon.name == wanted:
                    (left, top), (right, bottom) = polygon.exterior.min(0), polygon.exterior.max(0)
                    box = f"x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}"
                    print(f"{frame.name}: {wanted} of {polygon.area:.0f} pixels, {box}, {len(polygon.exterior)} points")


if __name__ == "__main__":
    main(*sys.argv[1:2])

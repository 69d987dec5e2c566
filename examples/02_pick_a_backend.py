"""Lists the backends that are usable here, runs each on one frame, and counts the pixels on which they differ.

python examples/02_pick_a_backend.py
"""

from __future__ import annotations

from pathlib import Path

from ddsm_deploy import Segmenter, read_image
from ddsm_deploy.engines import usable_backends
from ddsm_deploy.errors import DdsmError

FRAME = Path(__file__).parent / "frames" / "street_2.jpg"


def main() -> None:
    """Prints one line a backend."""
    image = read_image(FRAME)
    first = None
    for status in usable_backends():
        if not status.available:
            print(f"{status.backend:<12} {status.reason}")
            continue
        try:
            with Segmenter.open(backend=status.backend, precision="fp32") as segmenter:
                result = segmenter.predict(image)
        except DdsmError as exc:  # the model has no engine or endpoint for it, say
            print(f"{status.backend:<12} {exc}")
            continue
        first = result.mask if first is None else first
        differing = int((result.mask != first).sum())
        timing = ", ".join(f"{step} {ms:.1f} ms" for step, ms in result.timings.items())
        print(f"{status.backend:<12} {timing}; {differing} of {first.size} pixels unlike the first backend's")


if __name__ == "__main__":
    main()

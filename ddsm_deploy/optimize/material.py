"""The images that a model is calibrated, searched and checked on: whether they will do, and made ready to run."""

from __future__ import annotations

from ddsm_deploy.errors import InputError
from ddsm_deploy.evaluate.verify import truth_table
from ddsm_deploy.frames import FrameList
from ddsm_deploy.images import Labels, image_size, read_image
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import ModelSpec

FEWEST = 2
"""Below this a range is one picture's chance: an error."""

ADVISED = 32
"""Below this a warning: ranges of single layers still move with each image added."""


def check_frames(frames: FrameList, spec: ModelSpec) -> list[str]:
    """What is doubtful about calibrating a model on these images, a sentence each.

    Raises:
        InputError: fewer than `FEWEST`, or an image that can't be read.
    """
    count = len(frames)
    if count < FEWEST:
        raise InputError(f"{count} image to calibrate on; expected at least {FEWEST}, better {ADVISED} or more")
    doubts = []
    if count < ADVISED:
        doubts.append(f"only {count} images to calibrate on; {ADVISED} or more give steadier ranges")
    sizes = [image_size(entry.path) for entry in frames]
    small = sum(height < spec.height and width < spec.width for height, width in sizes)
    if small:
        doubts.append(
            f"{small} of {count} images are smaller than the network's {spec.height}x{spec.width} and get enlarged: "
            "blurred images have other ranges than real ones"
        )
    wanted = spec.width / spec.height
    bent = sum(not 0.8 < (width / height) / wanted < 1.25 for height, width in sizes)
    if bent:
        doubts.append(
            f"{bent} of {count} images have another shape than the network's {spec.height}x{spec.width} and get "
            "stretched; calibrate on frames of the camera that the model will see"
        )
    return doubts


class Material:
    """Images made ready for a network and kept in memory.

    Attributes:
        names: of the images.
        inputs: each uint8 1×H×W×3, of the network's size and in its channel order.
        labels: each uint8 H×W at its own size, in the model's class ids, 255 for void; None without labels.

    Raises:
        InputError: an image or a label map is unreadable, or the labels' classes are not the model's.
    """

    def __init__(self, segmenter: Segmenter, frames: FrameList) -> None:
        self.names = [frame.name for frame in frames]
        self.inputs = [segmenter.prepare(read_image(frame.path)) for frame in frames]
        table = truth_table(segmenter.spec.classes, frames.classes)
        labels = [table[frame.labels()] for frame in frames if frame.labels is not None]
        self.labels: list[Labels] | None = labels or None

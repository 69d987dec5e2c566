"""Pictures, recordings and videos for tests of streams: every frame tells which one it is, and so does its mask."""

from __future__ import annotations

import fractions
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
START = 1_700_000_000_000_000_000
"""Stamp of the first frame, nanoseconds."""

SIZE = (64, 96)


def picture(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Blocks of 8×8 pixels in random, clearly red, green or blue colours; another picture for each index."""
    rng = np.random.default_rng(index)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    colours = rng.integers(0, 100, (rows, columns, 3))
    np.put_along_axis(colours, rng.integers(0, 3, (rows, columns, 1)), 220, axis=2)
    return np.kron(colours.astype(np.uint8), np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]


def mask_of(image: np.ndarray) -> np.ndarray:
    """The answer of `colour_graph`, by its definition: the strongest of red, green and blue."""
    return image[:, :, ::-1].argmax(axis=2)


def stamp_of(index: int) -> int:
    """At 30 Hz, and never quite regular."""
    return START + index * 33_333_333 + index % 7 * 1000


def write_bag(
    path: Path,
    messages: Sequence[tuple[int, Any]],
    *,
    storage: str = "mcap",
    topic: str = "/cam/image_raw",
    compressed: str = "",
    delay: int = 5_000_000,
) -> None:
    """Writes a recording. A message is its index and a picture (uint8 H×W×3, BGR) or, if bytes, what stands for one.

    Args:
        path: a folder for ``mcap`` and ``sqlite3``, a file for ``ros1``.
        messages: in the order of recording.
        storage: ``mcap``, ``sqlite3`` or ``ros1``.
        topic: of the images.
        compressed: ``jpeg`` or ``png`` writes CompressedImage.
        delay: nanoseconds from a frame's stamp to its recording.
    """
    from rosbags import rosbag1, rosbag2
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS1_NOETIC if storage == "ros1" else Stores.ROS2_HUMBLE)
    if storage == "ros1":
        writer: Any = rosbag1.Writer(path)
    else:
        plugin = rosbag2.StoragePlugin.MCAP if storage == "mcap" else rosbag2.StoragePlugin.SQLITE3
        writer = rosbag2.Writer(path, version=9, storage_plugin=plugin)
    kind = COMPRESSED if compressed else IMAGE
    with writer:
        connection = writer.add_connection(topic, kind, typestore=store)
        for index, content in messages:
            message = _message(store, index, content, compressed, ros1=storage == "ros1")
            serialize = store.serialize_ros1 if storage == "ros1" else store.serialize_cdr
            writer.write(connection, stamp_of(index) + delay, serialize(message, kind))


def _message(store: Any, index: int, content: Any, compressed: str, *, ros1: bool) -> Any:
    types = store.types
    seconds, nanoseconds = divmod(stamp_of(index), 10**9)
    stamp = types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)
    sequence = {"seq": index} if ros1 else {}
    header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera", **sequence)
    if compressed:
        if not isinstance(content, bytes):
            content = cv2.imencode(f".{compressed}", content)[1].tobytes()
        return types[COMPRESSED](header=header, format=compressed, data=np.frombuffer(content, np.uint8))
    data = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
    height, width = SIZE if isinstance(content, bytes) else content.shape[:2]
    return types[IMAGE](
        header=header,
        height=height,
        width=width,
        encoding="bgr8",
        is_bigendian=0,
        step=3 * width,
        data=data.ravel(),
    )


def write_video(path: Path, images: Sequence[np.ndarray], *, rate: int = 30, times: Sequence[int] = ()) -> None:
    """Writes a video without loss (FFV1 in Matroska); `times` are milliseconds, where frames do not come at `rate`."""
    import av

    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "bgr0"
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts = times[index] if times else round(index * 1000 / rate)
            frame.time_base = fractions.Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))

"""Recordings of ROS 1 and ROS 2 as sources, with no ROS installed (``rosbags``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddsm_deploy.errors import BackendMissing, ConfigError, InputError
from ddsm_deploy.images import MAX_PIXELS
from ddsm_deploy.streams.encodings import from_compressed_message, from_image_message
from ddsm_deploy.streams.frames import BaseSource, Frame

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"

SUFFIXES = frozenset({".bag", ".mcap", ".db3"})
"""Files that are recordings; so is a folder with a ``metadata.yaml``."""


def is_bag(path: Path) -> bool:
    """Whether a path looks like a recording."""
    return path.suffix.lower() in SUFFIXES or (path / "metadata.yaml").is_file()


class BagSource(BaseSource):
    """One image topic of a recording: rosbag2 (sqlite3 or MCAP) or a ROS 1 bag.

    Frames come in the order of the recording. Their stamp is that of the message's header; where that is zero, the time
    at which it was recorded.

    Args:
        path: a bag's folder, or its file.
        topic: of sensor_msgs Image or CompressedImage; None takes the only one there is.
        max_pixels: refuse larger frames.

    Raises:
        InputError: not a recording, or damaged.
        ConfigError: no such image topic, or several to choose from.
        BackendMissing: ``rosbags`` is not installed.
    """

    def __init__(self, path: str | Path, *, topic: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__()
        self._max_pixels = max_pixels
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError as exc:
            raise BackendMissing("rosbags", extra="rosbags", why=str(exc)) from exc
        path = Path(path)
        folder = path.parent if path.suffix.lower() in (".mcap", ".db3") and _only_file(path) else path
        try:
            # types that a recording does not hold (sqlite3 ones never do) are those of the newest ROS 2 with them
            self._reader = AnyReader([folder], default_typestore=get_typestore(Stores.ROS2_JAZZY))
            self._reader.open()
        except Exception as exc:  # the readers raise errors of many kinds on a damaged file
            raise InputError(f"{path}: can't be read as a recording ({_line(exc)})") from exc
        images = sorted({c.topic for c in self._reader.connections if c.msgtype in (IMAGE, COMPRESSED)})
        if topic is None and len(images) == 1:
            topic = images[0]
        if topic not in images:
            self._reader.close()
            there = ", ".join(images) or "none"
            if topic is not None:
                raise ConfigError(f"{path}: no image topic {topic}; there are: {there}")
            if images:
                raise ConfigError(f"{path}: several image topics, name one: {there}")
            raise ConfigError(f"{path}: no topic of type {IMAGE} or {COMPRESSED}")
        self.topic = topic
        self.name = f"{path} {topic}"
        self.path = path
        self._connections = [c for c in self._reader.connections if c.topic == topic]
        self.count = sum(c.msgcount for c in self._connections)
        seconds = self._reader.duration / 1e9
        self.rate = (self.count - 1) / seconds if self.count > 1 and seconds > 0 else None

    def _frames(self, start: int) -> Iterator[Frame]:
        messages = self._reader.messages(self._connections)
        index = 0
        while True:
            try:
                connection, recorded, data = next(messages)
            except StopIteration:
                return
            except Exception as exc:  # noqa: BLE001 - of many kinds on a damaged file
                yield Frame(
                    index=index, stamp=0, name="", error=f"{self.name}: can't be read any further ({_line(exc)})"
                )
                return
            if index >= start:
                yield self._frame(index, connection, recorded, data)
            index += 1

    def _release(self) -> None:
        self._reader.close()

    def _frame(self, index: int, connection: Any, recorded: int, data: bytes) -> Frame:
        try:
            message: Any = self._reader.deserialize(data, connection.msgtype)
        except Exception as exc:  # noqa: BLE001 - of many kinds on damaged bytes
            error = f"damaged message ({_line(exc)})"
            return Frame(index=index, stamp=recorded, received=recorded, name=str(recorded), error=error)
        header = message.header
        stamp = int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec) or recorded
        frame = Frame(
            index=index,
            stamp=stamp,
            received=recorded,
            name=str(stamp),
            frame_id=str(header.frame_id),
            error="none yet",
        )
        read = from_image_message if connection.msgtype == IMAGE else from_compressed_message
        try:
            return dataclasses.replace(frame, image=read(message, max_pixels=self._max_pixels), error="")
        except InputError as exc:
            return dataclasses.replace(frame, error=str(exc))


def _only_file(path: Path) -> bool:
    """Whether a storage file belongs to a bag's folder, whose metadata then says what is in it."""
    return (path.parent / "metadata.yaml").is_file()


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__

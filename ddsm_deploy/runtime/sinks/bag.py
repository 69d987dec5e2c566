"""A recording (rosbag2, MCAP) of the masks, beside which the input's own can be played."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_deploy.errors import BackendMissing
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.sinks.base import Parts
from ddsm_deploy.streams.frames import Frame

IMAGE = "sensor_msgs/msg/Image"

MASK_TOPIC = "/ddsm/mask"


class BagSink:
    """Writes a rosbag2 folder with the topic `MASK_TOPIC`, sensor_msgs/Image ``mono8`` (class ids), chunks in zstd.

    A mask's header bears its frame's stamp and frame_id, and its place in the recording is its frame's: when that was
    recorded, or else its stamp. So both recordings play side by side.

    Raises:
        BackendMissing: ``rosbags`` is not installed.
    """

    outputs: tuple[str, ...] = ()

    def __init__(self, path: Path, parts: Path, *, topic: str = MASK_TOPIC) -> None:
        try:
            from rosbags import rosbag2
            from rosbags.typesys import Stores, get_typestore
        except ImportError as exc:
            raise BackendMissing("rosbags", extra="rosbags", why=str(exc)) from exc
        self._rosbag2 = rosbag2
        self._store = get_typestore(Stores.ROS2_HUMBLE)
        self._types = self._store.types
        self._path, self._topic = path, topic
        self.targets = (path,)
        self._parts = Parts(parts)
        self._part: Path | None = None
        self._writer: Any = None
        self._connection: Any = None

    def encode(self, frame: Frame, result: Segmentation) -> bytes:
        """See `Sink.encode`."""
        seconds, nanoseconds = divmod(frame.stamp, 1_000_000_000)
        stamp = self._types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)
        height, width = result.mask.shape
        message = self._types[IMAGE](
            header=self._types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame.frame_id),
            height=height,
            width=width,
            encoding="mono8",
            is_bigendian=0,
            step=width,
            data=np.ascontiguousarray(result.mask).ravel(),
        )
        return bytes(self._store.serialize_cdr(message, IMAGE))

    def write(self, frame: Frame, encoded: bytes) -> None:
        """See `Sink.write`."""
        if self._writer is None:
            self._part = self._parts.begin()
            self._writer, self._connection = self._open(self._part)
        self._writer.write(self._connection, frame.received or frame.stamp, encoded)

    def commit(self) -> dict[str, Any]:
        """See `Sink.commit`."""
        if self._writer is not None and self._part is not None:
            self._writer.close()
            self._parts.add(self._part)
            self._writer = self._part = None
        return {"parts": list(self._parts.names)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sink.restore`."""
        self._parts.restore(state.get("parts", []))

    def finish(self) -> None:
        """See `Sink.finish`."""
        if not self._parts.names:  # joined by an earlier run, or nothing came
            return
        temporary = self._parts.folder / "joined" / self._path.name  # names the file in it
        shutil.rmtree(temporary, ignore_errors=True)
        writer, connection = self._open(temporary)
        try:
            for time, data in self._messages():
                writer.write(connection, time, data)
        finally:
            writer.close()
        shutil.rmtree(self._path, ignore_errors=True)
        temporary.rename(self._path)
        self._parts.clear()

    def close(self) -> None:
        """See `Sink.close`."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open(self, path: Path) -> tuple[Any, Any]:
        kinds = self._rosbag2
        writer = kinds.Writer(path, version=9, storage_plugin=kinds.StoragePlugin.MCAP)
        writer.set_compression(kinds.CompressionMode.STORAGE, kinds.CompressionFormat.ZSTD)
        writer.open()
        return writer, writer.add_connection(self._topic, IMAGE, typestore=self._store)

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        for path in self._parts.paths:
            with self._rosbag2.Reader(path) as reader:
                for _, time, data in reader.messages():
                    yield time, data

"""The other side of the node's topics: a camera and a subscriber on this computer's loopback, in the tests' process.

The messages are declared here once more, as `idlc` writes them from ROS 2's own definitions, so that a node whose types
are not the same is not even matched.
"""

# no `from __future__ import annotations`: cyclonedds reads the annotations when a class is made
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cyclonedds.core import Policy, Qos
from cyclonedds.domain import DomainParticipant
from cyclonedds.idl import IdlStruct
from cyclonedds.idl.types import int32, int64, sequence, uint8, uint32, uint64
from cyclonedds.internal import InvalidSample
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

SECONDS = 60.0
"""How long anything may take on a busy machine."""

DOMAIN = 1 + os.getpid() % 100
"""Another one in every test process; above 101, ports would lie among those that the system gives to anyone."""


@dataclass
class Time(IdlStruct, typename="builtin_interfaces::msg::dds_::Time_"):
    sec: int32
    nanosec: uint32


@dataclass
class Header(IdlStruct, typename="std_msgs::msg::dds_::Header_"):
    stamp: Time
    frame_id: str


@dataclass
class Image(IdlStruct, typename="sensor_msgs::msg::dds_::Image_"):
    header: Header
    height: uint32
    width: uint32
    encoding: str
    is_bigendian: uint8
    step: uint32
    data: sequence[uint8]


@dataclass
class CompressedImage(IdlStruct, typename="sensor_msgs::msg::dds_::CompressedImage_"):
    header: Header
    format: str
    data: sequence[uint8]


@dataclass
class KeyValue(IdlStruct, typename="diagnostic_msgs::msg::dds_::KeyValue_"):
    key: str
    value: str


@dataclass
class DiagnosticStatus(IdlStruct, typename="diagnostic_msgs::msg::dds_::DiagnosticStatus_"):
    level: uint8
    name: str
    message: str
    hardware_id: str
    values: sequence[KeyValue]


@dataclass
class DiagnosticArray(IdlStruct, typename="diagnostic_msgs::msg::dds_::DiagnosticArray_"):
    header: Header
    status: sequence[DiagnosticStatus]


@dataclass
class TriggerRequest(IdlStruct, typename="std_srvs::srv::dds_::Trigger_Request_"):
    client: uint64
    sequence_number: int64
    structure_needs_at_least_one_member: uint8


@dataclass
class TriggerResponse(IdlStruct, typename="std_srvs::srv::dds_::Trigger_Response_"):
    client: uint64
    sequence_number: int64
    success: bool
    message: str


@dataclass
class NativeImage(IdlStruct, typename="sensor_msgs::msg::dds_::Image_"):
    """As programs without ROS have it that compile the IDL of ROS 2's `rosidl_generator_dds_idl`."""

    header_: Header
    height_: uint32
    width_: uint32
    encoding_: str
    is_bigendian_: uint8
    step_: uint32
    data_: sequence[uint8]


class Peer:
    """A participant with readers and writers as ROS 2 makes them by default: reliable, volatile, the last 10."""

    def __init__(self) -> None:
        self._participant = DomainParticipant(DOMAIN)

    def qos(self, *more: Any) -> Qos:
        return Qos(
            Policy.Reliability.Reliable(duration(seconds=5)),
            Policy.History.KeepLast(10),
            Policy.Durability.Volatile,
            *more,
        )

    def reader(self, topic: str, kind: type[Any]) -> DataReader[Any]:
        return DataReader(self._participant, Topic(self._participant, topic, kind), self.qos())

    def writer(self, topic: str, kind: type[Any]) -> DataWriter[Any]:
        return DataWriter(self._participant, Topic(self._participant, topic, kind), self.qos())


def image_message(pixels: np.ndarray, *, stamp: tuple[int, int], frame_id: str = "camera") -> Image:
    """A picture, uint8 H×W×3 BGR, as its driver would send it."""
    height, width = pixels.shape[:2]
    return Image(Header(Time(*stamp), frame_id), height, width, "bgr8", 0, 3 * width, pixels.tobytes())


def samples(reader: DataReader[Any]) -> Iterator[Any]:
    """What has come and was not taken yet."""
    return (sample for sample in reader.take(N=100) if not isinstance(sample, InvalidSample))


def first(reader: DataReader[Any], fits: Callable[[Any], bool] = lambda _: True) -> Any:
    """The first sample that fits; those before it are gone."""
    found = until(lambda: next(((sample,) for sample in samples(reader) if fits(sample)), None))
    return found[0]


def until(look: Callable[[], Any]) -> Any:
    """What `look` finds, once that is something."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"waited {SECONDS:.0f} s for nothing")

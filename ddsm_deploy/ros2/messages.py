"""The ROS 2 messages and the one service that the node speaks, as DDS types named as rmw_cyclonedds names them.

Sources: the packages std_msgs, sensor_msgs, diagnostic_msgs and std_srvs; rmw_cyclonedds_cpp for type names, for the
header of requests and replies (`serdata.hpp`), and for ``byte``, which it announces as uint8 (`dyntype.cpp`).
"""
# no `from __future__ import annotations`: cyclonedds reads the annotations when a class is made

import time
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cyclonedds.idl import IdlStruct, make_idl_struct
from cyclonedds.idl.types import int32, int64, uint8, uint32, uint64

if TYPE_CHECKING:
    from collections.abc import Sequence as sequence
else:
    from cyclonedds.idl.types import sequence  # which takes no arguments as far as type checkers can tell

TYPE_HASHES = {
    "sensor_msgs::msg::dds_::Image_": "RIHS01_d31d41a9a4c4bc8eae9be757b0beed306564f7526c88ea6a4588fb9582527d47",
    "sensor_msgs::msg::dds_::CompressedImage_": (
        "RIHS01_15640771531571185e2efc8a100baf923961a4d15d5569652e6cb6691e8e371a"
    ),
    "diagnostic_msgs::msg::dds_::DiagnosticArray_": (
        "RIHS01_5a8a36efb05fb25070fa0fb3810290c0e6cd4862b54a8fb975a1ee8dc55a333e"
    ),
}
"""Type name -> hash of its definition (REP 2011); ROS 2 from Iron on warns of endpoints that do not announce it."""


def _data_as_bytes(cls: Any) -> Any:
    """Codes a class's ``data`` as a block: as the sequence of numbers that it is, an image takes 20 ms.

    The type that is announced stays a sequence<uint8>; `bytes` has no such type in cyclonedds.
    """
    fields = {**typing.get_type_hints(cls, include_extras=True), "data": bytes}
    coder = make_idl_struct(cls.__name__, cls.__idl_typename__, fields)

    def serialize(self: Any, buffer: Any = None, endianness: Any = None, use_version_2: bool | None = None) -> bytes:
        return coder(**vars(self)).serialize(buffer=buffer, endianness=endianness, use_version_2=use_version_2)

    def deserialize(data: bytes, has_header: bool = True, use_version_2: bool | None = None) -> Any:
        return cls(**vars(coder.deserialize(data, has_header=has_header, use_version_2=use_version_2)))

    cls.serialize = serialize
    cls.deserialize = staticmethod(deserialize)
    return cls


@dataclass
class Time(IdlStruct, typename="builtin_interfaces::msg::dds_::Time_"):
    """builtin_interfaces/Time."""

    sec: int32
    nanosec: uint32

    @classmethod
    def now(cls) -> "Time":
        """The system's time, as ROS has it by default."""
        return cls(*divmod(time.time_ns(), 1_000_000_000))


@dataclass
class Header(IdlStruct, typename="std_msgs::msg::dds_::Header_"):
    """std_msgs/Header."""

    stamp: Time
    frame_id: str


@_data_as_bytes
@dataclass
class Image(IdlStruct, typename="sensor_msgs::msg::dds_::Image_"):
    """sensor_msgs/Image; `data` is bytes or anything like it."""

    header: Header
    height: uint32
    width: uint32
    encoding: str
    is_bigendian: uint8
    step: uint32
    data: sequence[uint8]


@_data_as_bytes
@dataclass
class CompressedImage(IdlStruct, typename="sensor_msgs::msg::dds_::CompressedImage_"):
    """sensor_msgs/CompressedImage; `data` is bytes or anything like it."""

    header: Header
    format: str
    data: sequence[uint8]


@dataclass
class KeyValue(IdlStruct, typename="diagnostic_msgs::msg::dds_::KeyValue_"):
    """diagnostic_msgs/KeyValue."""

    key: str
    value: str


@dataclass
class DiagnosticStatus(IdlStruct, typename="diagnostic_msgs::msg::dds_::DiagnosticStatus_"):
    """diagnostic_msgs/DiagnosticStatus."""

    level: uint8
    name: str
    message: str
    hardware_id: str
    values: sequence[KeyValue]


@dataclass
class DiagnosticArray(IdlStruct, typename="diagnostic_msgs::msg::dds_::DiagnosticArray_"):
    """diagnostic_msgs/DiagnosticArray."""

    header: Header
    status: sequence[DiagnosticStatus]


@dataclass
class TriggerRequest(IdlStruct, typename="std_srvs::srv::dds_::Trigger_Request_"):
    """A request of std_srvs/Trigger behind rmw_cyclonedds' header. An empty message holds one byte."""

    client: uint64
    sequence_number: int64
    structure_needs_at_least_one_member: uint8 = 0


@dataclass
class TriggerResponse(IdlStruct, typename="std_srvs::srv::dds_::Trigger_Response_"):
    """A response of std_srvs/Trigger behind rmw_cyclonedds' header, which is the request's."""

    client: uint64
    sequence_number: int64
    success: bool
    message: str

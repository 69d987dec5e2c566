"""Messages are, byte by byte, what an independent writer of ROS 2's CDR makes of them (rosbags)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

HEADER = (1_700_000_000, 123_456_789, "camera_optical_frame")
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def messages(need) -> Any:
    need("cyclonedds")
    from ddsm_deploy.ros2 import messages

    return messages


@pytest.fixture(scope="module")
def store(need) -> Any:
    need("rosbags")
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)
    # rosbags has no services; this is rmw_cyclonedds' header in front of std_srvs/Trigger
    store.register(get_types_from_msg("uint64 client\nint64 number\nuint8 nothing\n", "std_srvs/msg/Request"))
    store.register(
        get_types_from_msg("uint64 client\nint64 number\nbool success\nstring message\n", "std_srvs/msg/Reply")
    )
    return store


@pytest.fixture(scope="module")
def pairs(messages: Any, store: Any) -> dict[str, tuple[Any, Any]]:
    """Type -> one message as ours and as theirs; odd lengths, so that every alignment counts."""
    theirs = store.types
    header = messages.Header(messages.Time(*HEADER[:2]), HEADER[2])
    their_header = theirs["std_msgs/msg/Header"](
        stamp=theirs["builtin_interfaces/msg/Time"](sec=HEADER[0], nanosec=HEADER[1]), frame_id=HEADER[2]
    )
    data = PIXELS.ravel()
    value = theirs["diagnostic_msgs/msg/KeyValue"]
    return {
        "sensor_msgs/msg/Image": (
            messages.Image(header, 5, 7, "bgr8", 0, 21, data.tobytes()),
            theirs["sensor_msgs/msg/Image"](
                header=their_header, height=5, width=7, encoding="bgr8", is_bigendian=0, step=21, data=data
            ),
        ),
        "sensor_msgs/msg/CompressedImage": (
            messages.CompressedImage(header, "jpeg", data.tobytes()),
            theirs["sensor_msgs/msg/CompressedImage"](header=their_header, format="jpeg", data=data),
        ),
        "diagnostic_msgs/msg/DiagnosticArray": (
            messages.DiagnosticArray(
                header,
                [
                    messages.DiagnosticStatus(
                        1, "ddsm", "two words", "", [messages.KeyValue("a", "1"), messages.KeyValue("bc", "")]
                    )
                ],
            ),
            theirs["diagnostic_msgs/msg/DiagnosticArray"](
                header=their_header,
                status=[
                    theirs["diagnostic_msgs/msg/DiagnosticStatus"](
                        level=1,
                        name="ddsm",
                        message="two words",
                        hardware_id="",
                        values=[value(key="a", value="1"), value(key="bc", value="")],
                    )
                ],
            ),
        ),
        "std_srvs/msg/Request": (
            messages.TriggerRequest(2**63 + 1, -5),
            theirs["std_srvs/msg/Request"](client=2**63 + 1, number=-5, nothing=0),
        ),
        "std_srvs/msg/Reply": (
            messages.TriggerResponse(3, 4, True, "reloaded"),
            theirs["std_srvs/msg/Reply"](client=3, number=4, success=True, message="reloaded"),
        ),
    }


TYPES = (
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CompressedImage",
    "diagnostic_msgs/msg/DiagnosticArray",
    "std_srvs/msg/Request",
    "std_srvs/msg/Reply",
)


@pytest.mark.parametrize("kind", TYPES)
def test_written_bytes(kind: str, pairs: dict[str, tuple[Any, Any]], store: Any) -> None:
    ours, theirs = pairs[kind]
    expected = bytes(store.serialize_cdr(theirs, kind))
    written = ours.serialize()
    assert written[: len(expected)] == expected
    assert len(written) - len(expected) < 4, "nothing but padding may follow"


@pytest.mark.parametrize("little_endian", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_read_bytes(kind: str, little_endian: bool, pairs: dict[str, tuple[Any, Any]], store: Any) -> None:
    ours, theirs = pairs[kind]
    assert type(ours).deserialize(bytes(store.serialize_cdr(theirs, kind, little_endian=little_endian))) == ours


@pytest.mark.parametrize("kind", TYPES[:3])
def test_hashes_of_the_definitions(kind: str, messages: Any, store: Any) -> None:
    package, folder, name = kind.split("/")
    assert messages.TYPE_HASHES[f"{package}::{folder}::dds_::{name}_"] == store.hash_rihs01(kind)


def test_a_read_image_is_read_by_the_one_reader_of_images(messages: Any, pairs: dict[str, tuple[Any, Any]]) -> None:
    from ddsm_deploy.streams.encodings import from_image_message

    ours = pairs["sensor_msgs/msg/Image"][0]
    assert (from_image_message(messages.Image.deserialize(ours.serialize())) == PIXELS).all()

"""The transport without ROS: DDS by the Python package ``cyclonedds``, on the wire as rmw_cyclonedds has it.

Topics are ``rt/NAME``, a service is ``rq/NAMERequest`` and ``rr/NAMEReply``. Every thread of ours waits in a wait set;
DDS's own threads never enter Python. (A listener would have them wait for Python's lock, and receive nothing so long.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ddsm_deploy.errors import BackendError, BackendMissing, InputError
from ddsm_deploy.ros2.node import Picture, SegmentationNode
from ddsm_deploy.ros2.status import Status

try:
    from cyclonedds.core import (
        DDSException,
        GuardCondition,
        InstanceState,
        Policy,
        Qos,
        ReadCondition,
        SampleState,
        ViewState,
        WaitSet,
    )
    from cyclonedds.domain import DomainParticipant
    from cyclonedds.internal import InvalidSample
    from cyclonedds.pub import DataWriter
    from cyclonedds.sub import DataReader
    from cyclonedds.topic import Topic
    from cyclonedds.util import duration

    from ddsm_deploy.ros2.messages import (
        TYPE_HASHES,
        CompressedImage,
        DiagnosticArray,
        DiagnosticStatus,
        Header,
        Image,
        KeyValue,
        Time,
        TriggerRequest,
        TriggerResponse,
    )
except ImportError as exc:
    raise BackendMissing("cyclonedds", extra="cyclonedds", why=str(exc)) from exc

LOOPBACK = """<CycloneDDS><Domain>
  <General>
    <Interfaces><NetworkInterface address="127.0.0.1"/></Interfaces>
    <AllowMulticast>false</AllowMulticast>
  </General>
  <Discovery>
    <ParticipantIndex>auto</ParticipantIndex>
    <Peers><Peer address="127.0.0.1"/></Peers>
  </Discovery>
</Domain></CycloneDDS>"""
"""A value of ``CYCLONEDDS_URI`` that keeps DDS on this computer and does without multicast, which loopback may lack."""

_BLOCKED_MS = 50
"""How long a reliable writer may wait for a slow reader before it gives a message up. Python's lock is held so long."""

_MATCH_SECONDS = 1.0
"""How long a reply waits for its reader to be discovered."""


class CycloneTransport:
    """DDS endpoints of a node, and two threads that wait on them. See `node.Transport`.

    They leave the network when this object goes.

    Args:
        node: what it carries messages for.
        report: shows a line to the operator.

    Raises:
        BackendError: Cyclone DDS can't be set up; ``CYCLONEDDS_URI`` may be wrong.
    """

    def __init__(self, node: SegmentationNode, *, report: Callable[[str], None]) -> None:
        self.report = report
        self._node = node
        self._threads: list[threading.Thread] = []
        options = node.options
        try:
            self._participant = DomainParticipant(options.domain)
            self._closing = GuardCondition(self._participant)
            frames = CompressedImage if options.takes_compressed else Image
            # native DDS programs call members `height_`, as ROS 2's IDL has them; their places are what counts
            any_names = Policy.TypeConsistency.AllowTypeCoercion(ignore_member_names=True)
            qos = Qos(any_names, base=qos_of(frames, depth=5, reliable=options.reliable))
            self._frames = DataReader(self._participant, self._topic(options.input, frames), qos)
            self._pictures = {name: self._writer(f"~/{name}", Image) for name in options.outputs}
            self._diagnostics = self._writer("/diagnostics", DiagnosticArray)
            service, name = _service_qos(self._participant), options.resolved("~/reload")
            self._requests = DataReader(
                self._participant, Topic(self._participant, f"rq{name}Request", TriggerRequest), service
            )
            self._replies = DataWriter(
                self._participant, Topic(self._participant, f"rr{name}Reply", TriggerResponse), service
            )
        except DDSException as exc:
            raise BackendError(
                f"cyclonedds can't join domain {options.domain} ({_line(exc)}); look at CYCLONEDDS_URI and the network"
            ) from exc

    def start(self) -> None:
        """See `Transport.start`."""
        for reader, handle in ((self._frames, self._node.offer), (self._requests, self._reload)):
            thread = threading.Thread(target=self._listen, args=(reader, handle), name="ddsm-dds")
            thread.start()
            self._threads.append(thread)

    def publish(self, picture: Picture) -> bool:
        """See `Transport.publish`."""
        height, width = picture.pixels.shape[:2]
        step = picture.pixels.nbytes // height
        image = Image(picture.header, height, width, picture.encoding, 0, step, picture.pixels.tobytes())
        return self._write(self._pictures[picture.output], image)

    def publish_status(self, status: Status) -> None:
        """See `Transport.publish_status`."""
        values = [KeyValue(key, value) for key, value in status.values]
        entry = DiagnosticStatus(status.level, status.name, status.message, status.hardware_id, values)
        self._write(self._diagnostics, DiagnosticArray(Header(Time.now(), ""), [entry]))

    def close(self) -> None:
        """See `Transport.close`."""
        self._closing.set(True)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _topic(self, name: str, kind: type[Any]) -> Topic[Any]:
        return Topic(self._participant, f"rt{name}", kind)

    def _writer(self, name: str, kind: type[Any]) -> DataWriter[Any]:
        topic = self._topic(self._node.options.resolved(name), kind)
        return DataWriter(self._participant, topic, qos_of(kind, depth=10, reliable=True))

    def _write(self, writer: DataWriter[Any], message: Any) -> bool:
        try:
            writer.write(message)
        except DDSException as exc:
            if exc.code == DDSException.DDS_RETCODE_TIMEOUT:
                return False
            raise BackendError(f"cyclonedds can't publish on {writer.topic.name} ({_line(exc)})") from exc
        return True

    def _listen(self, reader: DataReader[Any], handle: Callable[[Any], None]) -> None:
        """Hands every sample of a reader on, until the transport closes."""
        try:
            waiting = WaitSet(self._participant)
            waiting.attach(self._closing)
            waiting.attach(ReadCondition(reader, SampleState.Any | ViewState.Any | InstanceState.Any))
            while not self._closing.read():
                waiting.wait(duration(infinite=True))
                while not self._closing.read() and self._handle_one(reader, handle):
                    pass
        except BaseException as exc:  # noqa: BLE001 - ends the node: its `close` raises it in the main thread
            self._node.fail(exc)

    def _handle_one(self, reader: DataReader[Any], handle: Callable[[Any], None]) -> bool:
        try:
            samples = reader.take(N=1)
        except UnicodeDecodeError as exc:  # a text that is no UTF-8; the sample is gone, and only this one
            self._node.offer(InputError(f"a text in it is no UTF-8 ({exc})"))
            return True
        except DDSException as exc:
            raise BackendError(f"cyclonedds can't receive on {reader.topic.name} ({_line(exc)})") from exc
        for sample in samples:
            if not isinstance(sample, InvalidSample):  # those tell that a writer went
                handle(sample)
        return bool(samples)

    def _reload(self, request: TriggerRequest) -> None:
        success, message = self._node.reload()
        self.report(message)
        until = time.monotonic() + _MATCH_SECONDS
        while not self._replies.get_matched_subscriptions() and time.monotonic() < until:
            time.sleep(0.01)
        self._write(self._replies, TriggerResponse(request.client, request.sequence_number, success, message))


def qos_of(kind: type[Any], *, depth: int, reliable: bool) -> Qos:
    """What an endpoint of a topic asks for and offers: volatile, the last `depth` samples, plain CDR.

    A writer that is reliable suits every reader, as ROS 2's default for publishers; a reader that is not suits every
    writer, as its profile for sensor data.
    """
    policies = [
        Policy.Reliability.Reliable(duration(milliseconds=_BLOCKED_MS)) if reliable else Policy.Reliability.BestEffort,
        Policy.History.KeepLast(depth),
        Policy.Durability.Volatile,
        Policy.DataRepresentation(use_cdrv0_representation=True),
        Policy.WriterDataLifecycle(autodispose=False),
    ]
    if kind.__idl_typename__ in TYPE_HASHES:
        policies.append(Policy.Userdata(f"typehash={TYPE_HASHES[kind.__idl_typename__]};".encode()))
    return Qos(*policies)


def _service_qos(participant: DomainParticipant) -> Qos:
    """As ROS 2's services are, and with the word by which a client sees that reader and writer belong together."""
    return Qos(
        Policy.Userdata(f"serviceid={participant.guid};".encode()),
        base=qos_of(TriggerRequest, depth=10, reliable=True),
    )


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())

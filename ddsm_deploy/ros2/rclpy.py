"""The transport of ROS 2 itself, for any of its DDS implementations.

Written against the documented interface of rclpy (Jazzy and later, for the sake of Python 3.11), and not run yet. All
that is no call of rclpy is in `node`.
"""

from __future__ import annotations

import array
import dataclasses
import threading
from typing import Any

from ddsm_deploy.errors import BackendError
from ddsm_deploy.ros2.node import Picture, SegmentationNode
from ddsm_deploy.ros2.status import Status

try:
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
    from rcl_interfaces.msg import ParameterDescriptor
    from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
    from rclpy.context import Context
    from rclpy.executors import MultiThreadedExecutor
    from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
    from rclpy.signals import SignalHandlerOptions
    from sensor_msgs.msg import CompressedImage, Image
    from std_srvs.srv import Trigger
except ImportError as exc:
    raise BackendError(
        f"rclpy is not usable here ({exc}); source the setup.bash of your ROS 2 and use its Python, "
        "or take --transport cyclonedds"
    ) from exc

_DEPTH = 10


class RclpyTransport:
    """A ROS 2 node with an executor in a thread of its own. See `node.Transport`.

    Its options can be read as parameters of ROS.

    Raises:
        BackendError: rclpy can't be set up.
    """

    def __init__(self, node: SegmentationNode) -> None:
        self._node = node
        options = node.options
        self._context = Context()
        try:
            rclpy.init(
                args=[],
                context=self._context,
                domain_id=options.domain,
                signal_handler_options=SignalHandlerOptions.NO,  # whoever runs the node has its own
            )
            self._ros = rclpy.create_node(options.name, namespace=options.namespace, context=self._context)
        except Exception as exc:  # rclpy translates each DDS implementation's errors in its own way
            raise BackendError(f"rclpy can't start a node ({' '.join(str(exc).split())})") from exc
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            self._ros.declare_parameter(field.name, "" if value is None else value, ParameterDescriptor(read_only=True))
        qos = (
            QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE) if options.reliable else qos_profile_sensor_data
        )
        self._ros.create_subscription(
            CompressedImage if options.takes_compressed else Image,
            options.input,
            node.offer,
            qos,
            callback_group=MutuallyExclusiveCallbackGroup(),
        )
        self._pictures = {
            name: self._ros.create_publisher(Image, options.resolved(f"~/{name}"), _DEPTH) for name in options.outputs
        }
        self._diagnostics = self._ros.create_publisher(DiagnosticArray, "/diagnostics", _DEPTH)
        self._ros.create_service(
            Trigger, options.resolved("~/reload"), self._reload, callback_group=MutuallyExclusiveCallbackGroup()
        )
        self._executor = MultiThreadedExecutor(num_threads=2, context=self._context)  # a reload holds up no frame
        self._executor.add_node(self._ros)
        self._thread = threading.Thread(target=self._spin, name="ddsm-rclpy")

    def start(self) -> None:
        """See `Transport.start`."""
        self._thread.start()

    def publish(self, picture: Picture) -> bool:
        """See `Transport.publish`."""
        height, width = picture.pixels.shape[:2]
        image = Image(header=picture.header, height=height, width=width, encoding=picture.encoding)
        image.step = picture.pixels.nbytes // height
        image.data = array.array("B", picture.pixels.tobytes())  # anything else is checked byte by byte
        self._pictures[picture.output].publish(image)
        return True

    def publish_status(self, status: Status) -> None:
        """See `Transport.publish_status`."""
        entry = DiagnosticStatus(name=status.name, message=status.message, hardware_id=status.hardware_id)
        entry.level = bytes([status.level])
        entry.values = [KeyValue(key=key, value=value) for key, value in status.values]
        message = DiagnosticArray(status=[entry])
        message.header.stamp = self._ros.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def report(self, text: str) -> None:
        """See `Transport.report`."""
        self._ros.get_logger().info(text)

    def close(self) -> None:
        """See `Transport.close`."""
        self._executor.shutdown()
        if self._thread.is_alive():
            self._thread.join()
        self._ros.destroy_node()
        self._context.try_shutdown()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except BaseException as exc:  # noqa: BLE001 - ends the node: its `close` raises it in the main thread
            self._node.fail(exc)

    def _reload(self, request: Any, response: Any) -> Any:
        response.success, response.message = self._node.reload()
        self.report(response.message)
        return response

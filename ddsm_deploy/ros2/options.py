"""How a node runs, and what its topics are called."""

from __future__ import annotations

import dataclasses
import re

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.runtime.flow import POLICIES
from ddsm_deploy.runtime.segmenter import AUTO

LARGEST_DOMAIN = 232
"""With any larger one, DDS's port numbers leave their range (DDSI-RTPS 2.2, 9.6.1.1)."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """All that a node can be told.

    Attributes:
        topic: frames come from there; ``/absolute``, relative to the namespace, or ``~/own``.
        compressed: whether they are sensor_msgs/CompressedImage; None: if the topic ends in ``/compressed``.
        reliable: ask for every frame to be delivered. It takes a reliable publisher; the default takes any.
        model: as in `Segmenter.open`, like the next three.
        backend: ``auto`` or a backend.
        precision: None is the model's own, with ``auto`` whichever is quickest.
        threads: threads of one inference; None leaves it to the runtime.
        policy: what happens to a frame that finds another one waiting: ``latest`` drops the older one; ``every`` lets
            it queue.
        queue: with ``every``, how many may wait. Where it is full, the oldest is dropped.
        color: also publish the mask in the model's colours.
        confidence: also publish the confidence of each pixel; the model must give it.
        name: the node's name.
        namespace: in front of it.
        domain: DDS domain, 0 to 232.

    Raises:
        ConfigError: any of them is wrong.
    """

    topic: str
    compressed: bool | None = None
    reliable: bool = False
    model: str | None = None
    backend: str = AUTO
    precision: str | None = None
    threads: int | None = None
    policy: str = "latest"
    queue: int = 10
    color: bool = False
    confidence: bool = False
    name: str = "ddsm"
    namespace: str = "/"
    domain: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy is {self.policy!r}; expected {' or '.join(POLICIES)}")
        if self.queue < 1:
            raise ConfigError(f"queue is {self.queue}; expected at least 1")
        if not 0 <= self.domain <= LARGEST_DOMAIN:
            raise ConfigError(f"domain is {self.domain}; expected 0 to {LARGEST_DOMAIN}")
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"node name is {self.name!r}; expected letters, digits and _, with no digit in front")
        if self.namespace != "/":
            _check_name("namespace", self.namespace.removeprefix("/"))
        _check_name("topic", self.topic.removeprefix("~/").removeprefix("/"))

    @property
    def input(self) -> str:
        """The topic of the frames in full."""
        return self.resolved(self.topic)

    @property
    def takes_compressed(self) -> bool:
        """Whether frames are sensor_msgs/CompressedImage, not Image."""
        return self.input.endswith("/compressed") if self.compressed is None else self.compressed

    @property
    def capacity(self) -> int:
        """Frames that may wait while one is worked on."""
        return 1 if self.policy == "latest" else self.queue

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is published for each frame, each as ``~/NAME``."""
        wanted = {"mask": True, "color": self.color, "confidence": self.confidence}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    @property
    def full_name(self) -> str:
        """The node's name behind its namespace, ``/robot/ddsm``."""
        return f"/{self.namespace.strip('/')}/{self.name}".replace("//", "/")

    def resolved(self, name: str) -> str:
        """A topic's or a service's name in full, as ROS 2 resolves it: ``~`` is the node."""
        if name.startswith("/"):
            return name
        if name.startswith("~/"):
            return f"{self.full_name}{name[1:]}"
        return f"/{self.namespace.strip('/')}/{name}".replace("//", "/")


def _check_name(what: str, text: str) -> None:
    if not all(_NAME.fullmatch(part) for part in text.split("/")):
        raise ConfigError(
            f"{what} is {text!r}; expected words of letters, digits and _, with / between and no digit in front"
        )

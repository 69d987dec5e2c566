"""What the service allows, and where it listens."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from pathlib import Path

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.runtime.decisions import usable_cores

TOKEN_VARIABLE = "DDSM_TOKEN"

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request, and all together, may take.

    Memory follows from it: `places` requests are in at once, each with an upload of at most `max_bytes`, and `threads`
    of them with a decoded image of at most `max_pixels`.

    Attributes:
        max_bytes: of a request's body.
        max_pixels: of an image, by its header.
        workers: images worked on side by side; None is one a core.
        queue: requests that may be in beside those worked on, being uploaded or waiting.
        upload_seconds: for reading a request's head, and again for its body.
        seconds: for waiting and work after that, and again for sending the answer.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 25_000_000
    workers: int | None = None
    queue: int = 16
    upload_seconds: float = 10.0
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("max_bytes", 1), ("max_pixels", 1), ("queue", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; expected at least 1")
        for name in ("upload_seconds", "seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number above 0")

    @property
    def threads(self) -> int:
        """Images worked on side by side."""
        return self.workers or usable_cores()

    @property
    def places(self) -> int:
        """Requests that may be in at once."""
        return self.threads + self.queue


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where to listen, to whom, and within which limits.

    Attributes:
        host: a name or an address; loopback unless others are to reach it.
        port: 0 is any free one.
        token: what a client must show; None lets everybody in who can reach the port.
        limits: what requests may take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; expected 0 (any free one) to 65535")
        if self.token is not None:
            _check_token(self.token, "the token")

    @property
    def open_to_others(self) -> bool:
        """Whether other machines may reach it and need no token."""
        return self.token is None and not _is_loopback(self.host)


def parse_bytes(text: str) -> int:
    """``20MB``, ``512 KiB`` or ``1000000`` as a number of bytes.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"{text!r} is no size; expected a number with kB, MB, GB, KiB, MiB, GiB or nothing after it")
    return int(float(found[1]) * _UNITS[found[2]])


def read_token(file: Path | None) -> str | None:
    """The token in a file, or else in the environment (`TOKEN_VARIABLE`); None where neither is given.

    Raises:
        ConfigError: the file can't be read, or there is no token in it.
    """
    if file is None:
        found = os.environ.get(TOKEN_VARIABLE)
        return None if found is None else _check_token(found.strip(), f"${TOKEN_VARIABLE}")
    try:
        return _check_token(file.read_text(encoding="utf-8").strip(), str(file))
    except OSError as exc:
        raise ConfigError(f"{file}: can't be read ({exc.strerror or exc})") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file}: holds no token, but other bytes than text") from exc


def _check_token(token: str, where: str) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{where}: expected one token of printable ASCII characters without spaces")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

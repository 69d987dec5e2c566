"""Where this package keeps what it can make again: unpacked bundles and measured decisions."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The folder, which need not exist: ``ddsm-deploy`` in ``$XDG_CACHE_HOME``, or in the system's usual place.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG Base Directory Specification (0.8) asks.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "ddsm-deploy"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "ddsm-deploy"
    try:
        return Path.home() / ".cache" / "ddsm-deploy"
    except RuntimeError:  # a user without a home: nothing can be kept, and nothing needs to be
        return Path(os.devnull) / "ddsm-deploy"

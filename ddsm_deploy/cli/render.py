"""What several commands share in how they start and print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ddsm_deploy.errors import BackendMissing


@contextlib.contextmanager
def require(extra: str) -> Iterator[None]:
    """Turns a failed import of a package that an extra brings into the one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").split(".")[0] == "ddsm_deploy":
            raise
        raise BackendMissing("torch", extra=extra, why=f"no module named {exc.name}") from exc

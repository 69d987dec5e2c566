"""What several commands share in how they start and print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ddsm_deploy.errors import BackendMissing, InputError


@contextlib.contextmanager
def require(extra: str, *, backend: str = "torch") -> Iterator[None]:
    """Turns a failed import of a package that an extra brings into the one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").split(".")[0] == "ddsm_deploy":
            raise
        raise BackendMissing(backend, extra=extra, why=f"no module named {exc.name}") from exc


def write_json(target: str, text: str) -> None:
    """Writes a command's machine-readable result to the file that `--json` names; ``-`` is standard output.

    Raises:
        InputError: the file can't be written.
    """
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as exc:
        raise InputError(f"{target}: can't be written ({exc.strerror or exc})") from exc

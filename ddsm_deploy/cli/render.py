"""What several commands share in how they start and print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ddsm_deploy.errors import BackendMissing
from ddsm_deploy.files import check_writable, replacing, writing


@contextlib.contextmanager
def require(extra: str, *, backend: str = "torch") -> Iterator[None]:
    """Turns a failed import of a package that an extra brings into the one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").split(".")[0] == "ddsm_deploy":
            raise
        raise BackendMissing(backend, extra=extra, why=f"no module named {exc.name}") from exc


def check_json(target: str | None) -> None:
    """Finds out before long work whether `write_json` will be able to write.

    Raises:
        InputError: it will not.
    """
    if target not in (None, "-") and _replaced(path := Path(target)):
        check_writable(path)


def _replaced(path: Path) -> bool:
    """Not a pipe or a terminal, which can't be."""
    with writing(path):
        return path.is_file() or path.is_dir() or not path.exists()


def write_json(target: str, text: str) -> None:
    """Writes a command's machine-readable result to the file that `--json` names; ``-`` is standard output.

    Missing folders are made, and an earlier file stays whole until the new one takes its place.

    Raises:
        InputError: the file can't be written.
    """
    if target == "-":
        print(text)
        return
    path = Path(target)
    with contextlib.ExitStack() as stack:
        if _replaced(path):
            path = stack.enter_context(replacing(path))
        stack.enter_context(writing(Path(target)))
        path.write_text(text + "\n", encoding="utf-8")

"""Writing files so that each appears under its name whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddsm_deploy.errors import InputError


@contextmanager
def replacing(output: Path, *, sources: Collection[Path] = ()) -> Iterator[Path]:
    """A temporary file beside `output`, tried out for writing at once and renamed to it if the block ends well.

    Raises:
        InputError: `output` is a folder, a device or a pipe, one of the `sources` that it is made from, or can't be
            written.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    with writing(output):  # a folder that may not be entered, a name that is too long
        if output.is_dir():
            raise InputError(f"{output}: is a folder; expected the name of a file such as model.onnx")
        if output.exists() and not output.is_file():  # a plain file would take the place of /dev/null
            raise InputError(f"{output}: is a device or a pipe; expected the name of a file")
        if output.exists() and any(source.exists() and source.samefile(output) for source in sources):
            raise InputError(f"{output}: belongs to the model that is read; expected the name of another file")
    try:
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        yield temporary
        with writing(output):
            temporary.replace(output)
    finally:
        with suppress(OSError):  # it was renamed, or its folder can't even be entered
            temporary.unlink()


def check_writable(output: Path) -> None:
    """Tries out now what `replacing` will need after long work.

    Raises:
        InputError: as there.
    """
    with suppress(_NotYet), replacing(output):
        raise _NotYet


class _NotYet(Exception):
    """Leaves `replacing` without a file."""


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turns what the system says against writing into one line.

    Raises:
        InputError: it did.
    """
    try:
        yield
    except OSError as exc:
        raise InputError(f"{output}: can't be written ({exc.strerror or exc})") from exc

"""A bar for frames on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PLAIN_SECONDS = 10.0
"""Time between progress lines where there is no terminal."""

Show = Callable[[int, "int | None", str], None]
"""Takes the frames that are ended, all that there are (None: nobody knows), and a note."""


@contextlib.contextmanager
def frames_bar(quiet: bool) -> Iterator[Show | None]:
    """What to call after each frame; None where nothing is to be shown."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _plain()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(file=sys.stderr)) as bar:
            task = bar.add_task("segmenting", total=None, note="")
            yield lambda done, total, note: bar.update(task, total=total, completed=done, note=note)


def _plain() -> Show:
    begin = shown = time.monotonic()
    first: int | None = None

    def show(done: int, total: int | None, note: str) -> None:
        nonlocal shown, first
        first = done if first is None else first
        now = time.monotonic()
        if now - shown < PLAIN_SECONDS:
            return
        shown = now
        rate = (done - first) / (now - begin)
        left = f", {(total - done) / rate:.0f} s left" if rate and total is not None else ""
        print(f"{done}{'' if total is None else f'/{total}'} frames, {note}{left}", file=sys.stderr)

    return show

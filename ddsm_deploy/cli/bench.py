"""`ddsm bench`."""

from __future__ import annotations


def bench() -> None:
    """Placeholder until the command lands."""

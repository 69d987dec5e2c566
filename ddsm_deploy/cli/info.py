"""`ddsm info`."""

from __future__ import annotations


def info() -> None:
    """Placeholder until the command lands."""

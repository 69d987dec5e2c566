"""`ddsm segment`."""

from __future__ import annotations


def segment() -> None:
    """Placeholder until the command lands."""

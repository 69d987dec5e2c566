"""`ddsm eval`."""

from __future__ import annotations


def evaluate() -> None:
    """Placeholder until the command lands."""

"""Where frames wait: a hand-over from the thread that receives them to the one that works on them."""

from __future__ import annotations

import collections
import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """A queue that never makes its sender wait: where it is full, the oldest item gives way.

    Args:
        capacity: items that may wait, at least 1; None for any number.
    """

    def __init__(self, capacity: int | None) -> None:
        self._items: collections.deque[Item] = collections.deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Item) -> bool:
        """Adds an item; returns whether an older one was dropped for it. Once closed, nothing is added."""
        with self._changed:
            if self._closed:
                return False
            full = len(self._items) == self._capacity
            if full:
                self._items.popleft()
            self._items.append(item)
            self._changed.notify()
            return full

    def take(self) -> Item | None:
        """The oldest item, as soon as there is one; None when no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            return self._items.popleft() if self._items else None

    def close(self, *, discard: bool = False) -> None:
        """No more will come; with `discard` those that wait are given up."""
        with self._changed:
            self._closed = True
            if discard:
                self._items.clear()
            self._changed.notify_all()

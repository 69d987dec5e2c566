"""A mailbox never makes its sender wait; what gives way, and what is left when it closes."""

from __future__ import annotations

import threading

from ddsm_deploy.runtime.mailbox import Mailbox


def test_a_full_one_drops_the_oldest() -> None:
    mailbox: Mailbox[int] = Mailbox(2)
    assert [mailbox.put(number) for number in range(4)] == [False, False, True, True]
    assert [mailbox.take(), mailbox.take()] == [2, 3]


def test_without_a_capacity_all_wait_their_turn() -> None:
    mailbox: Mailbox[int] = Mailbox(None)
    assert not any(mailbox.put(number) for number in range(3))
    mailbox.close()
    assert [mailbox.take() for _ in range(4)] == [0, 1, 2, None]


def test_what_waits_can_be_given_up() -> None:
    mailbox: Mailbox[int] = Mailbox(None)
    mailbox.put(0)
    mailbox.close(discard=True)
    assert mailbox.take() is None


def test_closing_ends_who_waits() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    taken: list[int | None] = []
    thread = threading.Thread(target=lambda: taken.append(mailbox.take()))
    thread.start()
    mailbox.close()
    thread.join(60)
    assert taken == [None]
    assert not mailbox.put(1)
    assert mailbox.take() is None

"""Tests of how long the consumer pauses before it reconnects to the broker."""

from __future__ import annotations

from followups.worker.broker import LASTS, LONGEST_PAUSE, Consumer


def test_pauses_grow_until_a_connection_lasts() -> None:
    """The consumer first connects without a pause; if its connections do not last, the pauses grow.

    The pauses have a maximum length.
    """
    consumer = Consumer()
    assert consumer.pause() == 0
    pauses = []
    for _ in range(2000):
        consumer.connected()
        consumer.answered([])  # one connection reads the queues while the broker rejects another
        pauses.append(consumer.pause())
    assert pauses[:4] == [0.25, 0.5, 1, 2]
    assert pauses[-1] == LONGEST_PAUSE
    consumer.connected_at -= LASTS + 1
    consumer.answered(["deliver"])
    assert consumer.pause() == 0

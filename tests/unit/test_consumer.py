"""The consumer's pauses between connections to the broker."""

from __future__ import annotations

from followups.worker.broker import LASTS, LONGEST_PAUSE, Consumer


def test_pauses_grow_until_a_connection_lasts() -> None:
    """The first connection is made at once; after short-lived ones the pauses grow, up to a limit."""
    consumer = Consumer()
    assert consumer.pause() == 0
    pauses = []
    for _ in range(2000):
        consumer.connected()
        consumer.answered([])  # a read of the queues while another is refused
        pauses.append(consumer.pause())
    assert pauses[:4] == [0.25, 0.5, 1, 2]
    assert pauses[-1] == LONGEST_PAUSE
    consumer.connected_at -= LASTS + 1
    consumer.answered(["deliver"])
    assert consumer.pause() == 0

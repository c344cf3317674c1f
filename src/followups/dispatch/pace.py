"""Pace: how long to wait between two claims behind a backlog. Pure.

Each claim looks at all that is in flight, however little of it has come free: claiming each place as it does would
make batches of one. Waiting until everything has been sent would leave the workers without anything. So one half is
claimed while they send the other.
"""

from __future__ import annotations

SHORTEST = 0.05
LONGEST = 0.5
"""Seconds. What is created for now, beside a backlog, waits no longer for a look."""


def until_half_is_free(taken: int, seconds: float, window: int) -> float:
    """Return the seconds until half of a ``window`` comes free, at the rate of ``taken`` places in so many ``seconds``.

    It is no more than twice those seconds: little that came free in a moment says nothing about the next ones.

    >>> until_half_is_free(taken=1000, seconds=0.1, window=5000)
    0.2
    """
    if taken >= window:
        return SHORTEST  # all of it came free, and nobody knows how long ago
    half = seconds * window / (2 * taken) if taken else LONGEST
    return min(max(SHORTEST, min(half, 2 * seconds)), LONGEST)

"""How long to wait between two claims behind a backlog.

No clock of its own, no I/O. Each claim reads everything in flight, however few places have become free: claiming each
place as it becomes free would make batches of one. Waiting until everything was sent would leave the workers idle. So
one half is claimed while the workers send the other.
"""

from __future__ import annotations

SHORTEST = 0.05
LONGEST = 0.5
"""Seconds. During a backlog, a follow-up created for now waits at most this long for a claim."""


def until_half_is_free(taken: int, seconds: float, window: int) -> float:
    """Return the seconds until half of a ``window`` is free, at the rate of ``taken`` places in so many ``seconds``.

    The result is at most twice ``seconds``: a few places that become free at once do not predict the next ones.

    >>> until_half_is_free(taken=1000, seconds=0.1, window=5000)
    0.2
    """
    if taken >= window:
        return SHORTEST  # the whole window was free, for an unknown time
    half = seconds * window / (2 * taken) if taken else LONGEST
    return min(max(SHORTEST, min(half, 2 * seconds)), LONGEST)


class ClaimInterval:
    """When a dispatcher claims next. There may be others, each with ticks of its own."""

    def __init__(self, window: int) -> None:
        """``window`` is the in-flight limit."""
        self._window = window
        self._taken = 0
        """Places taken since the window was last full, at ``_full_at``."""
        self._full_at: float | None = None
        """None if unknown: the start of a backlog says nothing about its speed."""
        self.next = 0.0
        """Monotonic seconds."""

    def begin(self) -> None:
        """Start a tick: other dispatchers may have claimed since the last one, so the free places predict nothing."""
        self._full_at = None

    def note(self, taken: int, at: float, *, more: bool, cut_short: bool) -> None:
        """Record a claim that started ``at`` a time (monotonic seconds) and claimed ``taken`` follow-ups.

        ``more``: it left some; ``cut_short``: the claim reached its own limit before the window was full.
        """
        if self._full_at is None:
            self._taken, self._full_at = 0, at
        self._taken += taken
        self.next = 0.0
        if not more:
            self._full_at = None
        elif not cut_short:
            self.next = at + until_half_is_free(self._taken, at - self._full_at, self._window)
            self._taken, self._full_at = 0, at

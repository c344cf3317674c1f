"""Pace: how long to wait between two claims behind a backlog. No clock of its own, no I/O.

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


class Pace:
    """When a dispatcher is to claim next. There may be others, and each claims in ticks of its own."""

    def __init__(self, window: int) -> None:
        """``window`` is how many may be in flight."""
        self._window = window
        self._taken = 0
        """Since the window was last full, at ``_full_at``."""
        self._full_at: float | None = None
        """None: nobody knows; what a backlog begins with says nothing about how fast it goes."""
        self.next = 0.0
        """Monotonic seconds."""

    def begin(self) -> None:
        """Begin a tick: others may have claimed since the last one, so that what comes free now says nothing."""
        self._full_at = None

    def note(self, taken: int, at: float, *, more: bool, cut_short: bool) -> None:
        """Take a claim into account that began at a moment (monotonic seconds) and took so many.

        ``more``: it left some; ``cut_short``: it was full, and the window was not.
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

"""The interval between two claims during a backlog.

This module has no clock and does no I/O. Each claim reads all follow-ups in flight, even if only one slot has become
free. If every free slot caused a claim, each batch would contain only one follow-up. If each claim waited until all
claimed follow-ups were sent, workers would be idle. One half of the window is therefore claimed while the workers send
the other half.
"""

from __future__ import annotations

SHORTEST = 0.05
LONGEST = 0.5
"""Maximum seconds that an immediately due follow-up waits for a claim during a backlog."""


def until_half_is_free(taken: int, seconds: float, window: int) -> float:
    """Return the predicted number of seconds until half of a ``window`` is free.

    In the last ``seconds`` seconds, ``taken`` places of the window became free and were claimed. The result is at most
    twice the measured time ``seconds``. A few places freed at one moment do not predict when more places become free.

    >>> until_half_is_free(taken=1000, seconds=0.1, window=5000)
    0.2
    """
    if taken >= window:
        return SHORTEST  # the whole window was free for an unknown time
    half = seconds * window / (2 * taken) if taken else LONGEST
    return min(max(SHORTEST, min(half, 2 * seconds)), LONGEST)


class ClaimInterval:
    """The time of a dispatcher's next claim. Other dispatchers may be running, each with its own ticks."""

    def __init__(self, window: int) -> None:
        """Store ``window``, the limit on follow-ups in flight."""
        self._window = window
        self._taken = 0
        """Number of follow-ups claimed since the in-flight limit was last reached."""
        self._full_at: float | None = None
        """The monotonic time at which the in-flight limit was last reached, or None if unknown. At the start of a
        backlog, the sending speed is not known yet.
        """
        self._pause = SHORTEST
        """The most recent pause, in seconds, that was computed from a known rate of claims."""
        self.next = 0.0
        """The earliest time of the next claim, in monotonic seconds."""

    def begin(self) -> None:
        """Start a tick; the rate of claims is not known yet.

        The number of free places says nothing about the rate of claims, because other dispatchers also claim. The first
        pause of a tick is as long as the last known pause. If each tick started with the shortest pause, there would be
        twice as many claims.
        """
        self._full_at = None

    def record_claim(self, taken: int, at: float, *, more: bool, cut_short: bool) -> None:
        """Record that a claim took ``taken`` follow-ups and began at ``at`` on the monotonic clock.

        ``more`` means that some due follow-ups were not claimed. ``cut_short`` means that the claim reached its own
        limit before the window was full.
        """
        if self._full_at is not None:
            self._taken += taken
        self.next = 0.0
        if not more:
            self._full_at = None
        elif not cut_short:
            if self._full_at is not None:
                self._pause = until_half_is_free(self._taken, at - self._full_at, self._window)
            self.next = at + self._pause
            self._taken, self._full_at = 0, at

"""The policy for retries of failed attempts: plain data and pure functions.

The backoff is exponential with full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
The delay is uniformly distributed between zero and the ceiling. Attempts that failed together are therefore retried at
different times.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_RETRY_AFTER = timedelta(seconds=1)
MAX_RETRY_AFTER = timedelta(hours=24)
SPREAD = 0.1
"""Maximum random extra delay, as a fraction of the requested delay.

Follow-ups that were refused at the same moment are therefore retried at different times.
"""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The maximum number of attempts, and the delays between them.

    >>> policy = RetryPolicy(timedelta(seconds=5), 2.0, timedelta(hours=1), max_attempts=8)
    >>> [int(policy.ceiling(attempt).total_seconds()) for attempt in (1, 2, 3, 20)]
    [5, 10, 20, 3600]
    >>> policy.next_delay(8) is None
    True
    """

    base: timedelta
    factor: float
    cap: timedelta
    max_attempts: int

    def ceiling(self, attempt: int) -> timedelta:
        """Return the maximum delay after the failed attempt ``attempt``; the first attempt is number 1."""
        try:
            grown = self.base.total_seconds() * self.factor ** (attempt - 1)
        except OverflowError:  # the float overflows only if the delay is far above the cap
            return self.cap
        return timedelta(seconds=min(grown, self.cap.total_seconds()))

    def jittered(self, attempt: int, jitter: Callable[[], float] = random.random) -> timedelta:
        """Return a random delay between zero and the ceiling. ``jitter`` returns a fraction in [0, 1)."""
        return self.ceiling(attempt) * jitter()

    def next_delay(self, attempt: int, jitter: Callable[[], float] = random.random) -> timedelta | None:
        """Return the delay after a failed attempt, or None if it was the last attempt."""
        return None if attempt >= self.max_attempts else self.jittered(attempt, jitter)


def spread(wished: timedelta, jitter: Callable[[], float] = random.random) -> timedelta:
    """Return the requested delay plus a random fraction of it, limited to 24 hours.

    >>> spread(timedelta(seconds=10), lambda: 0.5).total_seconds()
    10.5
    """
    return min(wished * (1 + SPREAD * jitter()), MAX_RETRY_AFTER)


def clamp_retry_after(wished: timedelta) -> timedelta:
    """Return the requested delay, limited to the range from 1 second to 24 hours.

    >>> clamp_retry_after(timedelta(0)).total_seconds()
    1.0
    """
    return min(max(wished, MIN_RETRY_AFTER), MAX_RETRY_AFTER)

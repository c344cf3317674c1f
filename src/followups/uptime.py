"""The clock by which a lease is judged without asking the database."""

from __future__ import annotations

import time

# Linux stops the monotonic clock while a machine is suspended. Other systems have no CLOCK_BOOTTIME, and their
# monotonic clock keeps running.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def uptime() -> float:
    """Return the seconds since the machine was started, including time suspended; never set back.

    A lease keeps running while a machine is suspended. By the monotonic clock, a worker that resumes after its lease
    would make its call as if no time had passed, perhaps after a cancel, or beside another worker's call.
    """
    return time.clock_gettime(_CLOCK)

"""The clock by which a worker checks its leases without a database query."""

from __future__ import annotations

import time

# Linux stops the monotonic clock while a machine is suspended. Other systems lack CLOCK_BOOTTIME, but their monotonic
# clock runs even while the machine is suspended.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def uptime() -> float:
    """Return the seconds since the machine was started, including the time it was suspended. Never set back.

    A lease keeps running while a machine is suspended. Python's monotonic clock stops while the machine is suspended.
    With that clock, a worker might call the transport after its lease has expired. While the machine was suspended, the
    follow-up may have been cancelled, or leased by another worker.
    """
    return time.clock_gettime(_CLOCK)

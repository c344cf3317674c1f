"""The counters of a process, keyed by the fixed names of their Prometheus metrics. Labels contain no ids.

Gauges, such as the number of pending follow-ups, are queried at each scrape instead.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from math import inf
from threading import Lock
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COUNTED = CollectorRegistry()
"""The counters of a process; the sums over all processes are in the database (`followups.store.counter_totals`)."""


class Histogram(Collector):
    """A histogram that records a batch of values in one call.

    The histogram of prometheus_client records one value per call, which takes 1 us.
    """

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        """Create and register the histogram; ``buckets`` are the upper bounds of the buckets in ascending order."""
        self._name, self._documentation = name, documentation
        self._bounds = (*buckets, inf)
        self._counts = [0.0] * len(self._bounds)
        self._sum = 0.0
        self._lock = Lock()
        COUNTED.register(self)

    def observe(self, *values: float) -> None:
        """Record the values."""
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
                self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram with cumulative buckets."""
        with self._lock:
            counts, total = tuple(accumulate(self._counts)), self._sum
        buckets = tuple(zip(map(floatToGoString, self._bounds), counts, strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets, sum_value=total)


TRANSITIONS = Counter(
    "followups_transitions_total",
    "Follow-ups that ended, by final state and reason code.",
    ["status", "code"],
    registry=COUNTED,
)
ATTEMPTS = Counter(
    "followups_attempts_total", "Calls of the transport, by outcome.", ["transport", "outcome"], registry=COUNTED
)
ATTEMPT_DURATION = Histogram(
    "followups_attempt_duration_seconds",
    "Duration of a transport call.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
LAG = Histogram(
    "followups_lag_seconds",
    "Time of acceptance by the transport minus the due date.",
    # The histogram's buckets range from a millisecond to a day, after which a follow-up is too late by default.
    buckets=(
        0.001,
        0.0025,
        0.005,
        0.01,
        0.025,
        0.05,
        0.1,
        0.25,
        0.5,
        1,
        2.5,
        5,
        10,
        30,
        60,
        300,
        900,
        3600,
        21600,
        86400,
    ),
)
CLAIMED = Counter("followups_claimed_total", "Follow-ups claimed by ticks.", registry=COUNTED)
STALE_WRITES = Counter(
    "followups_stale_writes_total",
    "Outcomes that were refused because another worker had taken over the lease.",
    registry=COUNTED,
)
LEASES_EXPIRED = Counter(
    "followups_leases_expired_total", "Leases that expired before an outcome was recorded.", registry=COUNTED
)
BREAKER_OPENED = Counter(
    "followups_breaker_opened_total",
    "Times that the breaker opened because the transport failed for all workspaces.",
    ["transport"],
    registry=COUNTED,
)
BREAKER_UNAVAILABLE = Counter(
    "followups_breaker_unavailable_total",
    "Times that the breaker's state could not be read, so that deliveries continued without the breaker.",
    registry=COUNTED,
)
TICK_DURATION = Histogram(
    "followups_tick_duration_seconds",
    "Duration of a tick.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
LIMITED = Counter("followups_limited_total", "Times that a rate limit deferred a follow-up.", registry=COUNTED)
LIMITER_UNAVAILABLE = Counter(
    "followups_limiter_unavailable_total",
    "Follow-ups delivered without rate limits, because Redis was unavailable.",
    registry=COUNTED,
)

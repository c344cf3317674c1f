"""Tests of the counters that the database sums over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from followups.store.counter_totals import CounterTotals, counted, read
from followups.telemetry import metrics

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from followups.store.counter_totals import Sample

CLAIMED = ("followups_claimed_total", "{}")


def sums(engine: Engine) -> dict[Sample, float]:
    """Return the sums stored in the database."""
    with engine.connect() as connection:
        return read(connection)


def test_counts_of_processes_are_summed(engine: Engine) -> None:
    """Each process adds its new counts, so that the sum covers all processes."""
    first, second = CounterTotals(engine), CounterTotals(engine)
    before = counted()[CLAIMED]
    metrics.CLAIMED.inc(3)
    first.add()
    first.add()
    second.add()  # as if another process had added the same counts
    assert sums(engine)[CLAIMED] == 2 * (before + 3)
    metrics.CLAIMED.inc(4)
    first.add()
    assert sums(engine)[CLAIMED] == 2 * (before + 3) + 4


def test_labels_and_histograms(engine: Engine) -> None:
    """Each combination of labels and each part of a histogram has a separate sum."""
    metrics.TRANSITIONS.labels(status="failed", code="rejected").inc()
    metrics.LAG.observe(0.003)
    CounterTotals(engine).add()
    found = sums(engine)
    assert found["followups_transitions_total", '{"code": "rejected", "status": "failed"}'] >= 1
    assert found["followups_lag_seconds_bucket", '{"le": "0.005"}'] >= 1
    assert found["followups_lag_seconds_count", "{}"] >= 1


def test_added_at_the_end(engine: Engine) -> None:
    """A process that stops adds its remaining counts to the totals."""
    kept = CounterTotals(engine)
    kept.start()
    metrics.CLAIMED.inc()
    kept.stop()
    assert sums(engine)[CLAIMED] == counted()[CLAIMED]

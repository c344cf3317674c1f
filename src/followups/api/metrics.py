"""The content of `/metrics`: gauges from the database, and counters summed over all processes."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from followups.store import counter_totals, counts, last_tick
from followups.telemetry import metrics
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Engine

    from followups.store.counter_totals import CounterTotals

log = get_logger(__name__)

KEPT = timedelta(seconds=2)
"""How long a database result is reused for all scrapers."""


ESTIMATED = f"above {counts.BACKLOG_EXACT_UP_TO:,}, PostgreSQL's estimate."


class BacklogCollector(Collector):
    """Gauges that are read from the database on each scrape.

    If the query fails, the metrics page lacks only the gauges from the database.
    """

    def __init__(self, engine: Engine, window: int) -> None:
        """Store the engine and the limit on deliveries in flight."""
        self._engine = engine
        self._window = window
        self._lock = threading.Lock()
        self._kept: counts.Backlog | None = None
        self._until = 0.0
        self._last_tick = 0.0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges."""
        found = self._backlog()
        if found is None:
            return
        yield GaugeMetricFamily("followups_pending", f"Follow-ups that have not ended; {ESTIMATED}", found.pending)
        yield GaugeMetricFamily(
            "followups_overdue",
            f"Pending follow-ups whose due date has passed, in flight or not; {ESTIMATED}",
            found.overdue,
        )
        yield GaugeMetricFamily(
            "followups_oldest_overdue_seconds",
            "Seconds since the oldest overdue follow-up was due, or 0 if there is none.",
            found.oldest_overdue,
        )
        yield GaugeMetricFamily("followups_in_flight", "Attempts whose outcome is not yet recorded.", found.in_flight)
        yield GaugeMetricFamily(
            "followups_last_tick_timestamp_seconds",
            "Time of the last tick, in seconds since 1970, or 0 if no tick has run.",
            self._last_tick,
        )

    def _backlog(self) -> counts.Backlog | None:
        with self._lock:
            if time.monotonic() < self._until:
                return self._kept
            try:
                with self._engine.connect() as connection:
                    self._kept = counts.measure_backlog(connection, window=self._window)
                    self._last_tick = last_tick.last_tick(connection)
            except SQLAlchemyError as error:
                log.warning("database_unreachable", step="metrics", error=type(error).__name__)
                self._kept = None
            self._until = time.monotonic() + KEPT.total_seconds()
            return self._kept


class Exposition:
    """All metrics in Prometheus text format.

    The text contains the backlog's gauges, the counters of all processes, and this process's own metrics.
    """

    def __init__(self, engine: Engine, window: int, totals: CounterTotals) -> None:
        """Store two functions: one returns the gauges, the other the totals of the counters."""
        self._engine = engine
        self._totals = totals
        self._waiting = CollectorRegistry()
        self._waiting.register(BacklogCollector(engine, window))
        self._counted = CollectorRegistry()
        self._counted.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the counters summed over all processes.

        Yield nothing if the database is unreachable: partial sums would look like a counter reset.
        """
        try:
            self._totals.add()
            with self._engine.connect() as connection:
                # Metrics without labels are reported from the start, with the value zero.
                samples = dict.fromkeys(counter_totals.counted(), 0.0) | counter_totals.read(connection)
        except SQLAlchemyError as error:
            log.warning("database_unreachable", step="metrics", error=type(error).__name__)
            samples = {}
        return _families(samples)

    def describe(self) -> list[Metric]:
        """Return no metrics, because their names are unknown before collection."""
        return []

    def text(self) -> bytes:
        """Return all metrics in text format."""
        return b"".join(map(generate_latest, (self._waiting, self._counted, REGISTRY)))


def _families(samples: Mapping[counter_totals.Sample, float]) -> Iterator[Metric]:
    """Group the samples by metric: name, type and help text."""
    for family in metrics.COUNTED.collect():
        names = {f"{family.name}{suffix}" for suffix in ("_total", "_bucket", "_sum", "_count")}
        shown = Metric(family.name, family.documentation, family.type)
        mine = [(name, json.loads(labels), value) for (name, labels), value in samples.items() if name in names]
        for name, labels, value in sorted(mine, key=_place):
            shown.add_sample(name, labels, value)
        yield shown


def _place(sample: tuple[str, dict[str, str], float]) -> tuple[str, float, str]:
    """Return the sort key of a sample. The buckets of a histogram must be in ascending order."""
    name, labels, _ = sample
    return name, float(labels.get("le", 0)), json.dumps(labels)

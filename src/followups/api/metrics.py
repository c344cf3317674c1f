"""What `/metrics` shows beside this process's own counts: gauges that the database knows."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from followups.store import backlog
from followups.telemetry import metrics as _counted  # noqa: F401 - registers every metric, so that each is shown
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

log = get_logger(__name__)

KEPT = timedelta(seconds=2)
"""How long an answer of the database serves: several scrapers cost no more than one."""


class BacklogCollector(Collector):
    """Asks the database when somebody scrapes. Without it, these gauges are missing and the rest is shown."""

    def __init__(self, engine: Engine, window: int) -> None:
        """Take the engine, and the most that can be in flight."""
        self._engine = engine
        self._window = window
        self._lock = threading.Lock()
        self._kept: backlog.Backlog | None = None
        self._until = 0.0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Give the gauges."""
        found = self._backlog()
        if found is None:
            return
        yield GaugeMetricFamily("followups_pending", "Follow-ups that have not ended.", found.pending)
        yield GaugeMetricFamily(
            "followups_overdue", "Pending follow-ups whose moment has passed, in flight or not.", found.overdue
        )
        yield GaugeMetricFamily(
            "followups_oldest_overdue_seconds", "How long ago the first of them was due; 0: none.", found.oldest_overdue
        )
        yield GaugeMetricFamily("followups_in_flight", "Attempts whose outcome is not yet recorded.", found.in_flight)

    def _backlog(self) -> backlog.Backlog | None:
        with self._lock:
            if time.monotonic() < self._until:
                return self._kept
            try:
                with self._engine.connect() as connection:
                    self._kept = backlog.measure(connection, window=self._window)
            except SQLAlchemyError as error:
                log.warning("database_unreachable", step="metrics", error=type(error).__name__)
                self._kept = None
            self._until = time.monotonic() + KEPT.total_seconds()
            return self._kept


class Exposition:
    """The text that Prometheus reads."""

    def __init__(self, engine: Engine, window: int) -> None:
        """Take where the gauges come from."""
        self._registry = CollectorRegistry()
        self._registry.register(BacklogCollector(engine, window))

    def text(self) -> bytes:
        """Return everything, in the text format."""
        return generate_latest(self._registry) + generate_latest(REGISTRY)

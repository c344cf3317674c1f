"""The sums of all processes' counters.

Each process adds its new counts to the sums in the database. Any process can report the sums. Workers start and stop on
many hosts, but Prometheus scrapes only one web process. A count kept in a worker would never be scraped, and would be
lost when the worker stops.
"""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from followups.telemetry import metrics
from followups.telemetry.logs import get_logger
from followups.transactions import ask_if_lost, transact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Engine

Sample = tuple[str, str]
"""A sample's name, and its labels as JSON with sorted keys."""

INTERVAL = timedelta(seconds=1)
"""The longest time for which a count is kept only in a process's memory."""

log = get_logger(__name__)

# The rows are locked in the order of their keys. Two processes that add to the same rows therefore never deadlock.
_ADD = text("""
    INSERT INTO metric_totals AS t (sample, labels, value)
    SELECT * FROM unnest(CAST(:samples AS text[]), CAST(:labels AS text[]), CAST(:values AS double precision[]))
     ORDER BY 1, 2
    ON CONFLICT (sample, labels) DO UPDATE SET value = t.value + excluded.value
    RETURNING sample, labels, value
""")
# Counts only grow. Our transaction was committed if the stored totals have reached the totals that it wrote. The check
# is wrong only if our counts were lost but another process added at least as many.
_ADDED = text("""
    SELECT count(t.value) = count(*) AND bool_and(t.value >= b.value)
      FROM unnest(CAST(:samples AS text[]), CAST(:labels AS text[]), CAST(:values AS double precision[]))
           AS b(sample, labels, value)
      LEFT JOIN metric_totals t USING (sample, labels)
""")
_READ = text("SELECT sample, labels, value FROM metric_totals")


def read(connection: Connection) -> dict[Sample, float]:
    """Return the sums of all processes' counters."""
    return {(row.sample, row.labels): row.value for row in connection.execute(_READ)}


def counted() -> dict[Sample, float]:
    """Return what this process has counted since it started."""
    return {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in metrics.COUNTED.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def _add(new: Mapping[Sample, float], connection: Connection) -> None:
    sums = {(row.sample, row.labels): row.value for row in connection.execute(_ADD, _parameters(new))}
    ask_if_lost(connection, lambda asked: bool(asked.scalar(_ADDED, _parameters(sums))))


def _parameters(values: Mapping[Sample, float]) -> dict[str, object]:
    return {
        "samples": [name for name, _ in values],
        "labels": [labels for _, labels in values],
        "values": list(values.values()),
    }


class CounterTotals:
    """Adds this process's counts to the stored sums, in a separate thread."""

    def __init__(self, engine: Engine) -> None:
        """Prepare the totals of one database; `start` starts the thread."""
        self._engine = engine
        self._added: dict[Sample, float] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="totals", daemon=True)

    def start(self) -> None:
        """Start the thread that adds new counts to the totals once per `INTERVAL`."""
        self._thread.start()

    def stop(self) -> None:
        """Add the remaining counts to the totals and stop the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
            self._try_to_add()

    def add(self) -> None:
        """Add all new counts to the totals. If a database error is raised, no count is lost."""
        with self._lock:
            now = counted()
            new = {sample: more for sample, value in now.items() if (more := value - self._added.get(sample, 0.0))}
            if new:
                transact(self._engine, partial(_add, new))
                self._added = now

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL.total_seconds()):
            self._try_to_add()

    def _try_to_add(self) -> None:
        try:
            self.add()
        except SQLAlchemyError as error:
            log.debug("counts_kept_back", error=type(error).__name__)

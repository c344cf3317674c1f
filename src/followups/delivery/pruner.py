"""The pruner deletes old rows hourly, in small batches, while all other work continues.

`BackgroundThread` is also the base class of the bulk runner.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.delivery import events
from followups.store import audit, pruning
from followups.store.bulk_cancel import now
from followups.store.pruning import OLDEST
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings


BUDGET = timedelta(minutes=2)
"""Maximum time that one run spends on deleting rows of one table. The next run continues where this run stopped."""

LOCK = 0x7469_6479
"""Key of the advisory lock that lets only one worker prune ("tidy" in ASCII)."""

LEAST_PAUSE = 0.01

log = get_logger(__name__)


class BackgroundThread(ABC):
    """A thread that runs only while there is work. If the thread is already running, starting it has no effect."""

    name: str

    def __init__(self) -> None:
        """Prepare the thread, but do not start it."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the work in a thread unless the thread is already running, and return immediately."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the current batch; another process or a later run does the remaining work."""
        self._stopping.set()
        if self._thread and self._thread.is_alive():
            self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Do the work until it is finished or `stop` is called. Errors are reported, never raised."""


class Pruner(BackgroundThread):
    """Deletes old rows in a thread of a worker process."""

    name = "pruner"

    def __init__(self, settings: Settings, engine: Engine) -> None:
        """Store the settings and the engine without starting a thread."""
        super().__init__()
        self._settings = settings
        self._engine = engine
        self._message = OLDEST
        """The position at which the last scan of chat messages ended."""

    def _run(self) -> None:
        try:
            self.prune()
        except Exception as error:  # noqa: BLE001 - the next run tries again, whatever it was
            events.failed("tidy", error, self._engine)

    def prune(self) -> dict[str, int]:
        """Delete old rows until none is left or the time is up; return the number of deleted rows per table."""
        started = time.monotonic()
        removed: dict[str, int] = {}
        with self._engine.connect() as connection, _alone(connection) as alone:
            if not alone:
                return removed
            self._record_expired_keys(connection)
            for name, step in self._steps(connection).items():
                removed[name] = self._repeat(connection, step)
        if any(removed.values()):
            log.info("removed_old", **removed, duration_ms=round((time.monotonic() - started) * 1000, 2))
        return removed

    def _record_expired_keys(self, connection: Connection) -> None:
        kept = self._settings.audit_retention
        with connection.begin():
            audit.record_expired_keys(connection, now(connection) - kept if kept else OLDEST.created_at)

    def _steps(self, connection: Connection) -> dict[str, Callable[[Connection], int | None]]:
        """For each table, return a function that deletes one batch of its rows.

        Each function returns the size of its batch, or None if no old row is left.
        """
        steps: dict[str, Callable[[Connection], int | None]] = {
            "idempotency_keys": lambda opened: pruning.delete_expired_keys(opened) or None
        }
        moment = now(connection)
        connection.rollback()
        if self._settings.audit_retention:
            oldest = moment - self._settings.audit_retention
            steps["audit_events"] = lambda opened: audit.delete_old(opened, oldest, pruning.BATCH) or None
        if self._settings.retention:
            before = moment - self._settings.retention
            steps["follow_ups"] = lambda opened: pruning.delete_finished(opened, before) or None
            steps["chat_messages"] = lambda opened: self._messages(opened, before)
        return steps

    def _messages(self, connection: Connection, before: datetime) -> int | None:
        number, ended = pruning.delete_messages(connection, before, self._message)
        self._message = ended or OLDEST
        return number if ended else None

    def _repeat(self, connection: Connection, step: Callable[[Connection], int | None]) -> int:
        total, deadline = 0, time.monotonic() + BUDGET.total_seconds()
        while not self._stopping.is_set() and time.monotonic() < deadline:
            began = time.monotonic()
            with connection.begin():
                number = step(connection)
            if number is None:
                break
            total += number
            # After each batch, the pruner pauses for as long as the batch took. At least half of the disk's capacity
            # remains for deliveries.
            self._stopping.wait(max(time.monotonic() - began, LEAST_PAUSE))
        return total


@contextmanager
def _alone(connection: Connection) -> Iterator[bool]:
    """Try to lock out other pruning workers until this run ends; return whether this succeeded."""
    alone = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK}))
    connection.commit()
    try:
        yield alone
    finally:
        if alone and not connection.invalidated:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK})
            connection.commit()

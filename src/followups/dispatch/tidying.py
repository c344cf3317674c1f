"""Tidying up: what is old is removed, once an hour, a little at a time, and beside all other work."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.dispatch import report
from followups.store import retention
from followups.store.cancelling import now
from followups.store.retention import OLDEST
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings

BUDGET = timedelta(minutes=2)
"""How long one run may remove rows of one kind; the next goes on where it ended."""

LOCK = 0x7469_6479
"""Key of the advisory lock by which only one of all workers tidies up ("tidy" in ASCII)."""

LEAST_PAUSE = 0.01

log = get_logger(__name__)


class Tidier:
    """One thread in a worker process, while there is something to do. A call while it runs does nothing."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        """Take what it needs; nothing runs yet."""
        self._settings = settings
        self._engine = engine
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._message = OLDEST
        """Where the last look at chat messages ended."""

    def start(self) -> None:
        """Tidy up once, from a thread. Returns at once."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="tidier", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the batch that is under way."""
        self._stopping.set()
        if self._thread and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self.tidy()
        except Exception as error:  # noqa: BLE001 - the next run tries again, whatever it was
            report.failed("tidy", error, self._engine)

    def tidy(self) -> dict[str, int]:
        """Remove what is old, until there is no more or the time is up; return how many of each."""
        started = time.monotonic()
        removed: dict[str, int] = {}
        with self._engine.connect() as connection, _alone(connection) as alone:
            if not alone:
                return removed
            for name, step in self._steps(connection).items():
                removed[name] = self._repeat(connection, step)
        if any(removed.values()):
            log.info("removed_old", **removed, duration_ms=round((time.monotonic() - started) * 1000, 2))
        return removed

    def _steps(self, connection: Connection) -> dict[str, Callable[[Connection], int | None]]:
        """Return what removes one batch of each kind, and says how many; None, when there is no more."""
        steps: dict[str, Callable[[Connection], int | None]] = {
            "idempotency_keys": lambda opened: retention.delete_expired_keys(opened) or None
        }
        if self._settings.retention:
            before = now(connection) - self._settings.retention
            connection.rollback()
            steps["follow_ups"] = lambda opened: retention.delete_finished(opened, before) or None
            steps["chat_messages"] = lambda opened: self._messages(opened, before)
        return steps

    def _messages(self, connection: Connection, before: datetime) -> int | None:
        number, ended = retention.delete_messages(connection, before, self._message)
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
            # As long as it took: half of what a disk can do is left to those who send.
            self._stopping.wait(max(time.monotonic() - began, LEAST_PAUSE))
        return total


@contextmanager
def _alone(connection: Connection) -> Iterator[bool]:
    """Say whether no other worker tidies up, and keep others from it meanwhile."""
    alone = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK}))
    connection.commit()
    try:
        yield alone
    finally:
        if alone and not connection.invalidated:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK})
            connection.commit()

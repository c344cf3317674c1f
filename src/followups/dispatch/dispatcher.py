"""The tick: claim and publish until nothing more is due, or the next tick takes over."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from followups.dispatch import report
from followups.dispatch.claim import claim
from followups.dispatch.publish import batches
from followups.store import leases

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from followups.dispatch.publish import Hint
    from followups.settings import Settings

PAUSE = 0.01
"""Seconds before looking again when all that may be in flight is; doubles up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 0.2


class Dispatcher:
    """One in each worker process. Ticks and nudges that come while one runs are folded into it."""

    def __init__(self, settings: Settings, engine: Engine, publish: Callable[[Hint], None]) -> None:
        """``publish`` hands one hint to the broker, and raises when it can't."""
        self._settings = settings
        self._engine = engine
        self._publish = publish
        self._running = threading.Lock()
        self._wanted = threading.Event()

    def run(self) -> int:
        """Tick once; return how many follow-ups were claimed. Raises what the database and the broker raise."""
        self._wanted.set()
        total = 0
        # Looked at again after the lock is free: a nudge that comes in between must not be lost.
        while self._wanted.is_set() and self._running.acquire(blocking=False):
            try:
                total += self._drain_due()
            finally:
                self._running.release()
        return total

    def _drain_due(self) -> int:
        total, pause = 0, PAUSE
        deadline = time.monotonic() + self._settings.tick_interval.total_seconds()
        while True:
            self._wanted.clear()
            count, more = self._claim_and_publish()
            total += count
            if not more or time.monotonic() >= deadline:
                return total
            pause = PAUSE if count else min(pause * 2, LONGEST_PAUSE)
            if not count:
                self._wanted.wait(pause)

    def _claim_and_publish(self) -> tuple[int, bool]:
        started = time.perf_counter()
        claimed = claim(self._engine, self._settings)
        report.claimed(claimed, time.perf_counter() - started)
        size = self._settings.batch_size
        for number, hint in enumerate(batches(claimed.leases, size)):
            try:
                self._publish(hint)
            except Exception:
                # What was not published goes back at once, and not only when its lease ends.
                with self._engine.begin() as connection:
                    leases.release_if_not_begun(connection, claimed.leases[number * size :])
                raise
        return len(claimed.leases), claimed.more

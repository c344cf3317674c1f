"""Every few seconds, a worker reads the database's clock and the rate limits again."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from followups.delivery import events
from followups.transactions import in_loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.delivery.clock import DatabaseClock
    from followups.flow_control.limiter import RateLimits

INTERVAL = 5.0
"""Seconds between two queries for the database's clock and the rate limits."""
FIRST_SAMPLES = 5
"""Number of clock samples taken at the start."""
CLOCK_OFF = 60.0
"""Seconds by which the clocks of this host and the database may differ without a warning."""
BACKOFF = timedelta(seconds=0.5)
"""The first pause after the database has been found unreachable. Each further pause is twice as long, up to
`LONGEST_BACKOFF`.
"""
LONGEST_BACKOFF = timedelta(seconds=4)


class Upkeep:
    """Keeps the clock and the rate limits of one worker up to date."""

    def __init__(self, engine: AsyncEngine, clock: DatabaseClock, rate_limits: RateLimits) -> None:
        """Store the engine, the clock and the rate limits."""
        self._engine = engine
        self._clock = clock
        self._rate_limits = rate_limits

    async def start(self, stopping: Callable[[], bool]) -> bool:
        """Read the clock and the rate limits for the first time; return whether this succeeded.

        The result is false only if ``stopping`` returned true before the database could be reached.
        """
        return await repeat_until_done(
            self._engine, lambda engine: self._clock.ask(engine, times=FIRST_SAMPLES), "clock", stopping
        ) and await repeat_until_done(self._engine, self._rate_limits.read, "limits", stopping)

    async def run(self) -> None:
        """Read the clock and the rate limits repeatedly, until cancelled.

        If this host's clock differs too much from the database's, one warning is logged.
        """
        was_off = False
        while True:
            ahead = (datetime.now(UTC) - self._clock.now()).total_seconds()
            is_off = abs(ahead) > CLOCK_OFF
            if is_off and not was_off:
                events.clock_off(ahead)
            was_off = is_off
            await asyncio.sleep(INTERVAL)
            await repeat_until_done(self._engine, self._clock.ask, "clock")
            await repeat_until_done(self._engine, self._rate_limits.read, "limits")


async def repeat_until_done(
    engine: AsyncEngine, work: Callable[[Engine], object], step: str, stopping: Callable[[], bool] = lambda: False
) -> bool:
    """Repeat the work while the database is unreachable; return whether the work succeeded.

    Once ``stopping`` returns true, the work is not repeated.
    """
    backoff = BACKOFF
    while True:
        try:
            await in_loop(engine, work)
        except (DBAPIError, PoolTimeoutError) as error:
            events.failed(step, error, engine.sync_engine)
        else:
            events.succeeded(step)
            return True
        if stopping():
            return False
        await asyncio.sleep(backoff.total_seconds())
        backoff = min(backoff * 2, LONGEST_BACKOFF)

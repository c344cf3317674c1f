"""Deferral: what the breaker holds does not fill the window of what may be in flight, so others are claimed.

Each worker keeps a few leases of the held workspaces, to probe with. It defers the others in their rows. That uses up
no attempt, and a cancel still reaches them. When a worker has none left, or the transport recovers, the first deferred
fall due again. When their workspace is held no more, all of them do. Otherwise they come back by themselves, after some
minutes and one by one: the workers may have forgotten them.
"""

from __future__ import annotations

import time
from datetime import timedelta
from math import inf
from typing import TYPE_CHECKING

from followups.dispatch import report
from followups.dispatch.limits import LONGEST
from followups.dispatch.line import AGAIN
from followups.store import rate_limits
from followups.transactions import in_loop, transact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.dispatch.breaker import Breaker
    from followups.dispatch.lanes import Hinted
    from followups.dispatch.line import Line
    from followups.settings import Settings
    from followups.store.leases import Lease

SHARE = 32
"""One worker asks for a 32nd of the window at once, or for as many as it has slots. It keeps at most twice as many."""
DEFER_SIZE = 500
"""Rows of one statement at most."""
BUSY = 0.5
"""The pause between two portions is twice what the last one took: others' begins must not wait for the database."""
SOONEST = LONGEST / 2
SPREAD = 10_000
"""How many one worker defers at once until two thirds of the other half are filled."""
COMING = 0.25
"""Seconds that what was freed may take until a worker has it; only then more is freed."""
BACKOFF = 1.0
"""Seconds for which a database that does not answer is left alone; no pause is longer."""


class Returns:
    """When the deferred come back: in the order in which they were deferred, and never all at once.

    The first are 15 ms apart. The more have been deferred, the closer they come, so that however many there are none
    waits longer than `LONGEST`.

    >>> returns = Returns()
    >>> [round(returns.next(now=0.0), 3) for _ in range(3)]
    [150.015, 150.03, 150.045]
    >>> [round(returns.next(now=0.0)) for _ in range(20_000)][9_999::10_000]
    [245, 280]
    """

    def __init__(self) -> None:
        """Nothing is deferred yet."""
        self._last = -inf

    def next(self, now: float) -> float:
        """Return the seconds after which the next one comes back; ``now`` is on the monotonic clock."""
        ahead = max(SOONEST.total_seconds(), self._last - now)
        ahead += (LONGEST.total_seconds() - ahead) / SPREAD
        self._last = now + ahead
        return ahead


class Deferral:
    """Keeps a few of what is held in the line, and the rest in its rows. Of one event loop."""

    def __init__(
        self, settings: Settings, engine: AsyncEngine, line: Line, breaker: Breaker, nudge: Callable[[], None]
    ) -> None:
        """``nudge`` is called when something that was deferred falls due."""
        self._engine = engine
        self._line = line
        self._breaker = breaker
        self._nudge = nudge
        self._most = max(1, min(settings.concurrency, settings.max_in_flight // SHARE))
        self._returns = Returns()
        self._free_again_at = -inf
        self._excess: list[Hinted] = []
        """Taken out of the line, and not deferred yet."""
        self._held: frozenset[int] = frozenset()
        self._released: frozenset[int] = frozenset()
        """Lanes that are held no more, and of which not everything has been freed yet."""

    async def balance(self) -> float | None:
        """Defer a portion of what the line has too much of, and free what it has room for, or is held no more.

        Return after how many seconds to call this again, or None if there is nothing more to do for now.
        """
        held = self._breaker.left_alone
        self._released = (self._released | self._held) - held
        self._held = held
        for one in self._excess:
            if one.lease.lane not in held:
                self._line.put_off(one, timedelta(0))
        self._excess = [one for one in self._excess if one.lease.lane in held] + self._line.shed(held, self._most * 2)
        started = time.monotonic()
        try:
            await self._defer()
            if self._has_room(held):
                self._free_again_at = time.monotonic() + COMING
                await self._free(held, self._most)
            if self._released and not await self._free(self._released, rate_limits.BATCH):
                self._released = frozenset()
        except Exception as error:  # noqa: BLE001 - whatever it was, the pump must go on
            report.failed("defer", error, self._engine.sync_engine)
            return BACKOFF
        if not self._excess and not self._released:
            return None
        return min((time.monotonic() - started) / BUSY, BACKOFF)

    def clear(self) -> list[Lease]:
        """Return the leases that were to be deferred, and forget them."""
        leases = [one.lease for one in self._excess]
        self._excess.clear()
        return leases

    def _has_room(self, held: frozenset[int]) -> bool:
        few = self._most // 2 if self._breaker.recovers else 0
        return bool(held) and self._line.count(held) <= few and time.monotonic() >= self._free_again_at

    async def _defer(self) -> None:
        now, portion = time.monotonic(), self._excess[:DEFER_SIZE]
        if not portion:
            return
        waits = [(one.lease, timedelta(seconds=self._returns.next(now))) for one in portion]
        deferred = await in_loop(self._engine, _defer, waits)
        del self._excess[: len(portion)]
        for one in portion:
            if one.lease.id not in deferred:  # its row is locked, or the lease is another's by now
                self._line.put_off(one, AGAIN)

    async def _free(self, lanes: frozenset[int], most: int) -> int:
        freed = await in_loop(self._engine, _free, lanes, most)
        if freed:
            self._nudge()
        return freed


def _defer(engine: Engine, waits: Sequence[tuple[Lease, timedelta]]) -> set[UUID]:
    return transact(engine, lambda connection: rate_limits.put_off_if_leased(connection, waits))


def _free(engine: Engine, lanes: frozenset[int], most: int) -> int:
    return transact(engine, lambda connection: rate_limits.free_lanes(connection, lanes, LONGEST, most))

"""Defers follow-ups of workspaces whose breaker has tripped, to make room in the in-flight window.

Each worker keeps a few leases of the tripped workspaces as probes. All other follow-ups of tripped workspaces are
deferred in the database, or end if they can no longer be sent. A deferral is not an attempt, and a deferred follow-up
can still be cancelled. When the
transport recovers, or a worker needs further probes, deferrals are ended, earliest first. When a workspace is no longer
tripped, all its deferred follow-ups fall due. Every deferral ends after some minutes at the latest. Deferrals need a
time limit, because a restarted worker has no record of its deferrals.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from math import inf
from typing import TYPE_CHECKING

from followups.delivery import events
from followups.delivery.begin import end_hold_or_park
from followups.delivery.due_queue import RETRY_DELAY
from followups.flow_control.limiter import LONGEST_DEFERRAL, defer, limitable_of
from followups.store import rate_limits
from followups.store.leases import key_of
from followups.store.settlement import ENDED_MARGIN
from followups.transactions import in_loop, transact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.delivery.attempts import BatchResult
    from followups.delivery.due_queue import DueQueue
    from followups.flow_control.breaker import Breaker
    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.store.rate_limits import Limitable

SHARE = 1024
"""A worker requests 1/`SHARE` of the in-flight limit, but at most one lease per slot.

A worker never holds more leases than two requests can return. A hundred workers together keep at most a fifth of the
in-flight limit. All workers together need only three follow-ups for a probe.
"""
SHARE_WHILE_RECOVERING = 128
"""During recovery, a worker requests 1/128 of the in-flight limit at a time.

With the default window, each worker can release 156 follow-ups a second during recovery.
"""
DEFER_SIZE = 500
"""The largest number of follow-ups that one statement defers."""
BUSY = 0.5
"""The duration of a batch of deferrals, divided by the pause after the batch.

Without the pause between batches, other workers' begin statements would wait for the database.
"""
SOONEST = LONGEST_DEFERRAL / 2
SPREAD = 10_000
"""Number of simultaneous deferrals that fill two thirds of the time between `SOONEST` and `LONGEST_DEFERRAL`."""
COMING = 0.25
"""Seconds that released follow-ups have to reach a worker before more are released."""
BACKOFF = 1.0
"""Seconds to wait if the database does not answer. `BACKOFF` is also the longest pause after a batch."""


class ReturnTimes:
    """Makes deferred follow-ups fall due at different times, in the order of their deferral.

    At first, successive return times are 15 ms apart. The more follow-ups are deferred, the closer together the return
    times are. No follow-up is deferred for longer than `LONGEST_DEFERRAL`.

    >>> returns = ReturnTimes()
    >>> [round(returns.next(now=0.0), 3) for _ in range(3)]
    [150.015, 150.03, 150.045]
    >>> [round(returns.next(now=0.0)) for _ in range(20_000)][9_999::10_000]
    [245, 280]
    """

    def __init__(self) -> None:
        """Start without deferred follow-ups."""
        self._last = -inf

    def next(self, now: float) -> float:
        """Return the number of seconds until the next deferred follow-up falls due.

        ``now`` is a reading of the monotonic clock.
        """
        ahead = max(SOONEST.total_seconds(), self._last - now)
        ahead += (LONGEST_DEFERRAL.total_seconds() - ahead) / SPREAD
        self._last = now + ahead
        return ahead


class Deferral:
    """Keeps a few leases of tripped workspaces, and defers their other follow-ups.

    An instance belongs to one event loop.
    """

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        queue: DueQueue,
        breaker: Breaker,
        nudge: Callable[[], None],
        not_begun: Callable[[BatchResult], None],
    ) -> None:
        """``nudge`` is called when a deferred follow-up falls due, ``not_begun`` when follow-ups have ended."""
        self._engine = engine
        self._queue = queue
        self._breaker = breaker
        self._nudge = nudge
        self._not_begun = not_begun
        self._settings = settings
        self._returns = ReturnTimes()
        self._release_again_at = -inf
        self._excess: list[Lease] = []
        """Leases that were taken out of the due queue and must still be deferred."""
        self._tripped: frozenset[int] = frozenset()
        self._recovered: frozenset[int] = frozenset()
        """Workspaces that are no longer tripped, but still have deferred follow-ups."""
        self._workspaces: dict[int, list[UUID]] = {}
        """Caches the workspaces of tripped and recovered keys, because searching for many of them is slow."""
        self._wanted = asyncio.Event()
        self._closed = False

    async def run(self) -> None:
        """Until `close`, call `balance`; then wait for the pause it returns, or else for `check_again`."""
        while not self._closed:
            self._wanted.clear()
            pause = await self.balance()
            await (self._wanted.wait() if pause is None else asyncio.sleep(pause))

    def check_again(self) -> None:
        """Wake `run`, because the queue or the breaker has changed."""
        self._wanted.set()

    def close(self) -> None:
        """Make the method `run` return."""
        self._closed = True
        self._wanted.set()

    @property
    def _most(self) -> int:
        share = SHARE_WHILE_RECOVERING if self._breaker.is_recovering else SHARE
        return max(1, min(self._settings.concurrency, self._settings.max_in_flight // share))

    async def balance(self) -> float | None:
        """Defer some excess leases of the due queue, and release deferred follow-ups.

        Follow-ups are released if the due queue has room, or if their workspace recovers. Return the seconds until the
        next call, or None if no call is needed.
        """
        tripped = self._breaker.tripped_in_redis
        self._recovered = (self._recovered | self._tripped) - tripped
        self._tripped = tripped
        for lease in self._excess:
            if lease.key not in tripped:
                self._queue.defer(lease, timedelta(0))
        excess = [lease for lease in self._excess if lease.key in tripped]
        self._excess = excess + self._queue.shed(tripped, self._most * 2)
        started = time.monotonic()
        try:
            await self._defer()
            if self._has_room(tripped):
                self._release_again_at = time.monotonic() + COMING
                await self._release(tripped, self._most)
            if self._recovered and not await self._release(self._recovered, rate_limits.BATCH):
                self._recovered = frozenset()
        except Exception as error:  # noqa: BLE001 - whatever it was, the loop must go on
            events.failed("defer", error, self._engine.sync_engine)
            return BACKOFF
        if not self._excess and not self._recovered:
            return None
        return min((time.monotonic() - started) / BUSY, BACKOFF)

    def clear(self) -> list[Lease]:
        """Remove and return the leases that are waiting to be deferred."""
        leases, self._excess = self._excess, []
        return leases

    def _has_room(self, tripped: frozenset[int]) -> bool:
        few = self._most // 2 if self._breaker.is_recovering else 0
        return bool(tripped) and self._queue.count(tripped) <= few and time.monotonic() >= self._release_again_at

    async def _defer(self) -> None:
        now, portion = time.monotonic(), self._excess[:DEFER_SIZE]
        if not portion:
            return
        known = {one.id: one for one in await in_loop(self._engine, limitable_of, self._settings, portion)}
        # Ending a follow-up needs no permit. Those that have become too late would otherwise wait for one, or would be
        # deferred again and again.
        over = {one.id for one in known.values() if one.is_over}
        if over:
            ending = [lease for lease in portion if lease.id in over]
            self._not_begun(await in_loop(self._engine, end_hold_or_park, self._settings, ending))
        waits = [(lease, self._wait(now, known.get(lease.id))) for lease in portion if lease.id not in over]
        deferred = await in_loop(self._engine, defer, waits) if waits else set()
        del self._excess[: len(portion)]
        for lease, _ in waits:
            if lease.id not in deferred:  # the follow-up's row is locked, or another worker has leased it
                self._queue.defer(lease, RETRY_DELAY)

    def _wait(self, now: float, one: Limitable | None) -> timedelta:
        wait = timedelta(seconds=self._returns.next(now))
        return wait if one is None or one.left is None else min(wait, one.left + ENDED_MARGIN)

    async def _release(self, keys: frozenset[int], most: int) -> int:
        if keys - self._workspaces.keys():
            self._workspaces = await in_loop(self._engine, _workspaces, self._tripped | self._recovered)
        ids = [one for key in keys for one in self._workspaces[key]]
        released = await in_loop(self._engine, _release, ids, most)
        if released:
            self._nudge()
        return released


def _workspaces(engine: Engine, keys: frozenset[int]) -> dict[int, list[UUID]]:
    found: dict[int, list[UUID]] = {key: [] for key in keys}
    with engine.connect() as connection:
        for workspace_id in rate_limits.workspaces_of(connection, keys):
            found[key_of(workspace_id)].append(workspace_id)
    return found


def _release(engine: Engine, workspace_ids: Sequence[UUID], most: int) -> int:
    return transact(
        engine, lambda connection: rate_limits.release_workspaces(connection, workspace_ids, LONGEST_DEFERRAL, most)
    )

"""The due queue: leases by due time. Workspaces with due leases take turns.

The due queue does no I/O. Only one event loop may use a due queue.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import timedelta
from typing import TYPE_CHECKING

from followups.delivery.fair_queue import FairQueue
from followups.store.leases import Lease
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Iterable

    from followups.delivery.clock import DatabaseClock
    from followups.delivery.fair_queue import Entry
    from followups.delivery.slots import Slots
    from followups.flow_control.breaker import Breaker

LEAD = timedelta(milliseconds=15)
"""Follow-ups begin this much earlier than their due time, so that they are sent on time.

A cancel that arrives after begin is too late.
"""
BEGIN_BATCH = 200
"""The largest number of leases in one batch. A statement for more leases would take longer without saving time per row.
"""
GATHER = timedelta(milliseconds=5)
"""How long to wait for more free slots or due follow-ups if only a few are available. A statement for five rows costs
almost as much as a statement for fifty. `GATHER` is a third of `LEAD`.
"""
ENOUGH_SLOTS = 0.95
"""If more leases are due than slots are free, the next batch waits `GATHER` while less than this share of all slots is
free. With 0.4 instead of 0.75, a follow-up took a sixth more processor time; with 0.95, batches are larger still.
"""
RETRY_DELAY = timedelta(milliseconds=50)
"""Delay before a retry of begin or settle; doubled after each failed begin."""
LONGEST_RETRY_DELAY = timedelta(milliseconds=800)


class DueQueue:
    """Holds the leases whose attempts begin next.

    Expired leases are dropped without a log line, because a tick leases the follow-ups again.
    """

    def __init__(self, clock: DatabaseClock, lease: timedelta, slots: Slots) -> None:
        """``lease`` is the duration of a lease."""
        self.slots = slots
        self.changed = asyncio.Event()
        """An event that is set when there may be leases to take."""
        self._clock = clock
        self._lease = lease.total_seconds()
        self._heap: list[Entry] = []
        """A heap of the leases that are not due yet."""
        self._fair = FairQueue(slots)
        self._sequence = itertools.count()
        self._next_expiry_check = 0.0
        self._closed = False

    def add(self, leases: Iterable[Lease], task_id: str = "") -> None:
        """Enqueue new leases together with the id of the Celery task whose hint contained them."""
        now, known = uptime(), self._clock.known
        if now >= self._next_expiry_check:
            # While the breaker is open, leases stay in the due queue. When leases expire there, a tick claims their
            # follow-ups again, and the new leases are enqueued.
            self._next_expiry_check = now + self._lease
            self._fair.drop_expired(now)
        moment = self._clock.now() if known else None
        for new in leases:
            ahead = max(self._clock.until(new.due), 0.0) if moment and new.due > moment else 0.0
            # Calling the method _replace here would take four times as long.
            lease = Lease(new.id, new.token, new.due, new.losses, new.key, task_id, now + ahead + self._lease)
            self._fair.note_arrival(lease.key, now)
            entry = (lease.due, next(self._sequence), lease)
            if known and not ahead:
                self._fair.add(entry)
            else:
                heapq.heappush(self._heap, entry)
        self.changed.set()

    def defer(self, lease: Lease, delay: timedelta) -> None:
        """Put a lease back into the due queue, to be taken after a delay."""
        moment = max(self._clock.now() + delay, lease.due)
        heapq.heappush(self._heap, (moment, next(self._sequence), lease))

    def defer_refused(self, lease: Lease) -> None:
        """Defer a follow-up that could not begin; the delay doubles with each further refusal."""
        delay = min(RETRY_DELAY * 2**lease.refusals, LONGEST_RETRY_DELAY)
        self.defer(lease._replace(refusals=min(lease.refusals + 1, 10)), delay)

    async def next_batch(self, breaker: Breaker) -> list[Lease]:
        """Wait for due leases and free slots; return no leases once the queue is closed."""
        while not self._closed:
            await self._gather()
            if self._closed:
                break
            if batch := self.take(BEGIN_BATCH, breaker.tripped, breaker.permits):
                return batch
            await self._until_changed(breaker.tripped if not breaker.permits else frozenset())
        return []

    def take(self, most: int, tripped: frozenset[int] = frozenset(), permits: int = 0) -> list[Lease]:
        """Dequeue up to ``most`` due leases, acquire a slot for each, and return the leases.

        Leases of possible poison pills are taken only within their quota. At most ``permits`` leases of ``tripped``
        workspaces are taken.
        """
        horizon, now, most = self._clock.now() + LEAD, uptime(), min(most, self.slots.free)
        taken: dict[object, Lease] = {}
        not_now: list[Lease] = []
        while self._heap and self._heap[0][0] <= horizon:
            self._fair.add(heapq.heappop(self._heap))
        while len(taken) < most and (lease := self._fair.next(tripped if permits <= 0 else frozenset())):
            if lease.expires < now:
                continue
            if lease.id in taken or not self.slots.acquire(lease):
                not_now.append(lease)
                continue
            taken[lease.id] = lease
            permits -= lease.key in tripped
        for lease in not_now:
            self.defer(lease, RETRY_DELAY)
        return list(taken.values())

    def close(self) -> None:
        """Close the queue: `next_batch` returns nothing from now on."""
        self._closed = True
        self.changed.set()

    def count(self, keys: frozenset[int]) -> int:
        """Return the number of due leases in these workspace queues."""
        return self._fair.count(keys)

    def shed(self, keys: frozenset[int], most: int) -> list[Lease]:
        """Keep at most ``most`` due leases; remove the others and return them, earliest first.

        Only workspace queues whose key is in ``keys`` are considered.
        """
        return self._fair.shed(keys, most)

    def seconds_to_next(self, tripped: frozenset[int] = frozenset()) -> float | None:
        """Return the seconds until the next lease is due, or None if the queue is empty.

        The result is negative if a lease is overdue. Due leases of ``tripped`` workspaces are ignored.
        """
        if self._fair.has_turn(tripped):
            return -LEAD.total_seconds()
        # A hint may contain the earliest representable time, because anyone with broker access can write hints.
        # Subtracting the lead from the earliest representable time would overflow.
        return self._clock.until(self._heap[0][0]) - LEAD.total_seconds() if self._heap else None

    def is_due(self) -> bool:
        """Return whether any lease could be taken now."""
        return self._fair.has_turn() or (bool(self._heap) and self._heap[0][0] <= self._clock.now() + LEAD)

    def clear(self) -> list[Lease]:
        """Empty the queue and return its leases."""
        leases = [lease for _, _, lease in self._heap]
        self._heap.clear()
        return [*leases, *self._fair.clear()]

    async def _gather(self) -> None:
        """Wait for more free slots or due follow-ups, so that the next batch is larger.

        The wait lasts at most `GATHER`.
        """
        if not self.is_due():
            return
        if 0 < self.slots.free < min(ENOUGH_SLOTS * self.slots.number, len(self._fair)):
            await asyncio.sleep(GATHER.total_seconds())
        elif (delay := self.seconds_to_next()) and (room := delay + GATHER.total_seconds()) > 0:
            await asyncio.sleep(room)

    async def _until_changed(self, tripped: frozenset[int]) -> None:
        self.changed.clear()
        timer = None
        delay = self.seconds_to_next(tripped)
        if delay is not None and self.slots.free:
            timer = asyncio.get_running_loop().call_later(max(delay, 0.001), self.changed.set)
        await self.changed.wait()
        if timer:
            timer.cancel()

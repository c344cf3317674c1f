"""The due queue: leases ordered by the moment each may begin, in front of the slots. For one event loop; no I/O."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from followups.delivery.begin import LEAD
from followups.delivery.fair_queue import Hinted, Lanes
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from uuid import UUID

    from followups.delivery.clock import DatabaseClock
    from followups.store.leases import Lease

AGAIN = timedelta(milliseconds=50)
"""Delay before the next try to begin or settle a follow-up; for a begin the delay doubles each time."""
LONGEST_AGAIN = timedelta(milliseconds=800)

SUSPECTS = 16
"""How many follow-ups with one lost lease may be in flight at once; one with two lost leases goes without any other.

One of them may be a poison pill, which kills its worker together with everything in flight beside it. Of some hundred
that are lost together, at most 16 are lost again, and none of these for the third time, which would end it.
"""


class Line:
    """What may begin next: follow-ups whose moment has come, in turns between workspaces.

    A lease that runs out here is dropped without a log line: a tick has taken it over, or will.
    """

    def __init__(self, clock: DatabaseClock, lease: timedelta, slots: int) -> None:
        """``lease`` is the duration of a lease, ``slots`` how many may be in flight at once."""
        self._clock = clock
        self._lease = lease.total_seconds()
        self._heap: list[tuple[datetime, int, Hinted]] = []
        """Those whose moment is still to come."""
        self._lanes = Lanes(slots)
        self._sequence = itertools.count()
        self._next_look = 0.0
        self._suspects: dict[UUID, int] = {}
        """Possible poison pills in flight, with the share of the quota that each takes."""

    def add(self, leases: Iterable[Lease], task_id: str = "") -> None:
        """Enqueue new leases, with the task that brought them."""
        now, known = uptime(), self._clock.known
        if now >= self._next_look:
            # Nothing is taken while the breaker is open, and each tick brings expired leases anew.
            self._next_look = now + self._lease
            self._lanes.drop_expired(now)
        for lease in leases:
            ahead = max(self._clock.until(lease.due), 0.0) if known else 0.0
            self._lanes.see(lease.lane, now)
            place = (lease.due, next(self._sequence), Hinted(lease, task_id, now + ahead + self._lease))
            if known and not ahead:
                self._lanes.add(place)
            else:
                heapq.heappush(self._heap, place)

    def put_off(self, hinted: Hinted, delay: timedelta) -> None:
        """Defer one by a delay."""
        moment = max(self._clock.now() + delay, hinted.lease.due)
        heapq.heappush(self._heap, (moment, next(self._sequence), hinted))

    def defer_again(self, hinted: Hinted) -> None:
        """Defer a follow-up that could not begin at this moment, longer each time."""
        delay = min(AGAIN * 2**hinted.refusals, LONGEST_AGAIN)
        self.put_off(replace(hinted, refusals=min(hinted.refusals + 1, 10)), delay)

    def take(self, most: int, held: frozenset[int] = frozenset(), permits: int = 0) -> list[Hinted]:
        """Take up to ``most`` whose moment has come, each for a slot; of possible poison pills only their quota.

        Of ``held`` workspaces it takes no more than there are ``permits``.
        """
        horizon, now = self._clock.now() + LEAD, uptime()
        room = SUSPECTS - sum(self._suspects.values())
        taken: dict[UUID, Hinted] = {}
        not_now: list[Hinted] = []
        while self._heap and self._heap[0][0] <= horizon:
            self._lanes.add(heapq.heappop(self._heap))
        while len(taken) < most and (hinted := self._lanes.next(held if permits <= 0 else frozenset())):
            if hinted.expires < now:
                continue
            weight = _weight(hinted)
            if hinted.lease.id in taken or weight > room:
                not_now.append(hinted)
                continue
            if weight:
                room -= weight
                self._suspects[hinted.lease.id] = weight
            taken[hinted.lease.id] = hinted
            self._lanes.seat(hinted.lease.lane)
            permits -= hinted.lease.lane in held
        for hinted in not_now:
            self.put_off(hinted, AGAIN)
        return list(taken.values())

    def leave(self, hinted: Hinted) -> None:
        """Release the slot of one that was taken. Call it once for each."""
        self._lanes.leave(hinted.lease.lane)

    def let_go(self, ids: Iterable[UUID]) -> None:
        """Return the poison pill quota of these: they did not begin, or are settled."""
        for one in ids:
            self._suspects.pop(one, None)

    def keeps(self, held: frozenset[int]) -> bool:
        """Return whether any follow-up of these workspaces waits whose moment has come."""
        return self._lanes.has_any_of(held)

    def count(self, lanes: frozenset[int]) -> int:
        """Return how many leases wait in these workspace queues whose moment has come."""
        return self._lanes.count(lanes)

    def shed(self, lanes: frozenset[int], most: int) -> list[Hinted]:
        """Remove and return the leases beyond ``most`` whose moment has come, earliest first.

        Only these workspace queues are considered.
        """
        return self._lanes.shed(lanes, most)

    def seconds_to_next(self, held: frozenset[int] = frozenset()) -> float | None:
        """Return the seconds until the next moment, negative if it has passed, or None if the queue is empty.

        Those whose moment has come in ``held`` workspaces do not count.
        """
        if self._lanes.has_others_than(held):
            return -LEAD.total_seconds()
        # A moment at the edge of the calendar, which anyone with access to the broker can write, has no earlier one.
        return self._clock.until(self._heap[0][0]) - LEAD.total_seconds() if self._heap else None

    def is_anybodys_moment(self) -> bool:
        """Return whether any could be taken now."""
        return bool(self._lanes) or (bool(self._heap) and self._heap[0][0] <= self._clock.now() + LEAD)

    def clear(self) -> list[Lease]:
        """Empty the queue and return its leases."""
        leases = [hinted.lease for _, _, hinted in self._heap]
        self._heap.clear()
        return leases + self._lanes.clear()


def _weight(hinted: Hinted) -> int:
    """Return the share of the poison pill quota that it takes: none, one place, or all."""
    return SUSPECTS if hinted.lease.losses > 1 else hinted.lease.losses

"""The line in front of the slots: leases by the moment each may begin. Of one event loop; asks nobody."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from followups.dispatch.begin import LEAD
from followups.dispatch.lanes import Hinted, Lanes
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from uuid import UUID

    from followups.dispatch.clock import DatabaseClock
    from followups.store.leases import Lease

AGAIN = timedelta(milliseconds=50)
"""How long to leave alone what cannot be begun, or settled, at this moment; for what cannot be begun it doubles."""
LONGEST_AGAIN = timedelta(milliseconds=800)

SUSPECTS = 16
"""How many that were lost once are out at the same time; what was lost twice goes with no other suspect.

One of them may be what kills its workers, and takes with it what is in flight beside it. Of some hundred that
are lost together at most 16 are lost again, and none of these for the third time, which would be its end.
"""


class Line:
    """Who may begin next: whose moment has come, in turns between workspaces.

    A lease that runs out here is dropped without a word: a tick has taken it over, or will.
    """

    def __init__(self, clock: DatabaseClock, lease: timedelta, slots: int) -> None:
        """``lease`` is how long one lasts; ``slots`` is how many may be out at once."""
        self._clock = clock
        self._lease = lease.total_seconds()
        self._heap: list[tuple[datetime, int, Hinted]] = []
        """Those whose moment is still to come."""
        self._lanes = Lanes(slots)
        self._sequence = itertools.count()
        self._next_look = 0.0
        self._suspects: dict[UUID, int] = {}
        """Those that are out, with the room that each takes."""

    def add(self, leases: Iterable[Lease], task_id: str = "") -> None:
        """Let leases wait that have just come, by the task that brought them."""
        now, known = uptime(), self._clock.known
        if now >= self._next_look:
            # Nobody is taken while the transport is left alone, and each tick brings anew whose lease ran out.
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
        """Let one wait a little longer."""
        moment = max(self._clock.now() + delay, hinted.lease.due)
        heapq.heappush(self._heap, (moment, next(self._sequence), hinted))

    def defer_again(self, hinted: Hinted) -> None:
        """Defer one that could not begin at this moment, longer each time."""
        delay = min(AGAIN * 2**hinted.refusals, LONGEST_AGAIN)
        self.put_off(replace(hinted, refusals=min(hinted.refusals + 1, 10)), delay)

    def take(self, most: int, held: frozenset[int] = frozenset(), permits: int = 0) -> list[Hinted]:
        """Take up to ``most`` whose moment has come, each for a slot; of suspects only as many as there is room for.

        Of lanes that are ``held`` no more than there are ``permits``.
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
        """Note that the slot of one that was taken is free again. Once for each."""
        self._lanes.leave(hinted.lease.lane)

    def let_go(self, ids: Iterable[UUID]) -> None:
        """Note that these, once taken, can be lost no more: they did not begin, or are settled."""
        for one in ids:
            self._suspects.pop(one, None)

    def keeps(self, held: frozenset[int]) -> bool:
        """Say whether somebody waits in these lanes whose moment has come."""
        return self._lanes.has_any_of(held)

    def count(self, lanes: frozenset[int]) -> int:
        """Return how many wait in these lanes whose moment has come."""
        return self._lanes.count(lanes)

    def shed(self, lanes: frozenset[int], most: int) -> list[Hinted]:
        """Remove and return what waits in these lanes beyond ``most`` whose moment has come, the earliest first."""
        return self._lanes.shed(lanes, most)

    def seconds_to_next(self, held: frozenset[int] = frozenset()) -> float | None:
        """Return how long until somebody's moment comes, less than 0 when it has; None when nobody waits for it.

        Those whose moment has come in lanes that are ``held`` do not count.
        """
        if self._lanes.has_others_than(held):
            return -LEAD.total_seconds()
        # A moment at the edge of the calendar, which anybody may write to a broker, has none before it.
        return self._clock.until(self._heap[0][0]) - LEAD.total_seconds() if self._heap else None

    def is_anybodys_moment(self) -> bool:
        """Say whether somebody could be taken now."""
        return bool(self._lanes) or (bool(self._heap) and self._heap[0][0] <= self._clock.now() + LEAD)

    def clear(self) -> list[Lease]:
        """Send everybody home; return their leases."""
        leases = [hinted.lease for _, _, hinted in self._heap]
        self._heap.clear()
        return leases + self._lanes.clear()


def _weight(hinted: Hinted) -> int:
    """Return how much of the room for suspects it takes: none, a place, or all."""
    return SUSPECTS if hinted.lease.losses > 1 else hinted.lease.losses

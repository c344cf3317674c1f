"""The fair queue: follow-ups whose moment has come, in a queue for each workspace. No I/O.

The workspace queues take turns, and the earliest of each goes first. So a workspace with little to send waits for one
follow-up of each other workspace, not for all of them. While several workspaces are active, none gets all the slots, so
the others need not wait for its calls, however slow.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from followups.uptime import uptime

if TYPE_CHECKING:
    from datetime import datetime

    from followups.store.leases import Lease

LATELY = 60.0
"""Seconds for which a workspace counts as active after its latest follow-up arrived."""


@dataclass(frozen=True, slots=True)
class Hinted:
    """A lease that waits for its moment and a slot; ``expires`` is an `uptime`."""

    lease: Lease
    task_id: str
    expires: float
    refusals: int = 0
    """How many times in a row the follow-up could not begin at its moment."""


class Lanes:
    """Whose turn it is, and how many slots each has. Lanes with nothing in them, and without a slot, are forgotten."""

    def __init__(self, slots: int) -> None:
        """Share out so many ``slots``: one lane gets seven eighths of them while there are others."""
        self._most = max(1, slots * 7 // 8)
        self._waiting: dict[int, list[tuple[datetime, int, Hinted]]] = {}
        self._turns: deque[int] = deque()
        """Lanes in which somebody waits, the next first, without those in ``_sated``."""
        self._sated: set[int] = set()
        """Lanes in which somebody waits, that must give back a slot first."""
        self._slots: dict[int, int] = {}
        self._latest: int | None = None
        """The lane of which something has come last; when, and when something of any other had before."""
        self._latest_came = self._others_came = -inf

    def __bool__(self) -> bool:
        """Say whether there is a lane whose turn it may be."""
        return bool(self._turns)

    def see(self, lane: int, now: float) -> None:
        """Record that a lease of a workspace arrived at ``now``, an `uptime`."""
        if lane != self._latest:
            self._latest, self._others_came = lane, self._latest_came
        self._latest_came = now

    def add(self, place: tuple[datetime, int, Hinted]) -> None:
        """Let one wait for its lane's turn, by its moment and then its number."""
        lane = place[2].lease.lane
        if lane in self._waiting:
            heapq.heappush(self._waiting[lane], place)
        else:
            self._waiting[lane] = [place]
            self._turns.append(lane)

    def has_any_of(self, lanes: frozenset[int]) -> bool:
        """Say whether somebody waits in one of these."""
        return not lanes.isdisjoint(self._waiting)

    def count(self, lanes: frozenset[int]) -> int:
        """Return how many leases wait in these workspace queues."""
        return sum(len(waiting) for lane, waiting in self._waiting.items() if lane in lanes)

    def shed(self, lanes: frozenset[int], most: int) -> list[Hinted]:
        """Remove the leases beyond ``most`` from these workspace queues, and return them, earliest first.

        Each queue keeps its earliest leases: an equal share of ``most``, or all that it has.
        """
        if self.count(lanes) <= most:
            return []
        shed: list[tuple[datetime, int, Hinted]] = []
        queues = sorted(lanes & self._waiting.keys(), key=lambda lane: len(self._waiting[lane]))
        for number, lane in enumerate(queues):
            waiting = sorted(self._waiting[lane])
            kept = waiting[: most // (len(queues) - number)]
            most -= len(kept)
            shed += waiting[len(kept) :]
            self._keep(lane, kept)
        self._turns = deque(lane for lane in self._turns if lane in self._waiting)
        return [hinted for _, _, hinted in sorted(shed)]

    def has_others_than(self, lanes: frozenset[int]) -> bool:
        """Say whether there is a lane besides these whose turn it may be."""
        return any(lane not in lanes for lane in self._turns)

    def next(self, held: frozenset[int] = frozenset()) -> Hinted | None:
        """Return the earliest of the lane whose turn it is; None when it is nobody's. The turn passes on.

        Lanes that are ``held`` have none.
        """
        for _ in range(len(self._turns)):
            lane = self._turns[0]
            if lane in held:
                self._turns.rotate(-1)
                continue
            if self._slots.get(lane, 0) >= self._most and self._has_others(lane):
                self._sated.add(self._turns.popleft())
                continue
            waiting = self._waiting[lane]
            hinted = heapq.heappop(waiting)[2]
            if waiting:
                self._turns.rotate(-1)
            else:
                del self._waiting[self._turns.popleft()]
            return hinted
        return None

    def seat(self, lane: int) -> None:
        """Give a slot to a lane."""
        self._slots[lane] = self._slots.get(lane, 0) + 1

    def leave(self, lane: int) -> None:
        """Take back a slot that was given to a lane."""
        if self._slots[lane] > 1:
            self._slots[lane] -= 1
        else:
            del self._slots[lane]
        if lane in self._sated:
            self._sated.discard(lane)
            self._turns.append(lane)

    def drop_expired(self, now: float) -> None:
        """Drop the leases that have expired at ``now``, an `uptime`."""
        for lane, waiting in list(self._waiting.items()):
            left = [place for place in waiting if place[2].expires >= now]
            heapq.heapify(left)
            self._keep(lane, left)
        self._turns = deque(lane for lane in self._turns if lane in self._waiting)

    def clear(self) -> list[Lease]:
        """Send everybody home who waits; return their leases."""
        leases = [hinted.lease for waiting in self._waiting.values() for _, _, hinted in waiting]
        self._waiting.clear()
        self._turns.clear()
        self._sated.clear()
        return leases

    def _keep(self, lane: int, waiting: list[tuple[datetime, int, Hinted]]) -> None:
        """Replace the leases of a workspace queue with a heap of the remaining ones.

        The caller removes the turn of a queue that is now empty.
        """
        self._waiting[lane] = waiting
        if not waiting:
            del self._waiting[lane]
            self._sated.discard(lane)

    def _has_others(self, lane: int) -> bool:
        came = self._others_came if lane == self._latest else self._latest_came
        return uptime() - came < LATELY

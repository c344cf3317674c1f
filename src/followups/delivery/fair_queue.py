"""The fair queue: due leases, in a separate queue for each workspace. This module does no I/O.

Workspace queues take turns; within each queue, the earliest lease comes first. Before a workspace's turn comes, each
other workspace begins at most one follow-up. While several workspaces are active, no workspace gets all the slots. Slow
calls of one workspace therefore do not delay other workspaces.
"""

from __future__ import annotations

import heapq
from collections import deque
from math import inf
from typing import TYPE_CHECKING

from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from followups.delivery.slots import Slots
    from followups.store.leases import Lease

    Entry = tuple[datetime, int, Lease]
    """An entry of the queue: a due time, a number that orders equal due times, and a lease."""

ACTIVE = 60.0
"""A workspace counts as active for this many seconds after its latest follow-up arrived."""


class FairQueue:
    """A queue for each workspace key, and the order in which the queues take turns.

    Empty workspace queues are removed.
    """

    def __init__(self, slots: Slots) -> None:
        """``slots`` counts the slots in use by each workspace."""
        self._slots = slots
        self._queues: dict[int, list[Entry]] = {}
        self._turns: deque[int] = deque()
        """The keys of the workspace queues, in the order of their turns."""
        self._latest: int | None = None
        """The key of the workspace whose lease arrived last. ``_latest_at`` is the time of the last arrival.
        ``_others_at`` is the time of the last arrival from any other workspace.
        """
        self._latest_at = self._others_at = -inf

    def __len__(self) -> int:
        """Return the number of leases in all workspace queues."""
        return sum(map(len, self._queues.values()))

    def note_arrival(self, key: int, now: float) -> None:
        """Record that a lease of the workspace ``key`` arrived at the time ``now`` (`uptime`)."""
        if key != self._latest:
            self._latest, self._others_at = key, self._latest_at
        self._latest_at = now

    def add(self, entry: Entry) -> None:
        """Enqueue a lease in its workspace's queue."""
        key = entry[2].key
        if key in self._queues:
            heapq.heappush(self._queues[key], entry)
        else:
            self._queues[key] = [entry]
            self._turns.append(key)

    def has_turn(self, tripped: frozenset[int] = frozenset()) -> bool:
        """Return whether any workspace outside ``tripped`` has a lease that may be taken."""
        return any(key not in tripped and self._may_go(key) for key in self._turns)

    def next(self, tripped: frozenset[int] = frozenset()) -> Lease | None:
        """Remove and return the earliest lease of the next workspace, or None."""
        for _ in range(len(self._turns)):
            key = self._turns[0]
            if key in tripped or not self._may_go(key):
                self._turns.rotate(-1)
                continue
            queue = self._queues[key]
            lease = heapq.heappop(queue)[2]
            if queue:
                self._turns.rotate(-1)
            else:
                del self._queues[self._turns.popleft()]
            return lease
        return None

    def count(self, keys: frozenset[int]) -> int:
        """Return the number of leases in these workspace queues."""
        return sum(len(queue) for key, queue in self._queues.items() if key in keys)

    def shed(self, keys: frozenset[int], most: int) -> list[Lease]:
        """Shrink these queues to ``most`` leases in total; return the removed leases, earliest first.

        Each workspace queue keeps its earliest leases, up to an equal share of ``most``.
        """
        if self.count(keys) <= most:
            return []
        shed: list[Entry] = []
        by_length = sorted(keys & self._queues.keys(), key=lambda key: len(self._queues[key]))
        for number, key in enumerate(by_length):
            queue = sorted(self._queues[key])
            share = most // (len(by_length) - number)
            most -= min(share, len(queue))
            shed += queue[share:]
            self._queues[key] = queue[:share]
        self._forget_empty()
        return [lease for _, _, lease in sorted(shed)]

    def drop_expired(self, now: float) -> None:
        """Drop the leases that have expired at ``now``, an `uptime`."""
        for key, queue in self._queues.items():
            self._queues[key] = [entry for entry in queue if entry[2].expires >= now]
            heapq.heapify(self._queues[key])
        self._forget_empty()

    def clear(self) -> Iterator[Lease]:
        """Empty the queue and return its leases."""
        queues = list(self._queues.values())
        self._queues.clear()
        self._turns.clear()
        return (lease for queue in queues for _, _, lease in queue)

    def _forget_empty(self) -> None:
        self._queues = {key: queue for key, queue in self._queues.items() if queue}
        self._turns = deque(key for key in self._turns if key in self._queues)

    def _may_go(self, key: int) -> bool:
        if not self._slots.has_full_share(key):
            return True
        others_at = self._others_at if key == self._latest else self._latest_at
        return uptime() - others_at >= ACTIVE

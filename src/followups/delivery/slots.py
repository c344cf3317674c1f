"""Counts the slots that calls in flight occupy. This module does no I/O.

A slot is acquired before begin. A slot is released after the call, or at once if the follow-up does not begin. Until
its outcome is recorded, a possible poison pill counts against a quota.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from followups.store.leases import Lease

POISON_PILLS = 16
"""Maximum number of follow-ups with one lost lease that may be in flight together. A follow-up with two lost leases
needs the whole quota, so no other follow-up with a lost lease is in flight with it.

Each follow-up with a lost lease may be a poison pill. A poison pill kills its worker and all attempts in flight there.
If hundreds of leases are lost together, at most 16 follow-ups lose a second lease. Only a real poison pill loses a
third lease, which ends the follow-up.
"""


class Slots:
    """The ledger of slots: free slots, each workspace's slots, and the poison pill quota."""

    def __init__(self, number: int) -> None:
        """Allow ``number`` simultaneous calls."""
        self.number = self.free = number
        self._share = max(1, number * 7 // 8)
        """The most slots that one workspace may use while other workspaces are active."""
        self._of_workspace: dict[int, int] = {}
        self._poison_pills: dict[UUID, int] = {}
        """Possible poison pills without a recorded outcome, each with its share of the quota."""

    def acquire(self, lease: Lease) -> bool:
        """Acquire a slot; return False without acquiring one if the poison pill quota is used up."""
        if lease.losses:
            share = POISON_PILLS if lease.losses > 1 else 1
            if share > POISON_PILLS - sum(self._poison_pills.values()):
                return False
            self._poison_pills[lease.id] = share
        self.free -= 1
        self._of_workspace[lease.key] = self._of_workspace.get(lease.key, 0) + 1
        return True

    def release(self, lease: Lease) -> None:
        """Release the slot of a lease. Call this method once for each acquired slot."""
        self.free += 1
        if self._of_workspace[lease.key] > 1:
            self._of_workspace[lease.key] -= 1
        else:
            del self._of_workspace[lease.key]

    def release_poison_quota(self, ids: Iterable[UUID]) -> None:
        """Release the quota of possible poison pills that were settled or did not begin."""
        if self._poison_pills:
            for one in ids:
                self._poison_pills.pop(one, None)

    def has_full_share(self, key: int) -> bool:
        """Return whether a workspace has all the slots that it may use while other workspaces are active."""
        return self._of_workspace.get(key, 0) >= self._share

"""Obstacles: why leased follow-ups were not begun, with what decides about them.

``begin_checks.sql`` lists all obstacles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.store.fragments import read_sql
from followups.store.holds import hours_of
from followups.store.leases import batch_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.store.holds import WorkspaceHours
    from followups.store.leases import Lease, Rules

# Unlocked: a row that another transaction has locked has no obstacle, and is tried again shortly.
_OBSTACLES = text(read_sql("begin_checks").replace("FOR NO KEY UPDATE SKIP LOCKED", "OFFSET 0") + read_sql("obstacles"))


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What may keep a valid lease from beginning, and since when or until when."""

    lease: Lease
    now: datetime
    sent_at: datetime
    """When it would be sent: now, or at its due moment."""
    due_date: datetime
    wanted_from: datetime
    """The due date, or the time at which it was set if it was already past then."""
    chat_removed: bool = False
    silence_broken: bool = False
    taken_over: bool = False
    window_closed: bool = False
    too_late: bool = False
    earlier: UUID | None = None
    """The follow-up of its chat before it."""
    sendable_from: datetime | None = None
    """First time at which sending hours allowed (or will allow) the send, or None if not recorded."""
    window_ends: datetime | None = None
    """None if its channel has no messaging window."""
    pause_id: UUID | None = None
    hours: WorkspaceHours | None = None


def find(connection: Connection, leases: Sequence[Lease], rules: Rules) -> list[Obstacle]:
    """Return what keeps each of the valid leases from beginning."""
    by_id = {lease.id: lease for lease in leases}
    return [
        Obstacle(
            by_id[row.id]._replace(token=row.lease_token),
            row.now,
            row.sent_at,
            row.due_date,
            row.wanted_from,
            row.chat_removed,
            row.silence_broken,
            row.taken_over,
            row.window_closed,
            row.too_late,
            row.earlier,
            row.sendable_from,
            row.window_ends,
            row.pause_id,
            hours_of(row) if row.workspace_id else None,
        )
        for row in connection.execute(_OBSTACLES, batch_of(leases) | rules.parameters)
    ]

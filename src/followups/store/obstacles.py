"""Obstacles: the reasons why leased follow-ups did not begin, each with its details.

All obstacles are listed in ``begin_checks.sql``.
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

# This query locks nothing. If another transaction has locked or just updated a follow-up, this query may find no
# reason for that follow-up. Such a follow-up is tried again shortly.
_OBSTACLES = text(read_sql("begin_checks").replace("FOR NO KEY UPDATE SKIP LOCKED", "OFFSET 0") + read_sql("obstacles"))


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A leased follow-up that may not begin, with the reasons and their times."""

    lease: Lease
    now: datetime
    send_time: datetime
    """When the follow-up would be sent: now, or at its due time if that is later."""
    due_date: datetime
    wanted_from: datetime
    """The later of the due date and the time at which the due date was set."""
    chat_removed: bool = False
    silence_broken: bool = False
    taken_over: bool = False
    window_closed: bool = False
    too_late: bool = False
    earlier: UUID | None = None
    """The pending follow-up that comes directly before this one in the chat."""
    sendable_from: datetime | None = None
    """The first time at which sending hours allow the message, or None if none was recorded."""
    window_ends: datetime | None = None
    """The end of the messaging window, or None if the channel has no messaging window."""
    pause_id: UUID | None = None
    hours: WorkspaceHours | None = None


def find(connection: Connection, leases: Sequence[Lease], rules: Rules) -> list[Obstacle]:
    """Return, for each valid lease, what keeps its follow-up from beginning."""
    by_id = {lease.id: lease for lease in leases}
    return [
        Obstacle(
            by_id[row.id]._replace(token=row.lease_token),
            row.now,
            row.send_time,
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

"""Quotas: limits on the pending follow-ups and the chats of a workspace.

By default there is no quota. Without a quota, a create request needs no extra query: its INSERT itself checks whether
there is a quota. With a quota, a transaction locks the chat's row first and then the quota's row. Two concurrent create
requests therefore cannot both use the last free place.

Each quota row stores the number of free places found by the last count of follow-ups or chats. Each create request
reduces the stored number of free places. Follow-ups or chats are recounted only when a request needs more places than
the stored number. Finished follow-ups are not counted again, so their places become free.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.errors import QuotaExceededError
from followups.statements import Rule, Statement
from followups.wording import Sentence

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.statements import Steps


class Kind(StrEnum):
    """What a quota limits: pending follow-ups or chats."""

    PENDING = "pending"
    CHATS = "chats"


NAMES = {Kind.PENDING: "pending follow-ups", Kind.CHATS: "chats"}


def unless_limited(kind: Kind) -> str:
    """Return an SQL condition that is true if no quota forbids an INSERT.

    ``within_quota`` is true if room for the new row has been reserved.
    """
    return f"""(CAST(:within_quota AS boolean)
            OR NOT EXISTS (SELECT FROM quotas WHERE workspace_id = :workspace_id AND kind = '{kind.value}'))"""


_ROWS = {
    Kind.PENDING: "SELECT FROM follow_ups WHERE workspace_id = :workspace_id AND status = 'pending'",
    Kind.CHATS: "SELECT FROM chats WHERE workspace_id = :workspace_id AND removed_at IS NULL",
}
_LOCK = Statement("""
    SELECT most, room FROM quotas WHERE workspace_id = :workspace_id AND kind = :kind FOR NO KEY UPDATE
""")
_COUNT = {
    kind: Statement(f"SELECT count(*) AS number FROM ({rows} LIMIT :most) AS counted")  # noqa: S608 - a constant above
    for kind, rows in _ROWS.items()
}
_KEEP = Statement("UPDATE quotas SET room = :room WHERE workspace_id = :workspace_id AND kind = :kind")


@Rule
def take(workspace_id: UUID, kind: Kind, number: int) -> Steps[None]:
    """Reserve quota for a number of new rows; a rollback undoes the reservation.

    Raises `QuotaExceededError` if the quota does not allow this number of rows. The caller must have locked the chats.
    If the workspace has no quota, this function does nothing.
    """
    found = yield _LOCK(workspace_id=workspace_id, kind=kind.value)
    if not found:
        return
    most, room = found[0]
    if room < number:
        # This statement starts after the quota is locked, so it sees what earlier transactions committed.
        (counted,) = yield _COUNT[kind](workspace_id=workspace_id, most=most)
        room = most - counted.number
    if room < number:
        message = Sentence(
            "The workspace may have at most {most} {what}; there is room for {room} more.",
            most=f"{most:,}",
            what=Sentence(NAMES[kind]),
            room=f"{room:,}",
        )
        raise QuotaExceededError(message)
    yield _KEEP(workspace_id=workspace_id, kind=kind.value, room=room - number)


@dataclass(frozen=True, slots=True)
class QuotaUse:
    """A quota and its usage, which is counted only up to the quota."""

    workspace: str
    kind: Kind
    most: int
    used: int


_SET = text("""
    INSERT INTO quotas (workspace_id, kind, most) VALUES (:workspace_id, :kind, :most)
    ON CONFLICT (workspace_id, kind) DO UPDATE SET most = excluded.most, room = 0
""")
_CLEAR = text("DELETE FROM quotas WHERE workspace_id = :workspace_id AND kind = :kind")
_STANDING = text(
    f"""
    SELECT w.name, q.kind, q.most, CASE q.kind
           WHEN 'pending' THEN (SELECT count(*) FROM ({_ROWS[Kind.PENDING]} LIMIT q.most) AS counted)
           ELSE (SELECT count(*) FROM ({_ROWS[Kind.CHATS]} LIMIT q.most) AS counted) END AS used
      FROM quotas q
      JOIN workspaces w ON w.id = q.workspace_id
     WHERE q.workspace_id = COALESCE(CAST(:only AS uuid), q.workspace_id)
     ORDER BY w.name, q.kind
""".replace(":workspace_id", "q.workspace_id")  # noqa: S608 - no input, only the constants above
)


def put(connection: Connection, workspace_id: UUID, kind: Kind, most: int) -> None:
    """Create or change a quota. Existing follow-ups and chats are kept, even if there are too many."""
    connection.execute(_SET, {"workspace_id": workspace_id, "kind": kind.value, "most": most})


def clear(connection: Connection, workspace_id: UUID, kind: Kind) -> bool:
    """Remove a quota; return whether there was one."""
    return connection.execute(_CLEAR, {"workspace_id": workspace_id, "kind": kind.value}).rowcount == 1


def standing(connection: Connection, workspace_id: UUID | None = None) -> list[QuotaUse]:
    """Return the quotas of a workspace, or of all workspaces if ``workspace_id`` is None."""
    rows = connection.execute(_STANDING, {"only": workspace_id})
    return [QuotaUse(row.name, Kind(row.kind), row.most, row.used) for row in rows]

"""The rows that record the console's bulk actions, and the SQL statements for their batches."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert

from followups.halving import halve_within
from followups.models import BulkAction
from followups.states import Status
from followups.store import chat_order
from followups.store.follow_ups import cancelled_or_asked_to
from followups.store.fragments import honest
from followups.store.leases import uuid_array

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from followups.states import Final
    from followups.store.browse import BrowseCursor

LISTED = 50
"""Number of bulk actions that the console's history shows."""

IN_FLIGHT = "in flight"
"""The reason shown when a bulk action skips a follow-up in flight. A bulk action can prevent retries of such a
follow-up, but cannot stop its current attempt.
"""

NOT_WRITABLE = "cannot be written"
"""The reason given when a follow-up is skipped because its row cannot be written."""


def create(session: Session, **columns: Any) -> bool:  # noqa: ANN401 - the row's columns
    """Create a bulk action; return whether it is new. An existing bulk action with the same id is not changed."""
    statement = insert(BulkAction).values(**columns).on_conflict_do_nothing().returning(BulkAction.id)
    return session.scalar(statement) is not None


def find(session: Session, action_id: UUID, workspace_id: UUID | None) -> BulkAction | None:
    """Return the bulk action with this id, or None if it does not exist.

    If ``workspace_id`` is given, only actions of that workspace are found.
    """
    found = session.get(BulkAction, action_id)
    return found if found and workspace_id in {None, found.workspace_id} else None


def newest(session: Session, workspace_id: UUID | None) -> Sequence[BulkAction]:
    """Return the newest bulk actions of a workspace, or of all workspaces if ``workspace_id`` is None."""
    query = select(BulkAction).order_by(BulkAction.created_at.desc()).limit(LISTED)
    if workspace_id is not None:
        query = query.where(BulkAction.workspace_id == workspace_id)
    return session.scalars(query).all()


_STOP = text("UPDATE bulk_actions SET stopped_at = now() WHERE id = :id AND finished_at IS NULL AND stopped_at IS NULL")


def stop(session: Session, action_id: UUID) -> None:
    """Stop a bulk action after its current batch; a finished bulk action is not changed."""
    session.execute(_STOP, {"id": action_id})


_LOCK_NEXT = (
    select(BulkAction)
    .where(BulkAction.finished_at.is_(None))
    .order_by(BulkAction.created_at, BulkAction.id)
    .limit(1)
    .with_for_update(skip_locked=True)
)


def lock_next(session: Session, without: Collection[UUID] = ()) -> BulkAction | None:
    """Lock the oldest unfinished bulk action until the transaction ends; return it, or None.

    A bulk action is skipped if it is in ``without`` or locked by another worker.
    """
    return session.scalar(_LOCK_NEXT.where(BulkAction.id.not_in(without)))


_PROGRESS = text("""
    UPDATE bulk_actions
       SET done = :done, passed_over = CAST(:passed_over AS jsonb), ended_at_time = :at, ended_at_id = :after,
           finished_at = CASE WHEN :finished THEN now() END
     WHERE id = :id
""")


def record_progress(
    session: Session, action: BulkAction, done: int, passed_over: str, place: BrowseCursor | None, *, finished: bool
) -> None:
    """Record the progress of a bulk action; ``passed_over`` is JSON."""
    at, after = place or (action.ended_at_time, action.ended_at_id)
    values = {"id": action.id, "done": done, "passed_over": passed_over, "at": at, "after": after, "finished": finished}
    session.execute(_PROGRESS, values)


_CANCEL = text(f"""
    WITH held AS MATERIALIZED (
        SELECT id FROM follow_ups
         WHERE id = ANY(CAST(:ids AS uuid[])) AND status = 'pending'
         ORDER BY chat_id, due_date, id
           FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE follow_ups f
       SET {cancelled_or_asked_to(honest("CAST(:reason AS text)", "f"))}
      FROM held
     WHERE f.id = held.id
    RETURNING f.id, f.status
""")  # noqa: S608 - no input, only the constants above
_FINISHED = text("""
    SELECT id FROM follow_ups WHERE id = ANY(CAST(:ids AS uuid[])) AND status <> 'pending'
""")


def cancel_if_not_begun(connection: Connection, ids: Sequence[UUID], final: Final) -> tuple[list[UUID], dict[str, int]]:
    """Cancel these follow-ups; return the cancelled ones, and the number skipped for each reason.

    A follow-up in flight is not cancelled, but it will not be retried. A follow-up is skipped if its row is locked or
    cannot be written.
    """
    parameters = {"status": final.status.value, "reason": final.reason}

    def cancel(part: Sequence[UUID]) -> Sequence[Any]:
        return connection.execute(_CANCEL, parameters | {"ids": uuid_array(part)}).all()

    halved = halve_within(connection, ids, cancel)
    rows = list(chain.from_iterable(halved.done))
    cancelled = [row.id for row in rows if row.status == Status.CANCELLED]
    chat_order.unblock(connection, cancelled)
    left = set(ids) - {row.id for row in rows} - {one for one, _ in halved.refused}
    finished = len(connection.scalars(_FINISHED, {"ids": uuid_array(left)}).all()) if left else 0
    counts = {
        IN_FLIGHT: len(rows) - len(cancelled),
        "finished": finished,
        "locked": len(left) - finished,
        NOT_WRITABLE: len(halved.refused),
    }
    return cancelled, {reason: number for reason, number in counts.items() if number}

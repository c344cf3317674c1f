"""Retries: new follow-ups created from failed ones, and the search for failed follow-ups to retry.

Each retry's row contains the failed follow-up's id. A unique index prevents a second retry. If a bulk retry was
interrupted, running it again continues where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from followups.states import ReasonCode

NIL = UUID(int=0)
FIRST = datetime(1, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Failures:
    """The criteria that select failed follow-ups for a retry.

    Failed follow-ups are selected by time and reason; those that were already retried are left out.
    """

    since: datetime
    until: datetime
    workspace_id: UUID | None = None
    codes: Sequence[ReasonCode] = field(default_factory=tuple)

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the SQL statement."""
        codes = [code.value for code in self.codes]
        return {"since": self.since, "until": self.until, "workspace_id": self.workspace_id, "codes": codes}


def _failed(failures: Failures) -> str:
    workspace = " AND f.workspace_id = :workspace_id" if failures.workspace_id else ""
    codes = " AND split_part(f.reason, ':', 1) = ANY(CAST(:codes AS text[]))" if failures.codes else ""
    return f"""
          FROM follow_ups f
         WHERE f.finished_at BETWEEN :since AND :until AND f.status = 'failed'{workspace}{codes}
           AND NOT EXISTS (SELECT FROM follow_ups r WHERE r.retry_of = f.id)
    """


def count_failed(connection: Connection, failures: Failures) -> int:
    """Return how many failed follow-ups a bulk retry would retry."""
    number: int = connection.execute(text(f"SELECT count(*) {_failed(failures)}"), failures.parameters).scalar_one()
    return number


class FailureCursor(NamedTuple):
    """The position where a batch of retries ended; batches follow the order in which follow-ups failed."""

    finished_at: datetime = FIRST
    id: UUID = NIL


START = FailureCursor()


class Failed(NamedTuple):
    """A failed follow-up to retry."""

    id: UUID
    finished_at: datetime


def some_failed(connection: Connection, failures: Failures, most: int, after: FailureCursor = START) -> list[Failed]:
    """Return the next few failed follow-ups, in the order in which they failed."""
    query = f"""
        SELECT f.id, f.finished_at {_failed(failures)}
           AND f.finished_at >= :after AND (f.finished_at, f.id) > (:after, :after_id)
         ORDER BY f.finished_at, f.id LIMIT :most
    """
    place = {"after": after.finished_at, "after_id": after.id, "most": most}
    return [Failed(*row) for row in connection.execute(text(query), failures.parameters | place)]


_LAST = text("""
    WITH RECURSIVE chain AS (
        SELECT CAST(:id AS uuid) AS id, 0 AS place
         UNION ALL
        SELECT f.id, chain.place + 1 FROM chain JOIN follow_ups f ON f.retry_of = chain.id
    )
    SELECT id FROM chain ORDER BY place DESC LIMIT 1
""")
_NOTE = text("UPDATE follow_ups SET retry_of = :original WHERE id = :id")


def last_of(session: Session, follow_up_id: UUID) -> UUID:
    """Return the last retry of the follow-up, or the follow-up itself if it was not retried.

    A caller that adds a retry of the follow-up must lock the chat first.
    """
    last: UUID = session.execute(_LAST, {"id": follow_up_id}).scalar_one()
    return last


def mark_as_retry(session: Session, follow_up_id: UUID, original: UUID) -> None:
    """Record that a new follow-up retries this failed follow-up."""
    session.execute(_NOTE, {"id": follow_up_id, "original": original})

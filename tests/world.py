"""Helpers with which all tests insert and read rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import Engine, insert, select, text

from databases import OWNER, url_as
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.models import Chat, FailedAttempt, FollowUp, Workspace
from followups.store.follow_ups import MOST_PENDING

if TYPE_CHECKING:
    from followups.delivery.attempts import BatchResult
    from followups.settings import Settings

FIELDS = [
    "id", "createdAt", "updatedAt", "chatId", "chatMessageId", "dueDate", "finishedAt", "message", "reason", "status",
    "triggerChatMessageId",
]  # fmt: skip
"""The documented fields of a follow-up, in order."""
FAILED = {"status": "failed", "reason": "rejected: HTTP 403 no", "finished_at": datetime(2030, 1, 31, tzinfo=UTC)}
"""Column values of a follow-up that the receiver has rejected."""


@dataclass
class World:
    """A workspace in the test's database, with helpers to add and read data."""

    engine: Engine
    workspace_id: UUID = field(default_factory=uuid4)

    def __post_init__(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(insert(Workspace).values(id=self.workspace_id, name=str(self.workspace_id)))

    def chat(self, **columns: Any) -> UUID:
        """Insert a chat in which an agent wrote the last message."""
        values = {
            "id": uuid4(),
            "last_message_id": uuid4(),
            "last_message_role": "agent",
            "last_message_at": text("now()"),
        } | columns
        with self.engine.begin() as connection:
            return connection.execute(
                insert(Chat).values(workspace_id=self.workspace_id, **values).returning(Chat.id)
            ).scalar_one()

    def follow_up(self, chat_id: UUID | None = None, due: timedelta = timedelta(0), **columns: Any) -> UUID:
        """Insert a pending follow-up whose due date is ``due`` after the database's current time.

        If ``begun_at`` is given, an attempt is in flight and counted.
        """
        values = {
            "attempts": int("begun_at" in columns),
            "workspace_id": self.workspace_id,
            "chat_id": chat_id or self.chat(),
            "message": "Still there?",
            "due_date": text(f"now() + interval '{due.total_seconds()} s'"),
            "trigger_chat_message_id": uuid4(),
        } | columns
        with self.engine.begin() as connection:
            return connection.execute(insert(FollowUp).values(**values).returning(FollowUp.id)).scalar_one()

    def put_in_flight(self, follow_up_id: UUID | str) -> None:
        """Put an attempt of a follow-up in flight for a minute."""
        self.sql(
            "UPDATE follow_ups SET begun_at = now(), attempts = attempts + 1, lease_until = now() + interval '1 min'"
            " WHERE id = :id",
            id=follow_up_id,
        )

    def full_chat(self) -> UUID:
        """Insert a chat with the maximum number of pending follow-ups, one due each minute."""
        chat_id = self.chat()
        self.sql(
            "INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)"
            " SELECT :workspace_id, :chat_id, '?', now() + n * interval '1 min', gen_random_uuid()"
            " FROM generate_series(1, :most) AS n",
            workspace_id=self.workspace_id,
            chat_id=chat_id,
            most=MOST_PENDING,
        )
        return chat_id

    def follow_ups_at_once(self, places: list[tuple[UUID, timedelta]]) -> list[UUID]:
        """Insert pending follow-ups in one transaction, so that all exist before the first one begins."""
        with self.engine.begin() as connection:
            now = connection.execute(text("SELECT now()")).scalar_one()
            rows = [
                {
                    "id": uuid4(),
                    "workspace_id": self.workspace_id,
                    "chat_id": chat_id,
                    "message": "Still there?",
                    "due_date": now + ahead,
                    "trigger_chat_message_id": uuid4(),
                }
                for chat_id, ahead in places
            ]
            connection.execute(insert(FollowUp), rows)
        return [row["id"] for row in rows]

    def row(self, follow_up_id: UUID) -> Any:
        """Return the current row of a follow-up."""
        with self.engine.connect() as connection:
            return connection.execute(select(FollowUp.__table__).where(FollowUp.id == follow_up_id)).one()

    def rows(self, *ids: UUID) -> list[Any]:
        """Return the id and status of the given follow-ups; by default, of all follow-ups."""
        query = select(FollowUp.id, FollowUp.status)
        with self.engine.connect() as connection:
            return list(connection.execute(query.where(FollowUp.id.in_(ids)) if ids else query))

    def burst(self, due: list[timedelta]) -> list[UUID]:
        """Insert pending follow-ups, each in a new chat, in one transaction."""
        chats = [
            {
                "workspace_id": self.workspace_id,
                "id": uuid4(),
                "last_message_id": uuid4(),
                "last_message_role": "agent",
                "last_message_at": datetime.now(UTC),
            }
            for _ in due
        ]
        with self.engine.begin() as connection:
            now = connection.execute(text("SELECT now()")).scalar_one()
            follow_ups = [
                {
                    "id": uuid4(),
                    "workspace_id": self.workspace_id,
                    "chat_id": chat["id"],
                    "message": "Still there?",
                    "due_date": now + ahead,
                    "trigger_chat_message_id": chat["last_message_id"],
                }
                for chat, ahead in zip(chats, due, strict=True)
            ]
            connection.execute(insert(Chat), chats)
            connection.execute(insert(FollowUp), follow_ups)
        return [one["id"] for one in follow_ups]

    def failures(self, follow_up_id: UUID) -> list[tuple[int, str, str]]:
        """Return the number, outcome and detail of each failed attempt of a follow-up, oldest first."""
        table = FailedAttempt
        query = select(table.number, table.outcome, table.detail).where(table.follow_up_id == follow_up_id)
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query.order_by(table.id))]

    def scalar(self, query: str) -> Any:
        """Return the first column of the first row."""
        with self.engine.connect() as connection:
            return connection.execute(text(query)).scalar_one()

    def waiting_for_locks(self) -> int:
        """Return how many connections to the database wait for a lock."""
        of_database = "datname = current_database() AND wait_event_type = 'Lock'"
        return int(self.scalar(f"SELECT count(*) FROM pg_stat_activity WHERE {of_database}"))  # noqa: S608 - a constant

    def sql(self, statement: str, **parameters: Any) -> None:
        """Execute a statement and commit."""
        with self.engine.begin() as connection:
            connection.execute(text(statement), parameters)

    def alter(self, statement: str) -> None:
        """Execute a statement as the role that owns the tables."""
        url = url_as(self.engine.url.set(drivername="postgresql"), OWNER)
        with psycopg.connect(url) as connection:
            connection.execute(statement.encode())

    def expire(self, *ids: UUID) -> None:
        """Make these follow-ups' leases expire now, and record a tick so that no grace period applies."""
        self.close_gap()
        self.sql(
            "UPDATE follow_ups SET lease_until = now() - interval '1 ms' WHERE id = ANY(CAST(:ids AS uuid[]))",
            ids=list(ids),
        )

    def close_gap(self) -> None:
        """Record a tick now, in case the gap since the last one is too long on a slow machine."""
        self.sql("UPDATE dispatcher_state SET last_tick_at = now(), grace_until = NULL")


def claim_and_begin(engine: Engine, settings: Settings) -> BatchResult:
    """Claim and begin due follow-ups."""
    return begin(engine, settings, claim(engine, settings).leases)


def begun(beginning: BatchResult) -> set[UUID]:
    """Return the follow-ups that have begun."""
    return {one.lease.id for one in beginning.begun}

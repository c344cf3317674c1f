"""Rows to test with, and a way to look at them; for tests of every kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Engine, insert, select, text

from followups.models import Chat, FailedAttempt, FollowUp, Workspace


@dataclass
class World:
    """One workspace on a database of the test's own, and short ways to fill and read it."""

    engine: Engine
    workspace_id: UUID = field(default_factory=uuid4)

    def __post_init__(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(insert(Workspace).values(id=self.workspace_id, name=str(self.workspace_id)))

    def chat(self, **columns: Any) -> UUID:
        """Insert a chat whose last message is the agent's."""
        chat_id = uuid4()
        values = {"last_message_id": uuid4(), "last_message_role": "agent", "last_message_at": text("now()")} | columns
        with self.engine.begin() as connection:
            connection.execute(insert(Chat).values(workspace_id=self.workspace_id, id=chat_id, **values))
        return chat_id

    def follow_up(self, chat_id: UUID | None = None, due: timedelta = timedelta(0), **columns: Any) -> UUID:
        """Insert a pending follow-up, due ``due`` after the database's now."""
        values = {
            "workspace_id": self.workspace_id,
            "chat_id": chat_id or self.chat(),
            "message": "Still there?",
            "due_date": text(f"now() + interval '{due.total_seconds()} s'"),
            "trigger_chat_message_id": uuid4(),
        } | columns
        with self.engine.begin() as connection:
            return connection.execute(insert(FollowUp).values(**values).returning(FollowUp.id)).scalar_one()

    def row(self, follow_up_id: UUID) -> Any:
        """Return the row as it is now."""
        with self.engine.connect() as connection:
            return connection.execute(select(FollowUp.__table__).where(FollowUp.id == follow_up_id)).one()

    def failures(self, follow_up_id: UUID) -> list[tuple[int, str, str]]:
        """Return number, outcome and detail of its failed attempts, oldest first."""
        table = FailedAttempt
        query = select(table.number, table.outcome, table.detail).where(table.follow_up_id == follow_up_id)
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query.order_by(table.id))]

    def scalar(self, query: str) -> Any:
        """Return the first column of the first row."""
        with self.engine.connect() as connection:
            return connection.execute(text(query)).scalar_one()

    def sql(self, statement: str, **parameters: Any) -> None:
        """Execute a statement and commit."""
        with self.engine.begin() as connection:
            connection.execute(text(statement), parameters)

    def expire(self, *ids: UUID) -> None:
        """Let the leases end now."""
        self.sql(
            "UPDATE follow_ups SET lease_until = now() - interval '1 ms' WHERE id = ANY(CAST(:ids AS uuid[]))",
            ids=list(ids),
        )

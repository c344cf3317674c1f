"""Deleting a workspace or chat removes all its rows, ends sending, and leaves an audit event."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import followups
from followups.errors import ChatNotFoundError, FollowUpsError, WorkspaceBeingDeletedError, WorkspaceNotFoundError
from followups.models import Base, ChatMessage, IdempotencyKey
from followups.operations import administration, deletion
from followups.store import api_keys, audit, pauses, rate_limits, workspaces
from followups.store import deletion as store
from followups.store.audit import Action, Actor, Event, Way
from followups.store.deletion import DeletionScope
from world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Engine

ACTOR = Actor(Way.COMMAND, name="ann")
PATIENCE = timedelta(seconds=10)
HOUR = timedelta(hours=1)
PAST = {"status": "sent", "finished_at": datetime(2030, 1, 31, tzinfo=UTC)}


def delete(engine: Engine, whole: DeletionScope, patience: timedelta = PATIENCE) -> dict[str, int]:
    """Delete a workspace or chat and return how many rows were deleted in total."""
    sums: dict[str, int] = {}
    for counts in deletion.delete(engine, ACTOR, whole, patience):
        for name, number in counts.items():
            sums[name] = sums.get(name, 0) + number
    return sums


def events(world: World) -> list[tuple[str, str, int, str | None]]:
    """Return the remaining audit events."""
    with Session(world.engine) as session:
        found = audit.newest(session, audit.AuditFilter(workspace_id=world.workspace_id), 100)
        return [(each.action, each.actor, each.number, each.workspace) for each in found]


def filled(world: World) -> UUID:
    """Insert rows of every type into the workspace and return one of its chats."""
    chat = world.chat()
    pending = [world.follow_up(chat, HOUR), world.follow_up(chat, HOUR), world.follow_up(due=HOUR)]
    ended = world.follow_up(chat, -HOUR, **PAST)
    world.sql(
        "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail) VALUES (:id, 1, 'retry', '')", id=ended
    )
    with Session(world.engine) as session, session.begin():
        administration.create_key(session, ACTOR, world.workspace_id, "website")
        administration.pause(session, ACTOR, pauses.PauseScope(world.workspace_id, "waha"))
        administration.set_limit(session, ACTOR, rate_limits.LimitScope(world.workspace_id, None, "all"), 5, 5)
        audit.record(session.connection(), Event(ACTOR, Action.FOLLOW_UP_CHANGED, world.workspace_id, pending[0]))
        message: dict[str, Any] = {"workspace_id": world.workspace_id, "chat_id": chat, "role": "agent"}
        body = json.dumps({"chatId": str(chat), "message": "Still there?"}).encode()
        answer = {"workspace_id": world.workspace_id, "request_hash": b"", "status": 201, "body": body}
        for _ in range(3):
            session.execute(insert(ChatMessage).values(message | {"id": uuid4()}))
            session.execute(insert(IdempotencyKey).values(answer | {"key": uuid4().hex}))
    return chat


def counts(world: World) -> dict[str, int]:
    """Return how many rows of the workspace each table contains."""
    found = {}
    with world.engine.connect() as connection:
        for table in Base.metadata.sorted_tables:
            column = "id" if table.name == "workspaces" else "workspace_id"
            if column in table.columns:
                query = text(f"SELECT count(*) FROM {table.name} WHERE {column} = :id")  # noqa: S608 - table names of the models
                found[table.name] = connection.scalar(query, {"id": world.workspace_id})
    return {name: number for name, number in found.items() if number}


class TestWorkspace:
    """Deletion of a whole workspace."""

    def test_all_rows_are_deleted_and_one_event_stays(self, world: World) -> None:
        """Deleting a workspace deletes its rows from every table and keeps other workspaces' rows.

        The audit event of the deletion counts the deleted follow-ups.
        """
        other = World(world.engine)
        filled(world)
        filled(other)
        before = counts(other)
        sums = delete(world.engine, DeletionScope(world.workspace_id))
        assert counts(world) == {"audit_events": 1}
        assert events(world) == [("workspace.deleted", "ann", 4, str(world.workspace_id))]
        assert counts(other) == before
        assert (sums["cancelled"], sums["deleted"], sums["chats"], sums["chatMessages"]) == (3, 4, 2, 3)

    def test_an_interrupted_deletion_continues(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """After an interrupted deletion, the workspace accepts no new keys or follow-ups.

        Running the command again completes the deletion.
        """
        monkeypatch.setattr(store, "BATCH", 2)
        name, chat = str(world.workspace_id), filled(world)
        batches = deletion.delete(world.engine, ACTOR, DeletionScope(world.workspace_id), PATIENCE)
        for number, _ in enumerate(batches):
            if number == 3:  # at this moment, follow-ups are being deleted
                break
        batches.close()
        with Session(world.engine) as session:
            with pytest.raises(WorkspaceBeingDeletedError):
                workspaces.find(session, name)
            with pytest.raises(WorkspaceBeingDeletedError):
                workspaces.create(session, name)
            with pytest.raises(WorkspaceNotFoundError):
                api_keys.create(session, world.workspace_id)
            with pytest.raises(ChatNotFoundError):
                followups.schedule(
                    session,
                    workspace_id=world.workspace_id,
                    chat_id=chat,
                    message="Still there?",
                    due_date=datetime.now(UTC),
                )
        delete(world.engine, DeletionScope(world.workspace_id))
        assert counts(world) == {"audit_events": 1}
        assert events(world) == [("workspace.deleted", "ann", 4, name)]
        with Session(world.engine) as session:
            assert workspaces.create(session, name)[1]

    def test_rows_created_meanwhile_are_deleted(self, world: World) -> None:
        """A follow-up whose transaction commits while its workspace is being deleted is deleted too."""
        chat = filled(world)
        with Session(world.engine) as late:
            followups.schedule(
                late, workspace_id=world.workspace_id, chat_id=chat, message="!", due_date=datetime.now(UTC)
            )
            seen = 0
            for counted in deletion.delete(world.engine, ACTOR, DeletionScope(world.workspace_id), PATIENCE):
                seen += counted.get("chats", 0)
                if seen and late.in_transaction():
                    late.commit()
        assert counts(world) == {"audit_events": 1}

    def test_attempts_in_flight_end_first(self, world: World) -> None:
        """A workspace's deletion waits for attempts in flight, and reports attempts that do not end.

        After an incomplete deletion, the command can be run again.
        """
        follow_up = world.follow_up()
        world.put_in_flight(follow_up)
        with pytest.raises(FollowUpsError, match="the delivery of 1 follow-up has not ended"):
            delete(world.engine, DeletionScope(world.workspace_id), timedelta(seconds=0.1))
        row = world.row(follow_up)
        assert (row.status, row.cancel_requested) == ("pending", "chat_removed")
        world.sql("UPDATE follow_ups SET status = 'sent', finished_at = now(), begun_at = NULL, lease_until = NULL")
        delete(world.engine, DeletionScope(world.workspace_id))
        assert counts(world) == {"audit_events": 1}

    def test_a_lost_lease_ends_without_a_tick(self, world: World) -> None:
        """If a worker crashes, its attempt ends when the lease expires, even without a tick."""
        world.put_in_flight(world.follow_up())
        world.sql("UPDATE follow_ups SET lease_until = now() + interval '0.3 s'")
        delete(world.engine, DeletionScope(world.workspace_id))
        assert counts(world) == {"audit_events": 1}

    def test_a_concurrently_created_key_is_refused_or_deleted(self, world: World) -> None:
        """If an API key is being created, the workspace's deletion waits, and then deletes the key too."""
        with Session(world.engine) as creating:
            api_keys.create(creating, world.workspace_id)
            with world.engine.connect() as connection:
                connection.execute(text("SET lock_timeout = '100ms'"))
                with Session(connection) as session, pytest.raises(OperationalError, match="lock timeout"):
                    store.begin(session, DeletionScope(world.workspace_id))
            creating.commit()
        delete(world.engine, DeletionScope(world.workspace_id))
        assert counts(world) == {"audit_events": 1}


class TestChat:
    """Deletion of a single chat."""

    def test_a_chats_texts_are_deleted(self, world: World) -> None:
        """Deleting a chat deletes its follow-ups, messages and stored responses.

        Rows of other chats and all audit events remain.
        """
        chat, other = filled(world), filled(world)
        before = counts(world)
        delete(world.engine, DeletionScope(world.workspace_id, chat))
        after = counts(world)
        gone = {name: before[name] - after.get(name, 0) for name in before}
        assert {name: number for name, number in gone.items() if number} == {
            "follow_ups": 3,
            "chat_messages": 3,
            "idempotency_keys": 3,
            "chats": 1,
        }
        assert ("chat.deleted", "ann", 3, str(world.workspace_id)) in events(world)
        with world.engine.connect() as connection:
            bodies = connection.scalars(text("SELECT convert_from(body, 'UTF8') FROM idempotency_keys")).all()
        assert all(str(other) in body for body in bodies)

    def test_an_interrupted_deletion_continues(self, world: World) -> None:
        """If a chat's deletion is interrupted, the chat accepts nothing; a second run completes the deletion."""
        chat = filled(world)
        batches = deletion.delete(world.engine, ACTOR, DeletionScope(world.workspace_id, chat), PATIENCE)
        next(batches)
        batches.close()
        with Session(world.engine) as session, pytest.raises(ChatNotFoundError):
            followups.schedule(
                session, workspace_id=world.workspace_id, chat_id=chat, message="!", due_date=datetime.now(UTC)
            )
        delete(world.engine, DeletionScope(world.workspace_id, chat))
        with world.engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM chats WHERE id = :id"), {"id": chat}) == 0


def test_every_table_of_a_workspace_is_known() -> None:
    """Every table that refers to a workspace has a column by which the workspace's rows are deleted."""
    referring: Sequence[Any] = [
        table
        for table in Base.metadata.sorted_tables
        if any(key.column.table.name in {"workspaces", "chats"} for key in table.foreign_keys)
    ]
    assert all("workspace_id" in table.columns for table in referring)

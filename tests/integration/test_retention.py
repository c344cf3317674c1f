"""Tests of pruning: old rows are deleted, needed rows are kept, and no other transaction waits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from sqlalchemy import text
from sqlalchemy.orm import Session

from followups.delivery import pruner
from followups.delivery.pruner import LOCK, Pruner
from followups.store import api_keys, audit, chats, pruning
from followups.store.audit import Action, Event
from followups.store.chats import Role

if TYPE_CHECKING:
    import pytest
    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)


def ended(world: World, ago: timedelta, **columns: Any) -> UUID:
    """Insert a follow-up that was sent ``ago`` before now."""
    return world.follow_up(status="sent", finished_at=datetime.now(UTC) - ago, **columns)


def pruner_of(engine: Engine, settings: Settings, days: int = 30) -> Pruner:
    """Return a pruner for rows older than the given number of days."""
    return Pruner(settings.model_copy(update={"retention": days * DAY}), engine)


def receive(world: World, chat_id: UUID, ago: timedelta) -> UUID:
    """Store a chat message that a human operator wrote ``ago`` before the current time."""
    message_id = uuid4()
    with Session(world.engine) as session, session.begin():
        chats.receive(
            session,
            world.workspace_id,
            message_id=message_id,
            chat_id=chat_id,
            role=Role.AGENT,
            created_at=datetime.now(UTC) - ago,
        )
    return message_id


def test_old_finished_follow_ups_are_deleted(world: World, engine: Engine, settings: Settings) -> None:
    """A finished follow-up is deleted after its retention period, along with its failed attempts.

    Pruning keeps younger follow-ups and pending ones.
    """
    old, young = ended(world, 31 * DAY), ended(world, 29 * DAY)
    pending = world.follow_up(due=-300 * DAY)
    for one in (old, young):
        world.sql(
            "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail) VALUES (:id, 1, 'retry', '')", id=one
        )
    assert pruner_of(engine, settings).prune() == {
        "idempotency_keys": 0,
        "audit_events": 0,
        "follow_ups": 1,
        "chat_messages": 0,
    }
    assert {row.id for row in world.rows()} == {young, pending}
    assert world.scalar("SELECT count(*) FROM failed_attempts") == 1


def test_without_retention_only_expired_keys_are_deleted(world: World, engine: Engine, settings: Settings) -> None:
    """By default every follow-up is kept, and an idempotency key is deleted after a day."""
    ended(world, 3000 * DAY)
    for key, hours in (("old", 25), ("young", 23)):
        world.sql(
            "INSERT INTO idempotency_keys (workspace_id, key, request_hash, status, body, created_at)"
            " VALUES (:w, :key, '', 201, '', now() - :hours * interval '1 h')",
            w=world.workspace_id,
            key=key,
            hours=hours,
        )
    assert Pruner(settings, engine).prune() == {"idempotency_keys": 1, "audit_events": 0}
    assert world.scalar("SELECT key FROM idempotency_keys") == "young"
    assert len(world.rows()) == 1


def test_old_chat_messages_are_deleted(world: World, engine: Engine, settings: Settings) -> None:
    """Old chat messages are deleted, except the last message of each chat."""
    chat_id, other = uuid4(), uuid4()
    receive(world, chat_id, 50 * DAY)
    receive(world, chat_id, 40 * DAY)
    young = receive(world, chat_id, 5 * DAY)
    last = receive(world, other, 45 * DAY)
    assert pruner_of(engine, settings).prune()["chat_messages"] == 2
    with engine.connect() as connection:
        assert set(connection.scalars(text("SELECT id FROM chat_messages"))) == {young, last}


def test_many_rows_are_deleted_in_batches(
    world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All old rows are deleted in batches, even if rows between them must be kept."""
    monkeypatch.setattr(pruning, "BATCH", 3)
    chat_id = world.chat()
    for n in range(10):
        ended(world, 31 * DAY + n * HOUR, chat_id=chat_id)
        receive(world, uuid4(), 31 * DAY + n * HOUR)  # this message is the last one in its chat
        receive(world, chat_id, 31 * DAY + n * HOUR)  # this message is older than the last one in its chat
    removed = pruner_of(engine, settings).prune()
    assert (removed["follow_ups"], removed["chat_messages"]) == (10, 10)
    assert world.scalar("SELECT count(*) FROM chat_messages") == 10


def test_the_next_run_continues(
    world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pruning run that exceeds its time limit stops after a batch; the next run continues."""
    monkeypatch.setattr(pruning, "BATCH", 3)
    monkeypatch.setattr(pruner, "BUDGET", timedelta(milliseconds=100))
    for _ in range(5):
        ended(world, 31 * DAY)
    one = pruner_of(engine, settings)
    monkeypatch.setattr(pruner, "LEAST_PAUSE", 0.2)
    assert one.prune() == {"idempotency_keys": 0, "audit_events": 0, "follow_ups": 3, "chat_messages": 0}
    assert one.prune()["follow_ups"] == 2


def test_locked_rows_are_skipped(world: World, engine: Engine, settings: Settings) -> None:
    """Pruning skips rows that another transaction has locked."""
    held, free = ended(world, 31 * DAY), ended(world, 31 * DAY)
    with engine.connect() as other:
        other.execute(text("SELECT FROM follow_ups WHERE id = :id FOR SHARE"), {"id": held})
        assert pruner_of(engine, settings).prune()["follow_ups"] == 1
    assert [row.id for row in world.rows()] == [held]
    assert world.rows(free) == []


def test_one_worker_prunes_at_a_time(world: World, engine: Engine, settings: Settings) -> None:
    """While one worker prunes, no other worker does; afterwards, the pruning lock is free."""
    ended(world, 31 * DAY)
    with engine.connect() as other:
        other.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK})
        assert pruner_of(engine, settings).prune() == {}
        other.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK})
    assert pruner_of(engine, settings).prune()["follow_ups"] == 1
    assert (
        world.scalar(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        == 0
    )


def test_a_stop_ends_the_run(world: World, engine: Engine, settings: Settings) -> None:
    """A pruner that is stopped finishes its current batch; starting a running pruner has no effect."""
    ended(world, 31 * DAY)
    one = pruner_of(engine, settings)
    one.start()
    one.start()
    one.stop()
    assert one.prune() == {"idempotency_keys": 0, "audit_events": 0, "follow_ups": 0, "chat_messages": 0}


def test_audit_events_have_a_separate_retention(world: World, engine: Engine, settings: Settings) -> None:
    """Audit events have a separate retention period; if it is 0, they are kept forever."""
    ended(world, 3000 * DAY)
    for days in (31, 29):
        event = Event(audit.SERVICE, Action.PAUSE_BEGUN, number=days)
        with engine.begin() as connection:
            audit.record(connection, event)
        world.sql(
            "UPDATE audit_events SET at = now() - :days * interval '1 day' WHERE id = :id", days=days, id=event.id
        )
    kept = settings.model_copy(update={"audit_retention": 0 * DAY})
    assert Pruner(kept, engine).prune() == {"idempotency_keys": 0}
    brief = settings.model_copy(update={"audit_retention": 30 * DAY})
    assert Pruner(brief, engine).prune() == {"idempotency_keys": 0, "audit_events": 1}
    assert world.scalar("SELECT number FROM audit_events") == 29
    assert len(world.rows()) == 1


def test_keys_that_expired_are_recorded_once(world: World, engine: Engine, settings: Settings) -> None:
    """The expiry of an API key is recorded once, as an audit event with the time of expiry.

    The expiry of a key that was already revoked is not recorded.
    """
    with Session(engine) as session, session.begin():
        expired, revoked, _ = (api_keys.create(session, world.workspace_id, expires=HOUR)[0].id for _ in range(3))
        api_keys.revoke(session, revoked)
    world.sql("UPDATE api_keys SET expires_at = now() - interval '1 day' WHERE id = :id", id=expired)
    world.sql("UPDATE api_keys SET expires_at = now() - interval '1 day', revoked_at = now() - interval '2 days'"
              " WHERE id = :id", id=revoked)  # fmt: skip
    for _ in range(2):
        Pruner(settings, engine).prune()
    with Session(engine) as session:
        [event] = audit.newest(session, audit.AuditFilter(), 10)
    assert (event.action, event.way, event.target_id, event.workspace_id) == (
        "api_key.expired",
        "service",
        expired,
        world.workspace_id,
    )
    assert event.at == world.scalar("SELECT min(expires_at) FROM api_keys WHERE revoked_at IS NULL")

"""Tests of creating a follow-up with a single statement, which changes nothing if a check is undecided."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from followups import scheduling
from followups.statements import run
from followups.store import follow_ups, quotas
from followups.store.quotas import Kind
from web import key_of

if TYPE_CHECKING:
    from followups import FollowUp
    from world import World

DUE = datetime.now(UTC) + timedelta(days=1)


def create(world: World, chat_id: UUID, key_id: UUID | None = None) -> FollowUp | None:
    """Create a follow-up in a single statement, with a valid API key by default."""
    key = key_id or key_of(world)[0]
    with Session(world.engine, expire_on_commit=False) as session, session.begin():
        return run(session, scheduling.scheduling_alone(world.workspace_id, chat_id, "?", DUE, key))


def pending(world: World) -> int:
    """Return the number of pending follow-ups."""
    with world.engine.connect() as connection:
        return connection.execute(text("SELECT count(*) FROM follow_ups WHERE status = 'pending'")).scalar_one()


def test_a_chat_in_order(world: World) -> None:
    """`create_if_clear` inserts the same row as `schedule`."""
    chat_id, (key_id, _) = world.chat(), key_of(world)
    alone = create(world, chat_id, key_id)
    assert alone
    with Session(world.engine, expire_on_commit=False) as session, session.begin():
        rule = scheduling.scheduling(world.workspace_id, chat_id, "?", DUE, key_id)
        twin = run(session, rule)
    differing = {"id", "created_at", "updated_at", "scheduled_at"}
    names = set(alone.__table__.columns.keys()) - differing
    assert {name: getattr(alone, name) for name in names} == {name: getattr(twin, name) for name in names}


@pytest.mark.parametrize(
    "columns",
    [
        {"last_message_role": "user"},
        {"last_message_id": None, "last_message_role": None, "last_message_at": None},
        {"removed_at": text("now()")},
        {"channel": "whatsapp", "last_user_message_at": text("now()")},
        {"channel": "instagram", "last_user_message_at": text("now()")},
    ],
    ids=["reply", "no messages", "removed", "whatsapp", "instagram"],
)
def test_a_chat_that_needs_a_transaction(world: World, columns: dict[str, object]) -> None:
    """If a chat is removed, has a window or does not end with an agent's message, a transaction is needed."""
    assert create(world, world.chat(**columns)) is None
    assert create(world, uuid4()) is None
    assert pending(world) == 0


def test_keys_quotas_and_workspaces(world: World) -> None:
    """`create_if_clear` creates nothing if the key is invalid, a quota exists or a deletion has begun."""
    chat_id = world.chat()
    for change in ("revoked_at = now()", "expires_at = now()"):
        key_id = key_of(world)[0]
        world.sql(f"UPDATE api_keys SET {change} WHERE id = :id", id=key_id)  # noqa: S608 - the texts above
        assert create(world, chat_id, key_id) is None
    assert create(world, chat_id, uuid4()) is None
    with world.engine.begin() as connection:
        quotas.put(connection, world.workspace_id, Kind.PENDING, 10)
    assert create(world, chat_id) is None
    with world.engine.begin() as connection:
        quotas.clear(connection, world.workspace_id, Kind.PENDING)
    assert create(world, chat_id)
    key_id = key_of(world)[0]
    world.sql("UPDATE workspaces SET deletion_began_at = now() WHERE id = :id", id=world.workspace_id)
    assert create(world, chat_id, key_id) is None
    assert pending(world) == 1


def test_a_locked_chat(world: World) -> None:
    """If another transaction has locked the chat, `create_if_clear` returns None without waiting."""
    chat_id = world.chat()
    with world.engine.connect() as connection:
        connection.execute(text("SELECT FROM chats WHERE id = :id FOR NO KEY UPDATE"), {"id": chat_id})
        assert create(world, chat_id) is None
    assert create(world, chat_id)


def test_a_chat_that_is_almost_full(world: World) -> None:
    """If a chat is almost full, its follow-ups are counted in a transaction, so that none is missed."""
    chat_id = world.full_chat()
    world.sql(
        """
        DELETE FROM follow_ups WHERE id IN (
               SELECT id FROM follow_ups WHERE chat_id = :chat_id LIMIT :surplus)
        """,
        chat_id=chat_id,
        surplus=follow_ups.MOST_PENDING - follow_ups.FAR_FROM_FULL + 1,
    )
    assert create(world, chat_id)
    assert create(world, chat_id) is None
    assert pending(world) == follow_ups.FAR_FROM_FULL

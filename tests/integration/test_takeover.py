"""Tests for human takeover: an operator's message cancels the follow-ups scheduled before it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups import scheduling
from followups.store import chats
from world import begun, claim_and_begin

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World


@pytest.fixture
def taken_over(world: World) -> UUID:
    """Return a chat whose last message was written by an operator a minute ago."""
    return world.chat(last_message_role="operator", last_message_at=text("now() - interval '1 min'"))


def schedule(session: Session, world: World, chat_id: UUID) -> UUID:
    """Schedule a follow-up that is due now."""
    now = datetime.now(UTC)
    created = followups.schedule(
        session, workspace_id=world.workspace_id, chat_id=chat_id, message="Still there?", due_date=now
    )
    return created.id


def write(session: Session, world: World, chat_id: UUID, at: datetime | None = None) -> None:
    """Receive an operator's message in the chat."""
    chats.receive(
        session,
        world.workspace_id,
        message_id=uuid4(),
        chat_id=chat_id,
        role=chats.Role.OPERATOR,
        created_at=at,
    )


def test_scheduled_before(world: World, engine: Engine, settings: Settings, taken_over: UUID) -> None:
    """If a follow-up was scheduled before an operator's message, begin cancels it."""
    follow_up = world.follow_up(taken_over, scheduled_at=text("now() - interval '2 min'"))
    beginning = claim_and_begin(engine, settings)
    assert begun(beginning) == set()
    assert [(one, final.reason) for one, final in beginning.ended] == [(follow_up, "human_takeover")]


def test_scheduled_before_and_paused(world: World, engine: Engine, settings: Settings, taken_over: UUID) -> None:
    """An operator's message cancels the follow-ups that were scheduled before it, even paused ones."""
    follow_up = world.follow_up(taken_over, scheduled_at=text("now() - interval '2 min'"))
    world.sql("INSERT INTO pauses (workspace_id) VALUES (:id)", id=world.workspace_id)
    claim_and_begin(engine, settings)
    assert world.row(follow_up).reason == "human_takeover"


@pytest.mark.parametrize("late", [timedelta(0), timedelta(seconds=40)])
def test_scheduled_after(world: World, engine: Engine, settings: Settings, late: timedelta) -> None:
    """An operator's message that is recorded late does not cancel follow-ups scheduled after the message."""
    chat_id = world.chat(last_message_at=text("now() - interval '1 h'"))
    with Session(engine) as session, session.begin():
        before = schedule(session, world, chat_id)
    with Session(engine) as session, session.begin():
        write(session, world, chat_id, datetime.now(UTC) - late)
    with Session(engine) as session, session.begin():
        after = schedule(session, world, chat_id)
    assert begun(claim_and_begin(engine, settings)) == {after}
    assert world.row(before).reason == "human_takeover"


def test_scheduled_after_by_a_transaction_that_began_before(world: World, engine: Engine, settings: Settings) -> None:
    """A transaction that began before an operator's message can still schedule a follow-up afterwards.

    This follow-up is sent, because it was scheduled after the message.
    """
    chat_id = world.chat()
    with Session(engine) as session, session.begin():
        session.execute(text("SELECT now()"))
        with Session(engine) as other, other.begin():
            write(other, world, chat_id)
        after = schedule(session, world, chat_id)
    assert begun(claim_and_begin(engine, settings)) == {after}


def test_moved_and_renamed_after(world: World, engine: Engine, settings: Settings, taken_over: UUID) -> None:
    """If a follow-up is moved or gets a new trigger after an operator's message, it is still sent."""
    moved = world.follow_up(scheduled_at=text("now() - interval '2 min'"))
    other = world.chat(last_message_role="operator")
    with Session(engine) as session, session.begin():
        scheduling.amend(session, moved, {"chat_id": taken_over})
        renamed = schedule(session, world, other)
        scheduling.amend(session, renamed, {"trigger_chat_message_id": uuid4()})
    assert begun(claim_and_begin(engine, settings)) == {moved, renamed}


def test_an_agent_writes_after_the_takeover(world: World, engine: Engine, settings: Settings) -> None:
    """If an agent writes after an operator, a follow-up scheduled in between is still sent."""
    chat_id = world.chat()
    with Session(engine) as session, session.begin():
        write(session, world, chat_id)
        first = schedule(session, world, chat_id)
        kept = {"message_id": uuid4(), "chat_id": chat_id, "role": chats.Role.AGENT, "created_at": None}
        chats.receive(session, world.workspace_id, **kept)
    assert begun(claim_and_begin(engine, settings)) == {first}

"""Manual changes create audit events in the caller's transaction; replies create none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy.orm import Session

import followups
from followups import scheduling
from followups.errors import AlreadyFinishedError, DeliveryInProgressError
from followups.states import Status
from followups.store import audit, chats
from followups.store.audit import Actor, Way
from followups.store.chats import Role

if TYPE_CHECKING:
    from uuid import UUID

    from world import World

HOUR = timedelta(hours=1)
ACTOR = Actor(Way.API, uuid4(), "website")


def events(world: World, follow_up: UUID) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the action, source and details of a follow-up's audit events, oldest first."""
    with Session(world.engine) as session:
        found = audit.newest(session, audit.AuditFilter(target_id=follow_up), 100)
        return [(each.action, each.way, each.details) for each in reversed(found)]


def test_a_cancel_from_python(world: World) -> None:
    """If Python code cancels a follow-up, the audit event names the process's user, but not the reason.

    If a cancel is repeated, rejected or rolled back, no audit event is recorded.
    """
    follow_up = world.follow_up(due=HOUR)
    with Session(world.engine) as session:
        followups.cancel(session, follow_up, reason="Ann's secret")
        session.rollback()
    assert events(world, follow_up) == []
    for _ in range(2):
        with Session(world.engine) as session, session.begin():
            followups.cancel(session, follow_up, reason="Ann's secret")
    with Session(world.engine) as session, pytest.raises(AlreadyFinishedError):
        followups.cancel(session, follow_up, reason="another")
    details = {"fields": ["reason", "status"], "status": "cancelled"}
    assert events(world, follow_up) == [("follow_up.ended", "python", details)]


def test_changes_name_their_fields(world: World) -> None:
    """A change's audit event names the actor, the changed fields and the due dates.

    The audit event contains neither the message nor unchanged fields.
    """
    follow_up = world.follow_up(due=HOUR)
    before, after = world.row(follow_up).due_date, datetime(2100, 1, 31, 9, tzinfo=UTC)
    changes = {"due_date": after, "message": "Ann's secret", "chat_message_id": None}
    with Session(world.engine) as session, session.begin():
        scheduling.amend(session, follow_up, changes, workspace_id=world.workspace_id, actor=ACTOR)
    details = {"fields": ["dueDate", "message"], "from": before.isoformat(), "to": after.isoformat()}
    assert events(world, follow_up) == [("follow_up.changed", "api", details)]


def test_a_rejected_change_is_not_audited(world: World) -> None:
    """A rejected change to a follow-up in flight leaves no audit event."""
    follow_up = world.follow_up()
    world.put_in_flight(follow_up)
    with Session(world.engine) as session, session.begin(), pytest.raises(DeliveryInProgressError):
        scheduling.amend(session, follow_up, {"status": Status.CANCELLED})
    assert events(world, follow_up) == []


def test_a_retry_names_the_new_follow_up(world: World) -> None:
    """A retry's audit event belongs to the failed follow-up and names the new one."""
    failed = world.follow_up(status="failed", reason="rejected: HTTP 403", finished_at=datetime.now(UTC))
    with Session(world.engine) as session, session.begin():
        new = scheduling.retry(session, failed, actor=ACTOR).id
    assert events(world, failed) == [("follow_up.retried", "api", {"retriedAs": str(new)})]
    assert events(world, new) == []


def test_replies_and_removals_are_not_audited(world: World) -> None:
    """If a reply or the removal of a chat cancels a follow-up, no audit event is recorded."""
    chat, other = world.chat(), world.chat()
    ids = [world.follow_up(chat, HOUR), world.follow_up(other, HOUR)]
    with Session(world.engine) as session, session.begin():
        chats.receive(
            session, world.workspace_id, message_id=uuid4(), chat_id=chat, role=Role.USER, created_at=datetime.now(UTC)
        )
        chats.remove_chat(session, world.workspace_id, other)
    assert {world.row(one).status for one in ids} == {"cancelled"}
    assert [events(world, one) for one in ids] == [[], []]

"""Tests of audit events on PostgreSQL: how they are recorded, summed per bulk command and listed."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from followups.store import api_keys, audit
from followups.store.audit import Action, Actor, AuditFilter, Event, Way

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Engine

    from followups.models import AuditEvent
    from world import World


def events(engine: Engine, wanted: AuditFilter | None = None, limit: int = 100) -> Sequence[AuditEvent]:
    """Return the audit events, newest first."""
    with Session(engine) as session:
        return audit.newest(session, wanted or AuditFilter(), limit)


def test_events_name_the_key_and_the_workspace(world: World) -> None:
    """An audit event contains the workspace's name, and the API key's prefix and name."""
    with Session(world.engine) as session, session.begin():
        named, _ = api_keys.create(session, world.workspace_id, "website")
        nameless, _ = api_keys.create(session, world.workspace_id)
        keys = [named.id, nameless.id]
        expected = {f"website ({named.prefix}…)", f"{nameless.prefix}…"}
        for key_id in keys:
            event = Event(Actor(Way.API, key_id), Action.FOLLOW_UP_CHANGED, world.workspace_id, uuid4())
            audit.record(session.connection(), event)
    found = events(world.engine, AuditFilter(actions=[Action.FOLLOW_UP_CHANGED]))
    assert {each.actor for each in found} == expected
    assert {each.actor_id for each in found} == set(keys)
    assert {each.workspace for each in found} == {str(world.workspace_id)}
    assert {(each.way, each.number) for each in found} == {("api", 1)}


def test_events_are_rolled_back_with_their_change(world: World) -> None:
    """A rolled-back action leaves no audit event."""
    with world.engine.connect() as connection:
        audit.record(connection, Event(audit.SERVICE, Action.WORKSPACE_CREATED))
        connection.rollback()
    assert events(world.engine) == []


def test_batches_add_up(world: World) -> None:
    """A single audit event sums up all committed batches of one command."""
    run = uuid4()
    for number, committed in ((500, True), (70, False), (3, True)):
        with world.engine.connect() as connection:
            user = audit.user_of_process(Way.COMMAND)
            event = Event(user, Action.FOLLOW_UPS_CANCELLED, world.workspace_id, number=number, id=run)
            audit.record(connection, event)
            (connection.commit if committed else connection.rollback)()
    assert [(each.id, each.number, bool(each.actor)) for each in events(world.engine)] == [(run, 503, True)]


def test_filters(world: World) -> None:
    """Audit events are filtered by workspace, time, action and target, and paged newest first."""
    other, target = uuid4(), uuid4()
    made = [
        Event(audit.SERVICE, Action.FOLLOW_UP_ENDED, world.workspace_id, target),
        Event(audit.SERVICE, Action.FOLLOW_UP_CHANGED, world.workspace_id, target),
        Event(audit.SERVICE, Action.PAUSE_BEGUN, other, details={"channel": "waha"}),
    ]
    for event in made:
        with world.engine.begin() as connection:
            audit.record(connection, event)
    newest_first = [event.id for event in reversed(made)]
    assert [each.id for each in events(world.engine)] == newest_first
    assert [each.id for each in events(world.engine, AuditFilter(workspace_id=other))] == newest_first[:1]
    assert [each.id for each in events(world.engine, AuditFilter(target_id=target))] == newest_first[1:]
    assert [each.id for each in events(world.engine, AuditFilter(actions=[Action.FOLLOW_UP_ENDED]))] == newest_first[2:]
    last = events(world.engine, limit=1)[0]
    assert last.details == {"channel": "waha"}
    assert last.workspace is None  # no workspace has that id
    assert [each.id for each in events(world.engine, AuditFilter(since=last.at))] == newest_first[:1]
    assert events(world.engine, AuditFilter(since=last.at + timedelta(seconds=1))) == []
    with Session(world.engine) as session:
        assert [each.id for each in audit.newest(session, AuditFilter(), 1, (last.at, last.id))] == newest_first[1:2]


@pytest.mark.parametrize("column", ["way = 'magic'", "number = -1"])
def test_invalid_events_are_rejected(world: World, column: str) -> None:
    """The audit table rejects unknown sources and negative counts."""
    with world.engine.begin() as connection:
        audit.record(connection, Event(audit.SERVICE, Action.PAUSE_BEGUN))
    with pytest.raises(IntegrityError), world.engine.begin() as connection:
        connection.execute(text(f"UPDATE audit_events SET {column}"))  # noqa: S608 - SQL from this file

"""Administration: each manual change leaves one audit event in the same transaction as the change.

An action that changes nothing leaves no audit event.
"""

from __future__ import annotations

from datetime import time
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy.orm import Session

from followups.errors import ApiKeyNotFoundError, InvalidRequestError
from followups.operations import administration
from followups.sending_hours import SendingHours
from followups.store import audit, pauses, rate_limits
from followups.store.audit import Actor, AuditFilter, Way

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

ACTOR = Actor(Way.CONSOLE, uuid4(), "ann@example.com")
HOURS = SendingHours("Europe/Berlin", time(8), time(20), frozenset({0, 4}))

CHANGES: dict[str, Callable[[Session, UUID], object]] = {
    "api_key.created": lambda s, w: administration.create_key(s, ACTOR, w, "website"),
    "pause.begun": lambda s, w: administration.pause(s, ACTOR, pauses.PauseScope(w, "waha")),
    "pause.ended": lambda s, w: administration.resume(s, ACTOR, pauses.PauseScope(w, "waha")),
    "rate_limit.set": lambda s, w: administration.set_limit(s, ACTOR, rate_limits.LimitScope(w, None, "all"), 5, 2),
    "rate_limit.cleared": lambda s, w: administration.clear_limit(s, ACTOR, rate_limits.LimitScope(w, None, "all")),
    "sending_hours.set": lambda s, w: administration.set_hours(s, ACTOR, w, HOURS),
    "sending_hours.cleared": lambda s, w: administration.clear_hours(s, ACTOR, w),
}
"""Administrative actions, ordered so that each of them changes something."""
DETAILS = {
    "pause.begun": {"channel": "waha"},
    "rate_limit.set": {"channel": None, "per": "all", "rate": 5, "burst": 2},
    "sending_hours.set": {"timeZone": "Europe/Berlin", "from": "08:00", "to": "20:00", "days": ["mon", "fri"]},
}


def recorded(world: World, *, everywhere: bool = False) -> list[tuple[str, str, str]]:
    """Return the action, source and actor of each audit event, oldest first."""
    wanted = AuditFilter() if everywhere else AuditFilter(workspace_id=world.workspace_id)
    with Session(world.engine) as session:
        return [(each.action, each.way, each.actor) for each in reversed(audit.newest(session, wanted, 100))]


def test_every_change_is_recorded(world: World) -> None:
    """For each administrative change, one audit event records the actor, the workspace and details."""
    for change in CHANGES.values():
        with Session(world.engine) as session, session.begin():
            change(session, world.workspace_id)
    assert recorded(world) == [(action, "console", "ann@example.com") for action in CHANGES]
    with Session(world.engine) as session:
        found = {each.action: each.details for each in audit.newest(session, AuditFilter(), 100)}
    assert {action: found[action] for action in DETAILS} == DETAILS


def test_changes_that_are_rolled_back_are_not_recorded(world: World) -> None:
    """Audit events are committed or rolled back together with their changes."""
    with Session(world.engine) as session:
        for change in CHANGES.values():
            change(session, world.workspace_id)
        session.rollback()
    assert recorded(world) == []


def test_no_change_is_not_recorded(world: World) -> None:
    """Actions without an effect, such as a second pause, are not audited."""
    scope, limit = pauses.PauseScope(world.workspace_id, None), rate_limits.LimitScope(None, None, "all")
    with Session(world.engine) as session, session.begin():
        assert administration.pause(session, ACTOR, scope)
    with Session(world.engine) as session, session.begin():
        assert not administration.pause(session, ACTOR, scope)
        assert not administration.clear_limit(session, ACTOR, limit)
        assert not administration.clear_hours(session, ACTOR, world.workspace_id)
        assert administration.create_workspace(session, ACTOR, str(world.workspace_id))[1] is False
        with pytest.raises(ApiKeyNotFoundError):
            administration.revoke_key(session, ACTOR, uuid4())
        with pytest.raises(InvalidRequestError):
            administration.create_key(session, ACTOR, world.workspace_id, "x" * 201)
    assert recorded(world, everywhere=True) == [("pause.begun", "console", "ann@example.com")]


def test_a_key_is_revoked_once(world: World) -> None:
    """If an API key is revoked twice, only one audit event is recorded."""
    with Session(world.engine) as session, session.begin():
        workspace, _ = administration.create_workspace(session, ACTOR, "acme")
        row, key = administration.create_key(session, ACTOR, workspace.id)
        ids = [workspace.id, row.id, row.id]
    for _ in range(2):
        with Session(world.engine) as session, session.begin():
            administration.revoke_key(session, ACTOR, ids[1])
    with Session(world.engine) as session:
        found = audit.newest(session, AuditFilter(workspace_id=ids[0]), 100)
    expected = {"workspace.created", "api_key.created", "api_key.revoked"}
    assert {each.action for each in found} == expected
    assert sorted(str(each.target_id) for each in found) == sorted(map(str, ids))
    assert key not in str([each.details for each in found])

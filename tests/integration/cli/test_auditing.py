"""The `audit` command: manual changes, who made them, and the commands that record them."""

from __future__ import annotations

import os
import pwd
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from followups.cli import connection
from followups.store import audit, bulk_cancel
from followups.store.audit import Action, Event

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

    RunCommand = Callable[..., Any]

HOUR = timedelta(hours=1)
ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture(autouse=True)
def _no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevent the command from requesting a tick."""
    monkeypatch.setattr(connection, "ask_for_tick", lambda: None)


def actions(run: RunCommand, *arguments: object) -> list[str]:
    """Return the actions that `audit` lists, oldest first."""
    return [event["action"] for event in reversed(run("audit", "--json", *arguments).document)]


def test_each_command_is_recorded(run: RunCommand) -> None:
    """Each change to workspaces, keys, pauses, limits or sending hours leaves one audit event.

    The audit event's actor is the operating-system user.
    """
    assert run("api-key", "create", "--workspace", "acme").code == 2  # the workspace "acme" does not exist yet
    run("workspace", "create", "acme")
    key = run("api-key", "create", "--workspace", "acme", "--name", "website", "--json").document
    for command in (
        ("api-key", "revoke", key["id"]),
        ("api-key", "revoke", key["id"]),
        ("pause", "--workspace", "acme"),
        ("pause", "--workspace", "acme"),
        ("resume", "--workspace", "acme"),
        ("limit", "set", "5/s", "--workspace", "acme", "--channel", "waha"),
        ("limit", "clear", "--workspace", "acme", "--channel", "waha"),
        ("limit", "clear", "--workspace", "acme"),
        ("workspace", "hours", "acme", "--time-zone", "UTC", "--from", "08:00", "--to", "20:00"),
        ("workspace", "hours", "acme"),
        ("workspace", "hours", "acme", "--always"),
    ):
        assert run(*command).code == 0
    events = run("audit", "--workspace", "acme", "--json").document
    assert [event["action"] for event in reversed(events)] == [
        "workspace.created",
        "api_key.created",
        "api_key.revoked",
        "pause.begun",
        "pause.ended",
        "rate_limit.set",
        "rate_limit.cleared",
        "sending_hours.set",
        "sending_hours.cleared",
    ]
    assert {(event["way"], event["actor"], event["workspace"]) for event in events} == {("command", ME, "acme")}
    limit = next(event for event in events if event["action"] == "rate_limit.set")
    assert limit["details"] == {"channel": "waha", "per": "all", "rate": 5, "burst": 5}
    assert key["key"] not in str(events)


def test_filters_and_table(run: RunCommand, world: World) -> None:
    """`audit` filters by workspace, time, action and follow-up, and prints one table line per event."""
    follow_up = world.follow_up(due=HOUR)
    other = type(world)(world.engine)
    for event in (
        Event(audit.SERVICE, Action.API_KEY_EXPIRED, other.workspace_id),
        Event(audit.SERVICE, Action.FOLLOW_UP_CHANGED, world.workspace_id, follow_up, details={"fields": ["dueDate"]}),
    ):
        with world.engine.begin() as opened:
            audit.record(opened, event)
    assert actions(run) == ["api_key.expired", "follow_up.changed"]
    assert actions(run, "--workspace", world.workspace_id) == ["follow_up.changed"]
    assert actions(run, "--follow-up", follow_up) == ["follow_up.changed"]
    assert actions(run, "--follow-up", uuid4()) == []
    assert actions(run, "--action", "api_key.expired", "--action", "api_key.created") == ["api_key.expired"]
    assert actions(run, "--since", "1h") == actions(run)
    assert actions(run, "--since", "2100-01-31T09:00:00Z") == []
    heading, line = run("audit", "--follow-up", follow_up).stdout.splitlines()
    assert heading.split() == ["AT", "BY", "WORKSPACE", "ACTION", "TARGET", "NUMBER", "DETAILS"]
    for word in ("service followups", str(world.workspace_id), "follow_up.changed", str(follow_up), "fields dueDate"):
        assert word in line
    ran = run("audit", "--limit", 1)
    assert "There are more" in ran.stderr
    assert run("audit", "--workspace", "nowhere").code == 2
    assert run("audit", "--action", "magic").code == 2


def test_bulk_commands_are_one_event_each(run: RunCommand, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bulk command records one audit event with the total count of all its batches.

    A dry run records no audit event.
    """
    monkeypatch.setattr(bulk_cancel, "BATCH", 2)
    name = str(world.workspace_id)
    world.burst([HOUR] * 5)
    for command in (
        ("cancel", "--workspace", name, "--dry-run"),
        ("cancel", "--workspace", name, "--yes", "--reason", "wrong campaign"),
        ("cancel", "--workspace", name, "--yes"),
    ):
        assert run(*command).code == 0
    for _ in range(3):
        world.follow_up(due=-HOUR, status="failed", reason="rejected: HTTP 403", finished_at=datetime.now(UTC))
    assert run("retry", "--failed", "--since", "1h", "--workspace", name, "--yes").code == 0
    assert run("prune", "--older-than", "0s", "--yes").code == 0
    events = run("audit", "--json").document
    assert [(event["action"], event["number"], event["workspace"]) for event in reversed(events)] == [
        ("follow_ups.cancelled", 5, name),
        ("follow_ups.retried", 3, name),
        ("follow_ups.pruned", 8, None),
    ]
    assert "wrong campaign" not in str(events)

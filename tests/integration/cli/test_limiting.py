"""The commands `limit set`, `limit clear`, `limit list` and `limit quota`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

    RunCommand = Callable[..., Any]


def test_set_listed_changed_and_cleared(run: RunCommand, world: World) -> None:
    """A rate limit is listed as entered, changed by `limit set`, and can be removed."""
    name = str(world.workspace_id)
    assert run("limit", "set", "50/s", "--workspace", name).stdout == f"Workspace {name}: 50/s, 50 at once.\n"
    ran = run("limit", "set", "20/min", "--channel", "whatsapp", "--each", "chat")
    assert ran.stdout == "Each chat of channel whatsapp: 20/min, 1 at once.\n"
    ran = run("limit", "set", "1000/h", "--workspace", name, "--burst", "7", "--json")
    assert [(one["workspace"], one["channel"], one["each"], one["burst"]) for one in ran.document] == [
        (None, "whatsapp", "chat", 1),
        (name, None, None, 7),
    ]
    heading, first, second = run("limit", "list").stdout.splitlines()
    assert heading.split() == ["WORKSPACE", "CHANNEL", "EACH", "RATE", "BURST", "SINCE"]
    assert first.split()[:5] == ["all", "whatsapp", "chat", "20/min", "1"]
    assert second.split()[:5] == [name, "all", "-", "1000/h", "7"]
    assert run("limit", "clear", "--channel", "whatsapp").stdout == "Channel whatsapp: there was no limit.\n"
    ran = run("limit", "clear", "--channel", "whatsapp", "--each", "chat")
    assert ran.stdout == "Each chat of channel whatsapp: no limit any more.\n"
    ran = run("limit", "clear", "--workspace", name, "--json")
    assert ran.document == {"cleared": True, "limits": []}
    assert run("limit", "list").stderr == "There are no rate limits.\n"
    assert run("limit", "list", "--json").document == []


def test_a_limit_without_a_target(run: RunCommand) -> None:
    """`limit set` without a target limits all messages, either in total or per workspace."""
    assert run("limit", "set", "2000/s").stdout == "Everything: 2000/s, 2,000 at once.\n"
    assert run("limit", "set", "100/s", "--each", "workspace").stdout == "Each workspace: 100/s, 100 at once.\n"
    assert [one["each"] for one in run("limit", "list", "--json").document] == [None, "workspace"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("set", "fast"),
        ("set", "0/s"),
        ("set", "-1/s"),
        ("set", "1e3/s"),
        ("set", "2000000/s"),
        ("set", "5/s", "--burst", "0"),
        ("set", "5/s", "--each", "message"),
        ("set", "5/s", "--channel", "telegraph"),
        ("set", "5/s", "--workspace", "nobody"),
        ("clear", "--workspace", "nobody"),
        ("clear", "--workspace", "x", "--each", "workspace"),
        ("set",),
    ],
)
def test_wrong_choices(run: RunCommand, arguments: tuple[str, ...]) -> None:
    """An invalid rate or an unknown workspace is a usage error, reported in one sentence."""
    ran = run("limit", *arguments)
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.startswith("followups: ")
    assert ran.stderr.count("\n") == 1


def test_show_names_the_limits(run: RunCommand, world: World) -> None:
    """`show` names the rate limits, if any, that defer a follow-up."""
    run("limit", "set", "50/s", "--workspace", world.workspace_id)
    run("limit", "set", "1/min", "--each", "chat")
    waits, pending = world.follow_up(), world.follow_up()
    world.sql(
        "UPDATE follow_ups SET next_attempt_at = now() + interval '90 s', limited_until = now() + interval '90 s'"
        " WHERE id = :id",
        id=waits,
    )
    shown = run("show", waits).stdout
    assert "The follow-up is due, and waits for the rate limits of 1/min for each chat and 50/s for" in shown
    document = run("show", waits, "--json").document
    assert [(one["each"], one["rate"]) for one in document["rateLimits"]] == [("chat", 1 / 60), (None, 50.0)]
    assert document["limitedUntil"] == document["nextAttemptAt"]
    assert "rate limit" not in run("show", pending, "--json").document["explanation"]


def test_quotas(run: RunCommand, world: World) -> None:
    """A quota can be set, shown, changed and removed; each change is audited.

    Invalid quotas are rejected.
    """
    name = str(world.workspace_id)
    world.follow_up()
    assert run("limit", "quota").stderr == "There is no quota.\n"
    ran = run("limit", "quota", "--workspace", name, "--pending", "100,000", "--chats", "7", "--json")
    assert ran.document == [
        {"workspace": name, "of": "chats", "most": 7, "now": 1},
        {"workspace": name, "of": "pending", "most": 100_000, "now": 1},
    ]
    ran = run("limit", "quota", "--workspace", name, "--chats", "none", "--pending", "0")
    assert ran.stdout.splitlines()[-1].split() == [name, "pending", "follow-ups", "0", "0"]
    events = world.scalar("SELECT string_agg(action, ' ' ORDER BY at) FROM audit_events")
    assert sorted(events.split()) == ["quota.cleared", "quota.set", "quota.set", "quota.set"]
    for wrong in (("--pending", "5"), ("--workspace", name, "--pending", "-1"), ("--workspace", "x", "--chats", "1")):
        assert run("limit", "quota", *wrong).code == 2

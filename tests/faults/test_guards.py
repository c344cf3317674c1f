"""Each guard in the SQL: with it its scenario keeps the promise, without it that very promise breaks."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest

from faults import guards
from faults.guards import PromiseBroken, Scene, without

if TYPE_CHECKING:
    from collections.abc import Callable

    from followups.settings import Settings
    from world import World

BEGIN, SETTLE, CLAIM = "SET begun_at = now()", "accepted_ago", "WITH head AS MATERIALIZED"
TOKEN = "AND f.lease_token = b.token"  # noqa: S105 - a fencing token
BEGUN_ORM = " AND follow_ups.begun_at IS NULL"


class Guard(NamedTuple):
    """Which statements hold it, what is put in place of it, and what then breaks."""

    within: str
    cuts: dict[str, str]
    scenario: Callable[[Scene], None]


CATALOGUE = {
    "token at begin": Guard(BEGIN, {TOKEN: ""}, guards.stale_hint_begins),
    "begun at begin": Guard(BEGIN, {"AND f.begun_at IS NULL": ""}, guards.repeated_hint_begins),
    "lease at begin": Guard(BEGIN, {"AND f.lease_until > now()": ""}, guards.ended_lease_begins),
    # A cancel takes the lease too, so that each of the two is enough.
    "pending and lease at begin": Guard(
        BEGIN, {"AND f.status = 'pending'": "", "AND f.lease_until > now()": ""}, guards.cancelled_begins
    ),
    "order at begin": Guard(BEGIN, {"e.status = 'pending'": "false"}, guards.later_one_begins),
    "silence at begin": Guard(
        BEGIN,
        {"NOT COALESCE(c.last_message_role = 'user', false)": "true"},
        guards.begins_in(lambda scene: scene.world.chat(last_message_role="user")),
    ),
    "removed chat at begin": Guard(
        BEGIN,
        {"c.removed_at IS NULL": "true"},
        guards.begins_in(lambda scene: scene.world.chat(removed_at="2020-01-01T00:00:00Z")),
    ),
    "window at begin": Guard(
        BEGIN,
        {"c.channel IN (": "false AND c.channel IN ("},
        guards.begins_in(lambda scene: scene.world.chat(channel="whatsapp")),
    ),
    "lateness at begin": Guard(
        BEGIN,
        {"now() >= GREATEST(f.due_date, f.scheduled_at)": "now() < '-infinity'::timestamptz"},
        guards.begins_in(lambda scene: scene.world.chat(), due=-timedelta(days=3), scheduled_at="2020-01-01T00:00:00Z"),
    ),
    "not early at begin": Guard(
        BEGIN, {"f.due_date) > now() +": "f.due_date) > 'infinity'::timestamptz +"}, guards.put_off_begins
    ),
    "token at settle": Guard(SETTLE, {TOKEN: ""}, guards.stale_result_settles),
    "pending and begun at settle": Guard(
        SETTLE, {"AND f.status = 'pending'": "", "AND f.begun_at IS NOT NULL": ""}, guards.result_settles_again
    ),
    "cancel requested at settle": Guard(
        SETTLE, {"(r.yields AND f.cancel_requested IS NOT NULL)": "false"}, guards.reply_in_flight_is_forgotten
    ),
    "lease at claim": Guard(
        CLAIM, {"f.lease_until IS NULL OR f.lease_until <= now()": "true"}, guards.leased_is_claimed
    ),
    "token at claim": Guard(CLAIM, {"f.lease_token + 1": "f.lease_token"}, guards.token_stays),
    "pending at claim": Guard(CLAIM, {"f.status = 'pending'": "true"}, guards.ended_is_claimed),
    "lock at claim": Guard(CLAIM, {"FOR NO KEY UPDATE SKIP LOCKED": ""}, guards.claimed_at_once),
    "token at release": Guard("SET lease_until = NULL FROM held", {TOKEN: ""}, guards.stale_release),
    "token at end": Guard("held.status", {TOKEN: ""}, guards.stale_end),
    # The lock refuses what is in flight, the UPDATE says so again, and a constraint of the table says so too.
    "begun at cancel": Guard(
        "follow_ups", {BEGUN_ORM: "", "lease_until=": "begun_at=NULL, lease_until="}, guards.cancelled_in_flight
    ),
    "workspace": Guard(
        "FROM follow_ups",
        {"AND follow_ups.workspace_id = ": "AND follow_ups.workspace_id <> "},
        guards.another_workspaces,
    ),
    "wake at the end": Guard(
        "SET waits_for = NULL", {"f.waits_for = ANY": "false AND f.waits_for = ANY"}, guards.nobody_wakes
    ),
    "lock of the chat": Guard("FROM chats", {"FOR NO KEY UPDATE": ""}, guards.created_behind_a_reply),
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_with_the_guard(name: str, world: World, settings: Settings) -> None:
    """The scenario keeps its promise."""
    CATALOGUE[name].scenario(Scene(world, settings))


@pytest.mark.parametrize("name", CATALOGUE)
def test_without_the_guard(name: str, world: World, settings: Settings) -> None:
    """Without this guard, that very promise breaks."""
    guard = CATALOGUE[name]
    with pytest.raises(PromiseBroken), without(world.engine, guard.within, guard.cuts):
        guard.scenario(Scene(world, settings))

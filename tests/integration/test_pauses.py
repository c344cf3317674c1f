"""Tests of pauses: a paused follow-up does not begin, slows down no claim, and is released later."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups.delivery import hold
from followups.delivery.claim import claim
from followups.scheduling import amend
from followups.store import chat_order, leases, obstacles, pauses
from followups.store.pauses import PauseScope
from world import begun, claim_and_begin

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)


def pause(world: World, channel: str | None = None, *, everybody: bool = False) -> PauseScope:
    """Pause the workspace, or a channel in all workspaces."""
    scope = PauseScope(None if everybody else world.workspace_id, channel)
    with world.engine.begin() as connection:
        assert pauses.pause(connection, scope)
    return scope


def resume(world: World, scope: PauseScope) -> int:
    """End the pause of ``scope``, and return how many follow-ups were released."""
    with world.engine.begin() as connection:
        assert pauses.resume(connection, scope)
    return free(world)


def free(world: World) -> int:
    """Release follow-ups that no current pause holds, and return how many were released."""
    with world.engine.begin() as connection:
        return pauses.release_orphaned(connection)


def test_a_paused_workspace(world: World, engine: Engine, settings: Settings) -> None:
    """A paused follow-up is not claimed and uses up no attempt; other follow-ups begin as usual."""
    others = type(world)(engine)
    mine, theirs = world.follow_up(), others.follow_up()
    scope = pause(world)
    assert begun(claim_and_begin(engine, settings)) == {theirs}
    row = world.row(mine)
    assert (row.status, row.attempts, row.snoozes, row.lease_until) == ("pending", 0, 0, None)
    assert row.next_attempt_at.year == 9998
    assert claim(engine, settings).leases == ()
    assert resume(world, scope) == 1
    assert begun(claim_and_begin(engine, settings)) == {mine}
    assert world.row(mine).attempts == 1


@pytest.mark.parametrize("everybody", [True, False])
def test_a_paused_channel(world: World, engine: Engine, settings: Settings, *, everybody: bool) -> None:
    """If a channel is paused in one or all workspaces, follow-ups of other channels still begin."""
    others = type(world)(engine)
    stopped = world.follow_up(world.chat(channel="waha"))
    kept = world.follow_up(world.chat(channel="matrix"))
    theirs = others.follow_up(others.chat(channel="waha"))
    pause(world, "waha", everybody=everybody)
    assert begun(claim_and_begin(engine, settings)) == {kept} | (set() if everybody else {theirs})
    assert world.row(stopped).pause_id is not None


def test_two_pauses_overlap(world: World, engine: Engine, settings: Settings) -> None:
    """If two pauses hold a follow-up, both must end before it is sent."""
    follow_up = world.follow_up(world.chat(channel="waha"))
    first, second = pause(world), pause(world, "waha", everybody=True)
    assert begun(claim_and_begin(engine, settings)) == set()
    assert resume(world, first) == 1
    assert begun(claim_and_begin(engine, settings)) == set()
    assert resume(world, second) == 1
    assert begun(claim_and_begin(engine, settings)) == {follow_up}


def test_follow_ups_not_due_stay_unchanged(world: World, engine: Engine, settings: Settings) -> None:
    """When a pause ends, follow-ups that are not yet due stay unchanged."""
    later = world.follow_up(due=HOUR)
    scope = pause(world)
    claim_and_begin(engine, settings)
    assert resume(world, scope) == 0
    assert world.row(later).next_attempt_at is None


def test_order_within_the_chat_is_kept(world: World, engine: Engine, settings: Settings) -> None:
    """A follow-up is not sent before an earlier, paused follow-up of the same chat."""
    chat = world.chat()
    first, second = world.follow_ups_at_once([(chat, -2 * SECOND), (chat, -SECOND)])
    scope = pause(world)
    claim_and_begin(engine, settings)
    assert (world.row(first).pause_id is not None, world.row(second).waits_for) == (True, first)
    resume(world, scope)
    assert begun(claim_and_begin(engine, settings)) == {first}
    with engine.begin() as connection:
        assert chat_order.unblock_orphaned(connection) == 0
    assert world.row(second).waits_for == first


def test_paused_follow_ups_can_be_cancelled_and_rescheduled(world: World, engine: Engine, settings: Settings) -> None:
    """A paused follow-up can be cancelled; if rescheduled, it is not held before the new due date."""
    cancelled, moved = world.follow_up(), world.follow_up()
    scope = pause(world)
    claim_and_begin(engine, settings)
    due = datetime.now(UTC) + HOUR
    with Session(engine) as session, session.begin():
        followups.cancel(session, cancelled, reason="never mind")
        amend(session, moved, {"due_date": due})
    assert world.row(cancelled).status == "cancelled"
    row = world.row(moved)
    assert (row.due_date, row.next_attempt_at, row.pause_id) == (due, None, None)
    assert resume(world, scope) == 0


def test_paused_follow_ups_can_end(world: World, engine: Engine, settings: Settings) -> None:
    """A paused follow-up ends when it may no longer be sent."""
    late = world.follow_up(due=-HOUR, scheduled_at=text("now() - interval '1 h'"))
    pause(world)
    brief = settings.model_copy(update={"max_lateness": SECOND})
    assert claim_and_begin(engine, brief).ended[0][0] == late


def test_interrupted_while_resuming(world: World, engine: Engine, settings: Settings) -> None:
    """An interrupted resume can be run again; follow-ups held by other pauses stay held."""
    others = type(world)(engine)
    ids = [world.follow_up() for _ in range(5)]
    theirs = others.follow_up()
    scope = pause(world)
    pause(others)
    claim_and_begin(engine, settings)
    with engine.begin() as connection:
        assert pauses.resume(connection, scope)
        assert pauses.count_orphaned(connection) == 5
    with engine.connect() as other:
        other.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": ids[0]})
        assert free(world) == 4
    assert free(world) == 1
    assert free(world) == 0
    assert world.row(theirs).pause_id is not None


def test_resumed_during_the_hold(world: World, engine: Engine, settings: Settings) -> None:
    """A resume waits for a concurrent pause, so that no follow-up stays paused forever."""
    follow_up = world.follow_up()
    scope = pause(world)
    (lease,) = claim(engine, settings).leases
    freed: list[int] = []
    with engine.connect() as holding:
        found = obstacles.find(holding, [lease], leases.Rules(settings.lease, settings.max_lateness, SECOND))
        assert hold.hold(holding, settings, found)[0] == {follow_up}
        resuming = threading.Thread(target=lambda: freed.append(resume(world, scope)))
        resuming.start()
        resuming.join(0.3)
        assert resuming.is_alive()
        holding.commit()
        resuming.join(10)
    assert freed == [1]
    assert begun(claim_and_begin(engine, settings)) == {follow_up}


def test_many_are_released_in_batches(
    world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a pause ends, its follow-ups are released in batches."""
    monkeypatch.setattr(pauses, "BATCH", 10)
    world.burst([timedelta(0)] * 25)
    scope = pause(world)
    claim_and_begin(engine, settings)
    assert [resume(world, scope), free(world), free(world), free(world)] == [10, 10, 5, 0]


def test_a_pause_that_was_deleted_by_hand(world: World, engine: Engine, settings: Settings) -> None:
    """A follow-up whose pause was deleted manually is released, unless another pause holds it."""
    worlds = [world, *(type(world)(engine) for _ in range(4))]
    ids = [one.follow_up() for one in worlds]
    for one in worlds:
        pause(one)
    claim_and_begin(engine, settings)
    deleted = worlds[1:4:2]
    for one in deleted:
        world.sql("DELETE FROM pauses WHERE workspace_id = :id", id=one.workspace_id)
    with engine.begin() as connection:
        assert pauses.count_orphaned(connection) == 2
    assert (free(world), free(world)) == (2, 0)
    assert begun(claim_and_begin(engine, settings)) == {ids[1], ids[3]}
    assert all(world.row(ids[n]).pause_id is not None for n in (0, 2, 4))

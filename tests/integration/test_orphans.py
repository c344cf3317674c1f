"""Orphaned follow-ups wait for something that no longer exists; a tick finds them."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from cursors import intercepted
from followups.delivery import dispatcher
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.delivery.dispatcher import Dispatcher
from followups.delivery.hints import leases_of
from followups.store import pauses
from followups.store.pauses import PauseScope
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.hints import Hint
    from followups.settings import Settings
    from world import World

SECOND = timedelta(seconds=1)
STATES = "SELECT max(last_tick_at) FROM dispatcher_state"


def locked_when_the_earlier_one_was_cancelled(world: World, settings: Settings) -> UUID:
    """Return a follow-up that was locked when its chat's earlier follow-up was cancelled."""
    chat = world.chat()
    first, second = world.follow_ups_at_once([(chat, -2 * SECOND), (chat, -SECOND)])
    leases = claim(world.engine, settings).leases
    begin(world.engine, settings, [lease for lease in leases if lease.id == second])
    assert world.row(second).waits_for == first
    with world.engine.connect() as other, Session(world.engine) as session, session.begin():
        other.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": second})
        followups.cancel(session, first, reason="never mind")
    return second


def paused_by_a_pause_that_was_deleted(world: World, settings: Settings) -> UUID:
    """Return a follow-up that is still held by a pause whose row was deleted manually."""
    follow_up = world.follow_up()
    with world.engine.begin() as connection:
        pauses.pause(connection, PauseScope(world.workspace_id, None))
    begin(world.engine, settings, claim(world.engine, settings).leases)
    world.sql("DELETE FROM pauses")
    return follow_up


@pytest.mark.parametrize("make_orphan", [locked_when_the_earlier_one_was_cancelled, paused_by_a_pause_that_was_deleted])
def test_the_next_ticks_find_an_orphan(
    world: World,
    engine: Engine,
    settings: Settings,
    make_orphan: Callable[[World, Settings], UUID],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even with long leases, an orphaned follow-up is found within two ticks by a cheap search."""
    # on a busy machine, even a single search may seem expensive
    monkeypatch.setattr(dispatcher, "ORPHAN_SEARCH_SHARE", 1.0)
    patient = settings.model_copy(update={"lease": timedelta(hours=1)})
    hints: list[Hint] = []
    ticking = Dispatcher(patient, engine, hints.append)
    ticking.start()
    ticking.tick()
    wait_until(lambda: world.scalar(STATES))
    orphan = make_orphan(world, patient)

    def found() -> bool:
        ticking.tick()
        return orphan in {lease.id for hint in hints for lease in leases_of(*hint)}

    try:
        wait_until(found)
    finally:
        ticking.stop()


def test_an_expensive_search_runs_rarely(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a search for orphaned follow-ups is expensive, it is repeated rarely, and claims continue."""
    monkeypatch.setattr(dispatcher, "ORPHAN_SEARCH_SHARE", 1e-9)
    seen: Counter[str] = Counter()

    def note(statement: str, _parameters: object) -> str:
        seen.update(["look"] if "ended AS MATERIALIZED" in statement else ["claim"] if "looked AS" in statement else [])
        return statement

    ticking = Dispatcher(settings.model_copy(update={"lease": timedelta(hours=1)}), engine, lambda _: None)

    def claimed() -> bool:
        ticking.tick()
        return seen["claim"] >= 3

    with intercepted(engine, note):
        ticking.start()
        wait_until(claimed)
        ticking.stop()
    assert seen["look"] == 1

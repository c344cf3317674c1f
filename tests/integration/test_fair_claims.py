"""Tests of fair claims: the workspaces with the fewest follow-ups in flight are served first.

Fair claims never exceed the maximum number of follow-ups in flight.
"""

from __future__ import annotations

import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from followups.delivery import claim as claiming
from followups.delivery import claim_interval, dispatcher
from followups.delivery.begin import begin
from followups.delivery.claim import claim, claim_fairly
from followups.delivery.hints import leases_of
from followups.store import claims
from followups.store.leases import key_of
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.hints import Hint
    from followups.settings import Settings
    from followups.store.claims import Claim

SECOND = timedelta(seconds=1)
LEASED = "SELECT count(*) FROM follow_ups WHERE lease_until > now()"


def worlds_of(engine: Engine, *counts: int, due: timedelta = timedelta(0)) -> list[World]:
    """Create and return workspaces with the given ``counts`` of overdue follow-ups.

    The follow-ups of each workspace are all due before those of the next workspace.
    """
    worlds = [World(engine) for _ in counts]
    for number, (world, count) in enumerate(zip(worlds, counts, strict=True)):
        world.burst([due - (len(counts) - number) * SECOND] * count)
    return worlds


def bounded(settings: Settings, window: int) -> Settings:
    """Return settings that allow only a few follow-ups in flight."""
    return settings.model_copy(update={"max_in_flight": window})


def shares(claimed: Claim, worlds: list[World]) -> list[int]:
    """Count the leased follow-ups of each workspace."""
    counted = Counter(lease.key for lease in claimed.leases)
    return [counted[key_of(world.workspace_id)] for world in worlds]


@pytest.mark.parametrize(
    ("overdue", "in_flight", "expected"),
    [
        ((30, 30, 30), (0, 0, 0), [4, 4, 4]),
        ((30, 1, 2), (0, 0, 0), [9, 1, 2]),
        ((30, 30, 30), (8, 1, 0), [0, 1, 2]),
        ((30, 30, 1), (12, 0, 0), [0, 0, 0]),
        ((30, 3, 3), (9, 0, 0), [0, 2, 1]),
    ],
)
def test_fewest_first(
    engine: Engine, settings: Settings, overdue: tuple[int, ...], in_flight: tuple[int, ...], expected: list[int]
) -> None:
    """Claims prefer workspaces with the fewest follow-ups in flight, and reassign unused shares.

    If the in-flight limit is reached, no follow-up is claimed.
    """
    worlds = worlds_of(engine, *overdue)
    for world, count in zip(worlds, in_flight, strict=True):
        world.sql(
            "UPDATE follow_ups SET lease_token = 1, lease_until = now() + interval '1 min' WHERE id IN"
            " (SELECT id FROM follow_ups WHERE workspace_id = :id ORDER BY due_date, id LIMIT :count)",
            id=world.workspace_id,
            count=count,
        )
    claimed = claim_fairly(engine, bounded(settings, 12))
    assert shares(claimed, worlds) == expected
    assert claimed.more
    assert worlds[0].scalar(LEASED) == 12


def test_earliest_of_each_first(world: World, engine: Engine, settings: Settings) -> None:
    """A claim takes each workspace's earliest follow-ups, and none due after the look-ahead."""
    ids = [world.follow_up(due=-number * SECOND) for number in range(9)][::-1]
    world.follow_up(due=settings.tick_interval * 20)
    first, second = (claim_fairly(engine, bounded(settings, window)) for window in (4, 20))
    assert [lease.id for lease in first.leases] == ids[:4]
    assert [lease.id for lease in second.leases] == ids[4:]
    assert (first.more, second.more) == (True, False)


def test_a_busy_workspace_gets_the_remaining_slots(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace with many due follow-ups gets all slots that small workspaces do not need.

    A claim fills all slots, even though it reads only a few rows of each workspace.
    """
    monkeypatch.setattr(claims, "FEW", 1)
    worlds = worlds_of(engine, 90, *[1] * 30)
    assert shares(claim_fairly(engine, bounded(settings, 60)), worlds) == [30, *[1] * 30]


def test_more_workspaces_than_slots(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are more waiting workspaces than free slots, no workspace gets two slots."""
    monkeypatch.setattr(claims, "FEW", 1)
    worlds = worlds_of(engine, *[3] * 30)
    few = bounded(settings, 20)
    first = claim_fairly(engine, few)
    assert sorted(shares(first, worlds)) == [0] * 10 + [1] * 20
    begun = begin(engine, settings, first.leases).begun
    worlds[0].sql(
        "UPDATE follow_ups SET status = 'sent', finished_at = now(), lease_until = NULL, begun_at = NULL"
        " WHERE id = ANY(CAST(:ids AS uuid[]))",
        ids=[one.lease.id for one in begun],
    )
    second = shares(claim_fairly(engine, few), worlds)
    assert sum(second) == 20
    assert max(second) == 1


def test_one_claim_takes_half_of_the_window(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the in-flight limit is large, one claim leases at most half that number."""
    monkeypatch.setattr(claiming, "CLAIM_SIZE", 2)
    worlds_of(engine, 20)
    taken = [claim_fairly(engine, bounded(settings, 12)) for _ in range(3)]
    assert [(len(one.leases), one.more, one.cut_short) for one in taken] == [
        (6, True, True),
        (6, True, False),
        (0, True, False),
    ]


def test_window_with_earlier_due_dates(world: World, engine: Engine, settings: Settings) -> None:
    """Even if earlier follow-ups are added, fair claims keep to the in-flight limit."""
    other = World(engine)
    for group in range(1, 3):
        other.burst([-group * SECOND] * 3)
        world.burst([-group * SECOND] * 3)
        claim_fairly(engine, bounded(settings, 6))
        claim(engine, bounded(settings, 6))
    assert world.scalar(LEASED) == 6


def test_claim_in_order_detects_a_backlog(engine: Engine, settings: Settings) -> None:
    """A claim in due order detects a backlog; if the in-flight limit is reached, it leases nothing."""
    worlds = worlds_of(engine, 90, 5)
    few = bounded(settings, 10)
    assert shares(claim(engine, few), worlds) == [5, 5]
    assert [len(claim(engine, few).leases), worlds[0].scalar(LEASED)] == [0, 10]


def test_ended_leases_are_recovered(engine: Engine, settings: Settings) -> None:
    """A fair claim replaces expired leases, with greater tokens; a lease in flight counts as lost."""
    noisy, quiet = worlds_of(engine, 40, 2)
    few = bounded(settings, 6)
    leases = {lease.id: lease for lease in claim_fairly(engine, few).leases}
    (lost,) = [id_ for id_, lease in leases.items() if lease.key == key_of(quiet.workspace_id)][:1]
    begin(engine, settings, [leases[lost]])
    quiet.expire(*leases)
    again = claim_fairly(engine, few)
    assert {lease.id for lease in again.leases} == set(leases)
    assert all(lease.token > leases[lease.id].token for lease in again.leases)
    assert len(again.lost) == 1
    assert [number for number, outcome, _ in quiet.failures(lost) if outcome == "lost"] == [1]
    assert noisy.scalar(LEASED) == 6


def test_lost_with_an_unknown_outcome(world: World, engine: Engine, settings: Settings) -> None:
    """If a lease was lost and the attempt's outcome is unknown, a fair claim ends the follow-up."""
    follow_up = world.follow_up()
    begin(engine, settings, claim_fairly(engine, settings).leases)
    world.expire(follow_up)
    plain = settings.model_copy(update={"transport_deduplicates": False})
    assert claim_fairly(engine, plain).leases == ()
    assert world.row(follow_up).reason.partition(":")[0] == "outcome_unknown"


def test_concurrent_claims(engine: Engine, settings: Settings) -> None:
    """If fair and ordered claims run concurrently, each follow-up is leased exactly once."""
    worlds_of(engine, 40, 5, 5)
    taken: list[UUID] = []
    start = threading.Barrier(4)

    def run(number: int) -> None:
        start.wait()
        taken.extend(lease.id for lease in (claim_fairly if number % 2 else claim)(engine, settings).leases)

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken.extend(lease.id for lease in claim_fairly(engine, settings).leases)
    assert len(taken) == len(set(taken)) == 50


def test_locked_rows(engine: Engine, settings: Settings) -> None:
    """A fair claim skips locked rows and leases the rows after them."""
    noisy, quiet = worlds_of(engine, 20, 2)
    with engine.connect() as connection:
        held = "SELECT FROM follow_ups WHERE workspace_id = :id FOR UPDATE"
        connection.execute(text(held), {"id": noisy.workspace_id})
        assert shares(claim_fairly(engine, bounded(settings, 6)), [noisy, quiet]) == [0, 2]


class TestLowWater:
    """The low-water mark stays before all due follow-ups that a fair claim has skipped."""

    def test_mark(self, engine: Engine, settings: Settings) -> None:
        """The low-water mark stays before the first unfinished follow-up, even if later ones are claimed."""
        noisy, _ = worlds_of(engine, 40, 3, due=-timedelta(minutes=5))
        few = bounded(settings, 4)
        for _ in range(2):
            low = claim_fairly(engine, few).low_water
            assert timedelta(minutes=5) < datetime.now(UTC) - low < timedelta(minutes=6)
        noisy.expire(*[row.id for row in noisy.rows()])
        assert len(claim_fairly(engine, settings, low).leases) == 43

    def test_no_rows_before_the_mark(self, world: World, engine: Engine, settings: Settings) -> None:
        """In every workspace, a fair claim reads no rows due before the low-water mark."""
        worlds_of(engine, 3, due=-timedelta(minutes=5))
        later = world.follow_up()
        since = datetime.now(UTC) - timedelta(minutes=1)
        assert [lease.id for lease in claim_fairly(engine, settings, since).leases] == [later]
        assert claim_fairly(engine, settings, since).more is False

    def test_nothing_is_due(self, engine: Engine, settings: Settings) -> None:
        """If nothing is due, a fair claim reports no further work; its low-water mark lies in the past."""
        claimed = claim_fairly(engine, settings)
        assert (claimed.leases, claimed.more) == ((), False)
        assert timedelta(0) < datetime.now(UTC) - claimed.low_water - claims.LOW_WATER_MARGIN < timedelta(minutes=1)


def test_dispatcher_continues_with_a_fair_claim(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a claim reaches its limit, the next claim is fair to all workspaces."""
    monkeypatch.setattr(claiming, "CLAIM_SIZE", 10)
    worlds = worlds_of(engine, 200, 10)
    hints: list[Hint] = []
    ticking = dispatcher.Dispatcher(bounded(settings, 60), engine, hints.append)
    ticking.start()

    def is_full() -> bool:
        ticking.tick()
        return bool(worlds[0].scalar(LEASED) == 60)

    wait_until(is_full)
    ticking.stop()
    keys = Counter(lease.key for hint in hints for lease in leases_of(*hint))
    assert [keys[key_of(world.workspace_id)] for world in worlds] == [50, 10]


def test_a_small_free_window_is_filled_without_growing_pauses(
    world: World, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all slots become free between two claims, the pauses between claims do not grow."""
    monkeypatch.setattr(claim_interval, "LONGEST", 60.0)

    def end(hint: Hint) -> None:
        world.sql(
            "UPDATE follow_ups SET status = 'sent', finished_at = now(), lease_until = NULL"
            " WHERE id = ANY(CAST(:ids AS uuid[]))",
            ids=[lease.id for lease in leases_of(*hint)],
        )

    world.burst([-SECOND] * 12)
    patient = bounded(settings, 1).model_copy(update={"tick_interval": 60 * SECOND})
    ticking = dispatcher.Dispatcher(patient, engine, end)
    ticking.start()
    ticking.tick()
    wait_until(lambda: world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'sent'") == 12)
    ticking.stop()

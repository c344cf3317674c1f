"""A backlog or a hundredfold load in one workspace does not delay other workspaces."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import pytest

from faults.measures import NOTICE, PORTION, lag_p99_ms, punctual
from faults.rig import rows_of
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from uuid import UUID

    from faults.figures import Figures
    from faults.promises import Verdict
    from faults.rig import Rig


def quiet(rig: Rig, worlds: list[World], each: int, spread: float, notice: timedelta = NOTICE) -> list[UUID]:
    """Add ``each`` follow-ups to every workspace except the noisy one."""
    return [id_ for world in worlds for id_ in punctual(rig, each, spread, world, notice)]


def neighbour(rig: Rig, figures: Figures, each: int, spread: float, seconds: float) -> None:
    """Measure five workspaces of ``each`` follow-ups: alone, and beside one with 100 times as many.

    The follow-ups are inserted within ``seconds`` seconds, before the first one is due.
    """
    notice = timedelta(seconds=seconds)
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "20", "FOLLOWUPS_LEASE": "40"}
    rig.start()
    worlds = [World(rig.world.engine) for _ in range(5)]
    alone = quiet(rig, worlds, each, spread)
    rig.settle_down(within=60 + spread)
    noise = punctual(rig, each * 100, spread, notice=notice)
    beside = quiet(rig, worlds, each, spread, notice)
    rig.settle_down(within=180 + spread + seconds)
    verdict = rig.verdict()
    figures.keep(
        19,
        verdict,
        others_p99_alone_ms=lag_p99_ms(rig, alone),
        others_p99_beside_ms=lag_p99_ms(rig, beside),
        neighbours_p99_ms=lag_p99_ms(rig, noise),
        neighbours_per_s=round(len(noise) / spread),
    )
    assert verdict.ended == {"sent": len(alone) + len(beside) + len(noise)}
    per_workspace = "SELECT count(*) FROM follow_ups WHERE status = 'sent' GROUP BY workspace_id ORDER BY 1"
    assert [count for (count,) in rows_of(rig, per_workspace)] == [each * 2] * 5 + [each * 100]


def test_noisy_neighbour(rig: Rig, figures: Figures) -> None:
    """While one workspace has a hundred times the load, all follow-ups of the other workspaces are sent."""
    neighbour(rig, figures, each=15, spread=2.0, seconds=1.5)


@pytest.mark.faults_long
def test_noisy_neighbour_for_long(rig: Rig, figures: Figures) -> None:
    """If one workspace adds five hundred follow-ups per second, other workspaces' follow-ups are still sent."""
    neighbour(rig, figures, each=300, spread=60.0, seconds=45.0)


class Measurements(NamedTuple):
    """Measurements of all other workspaces while one workspace has a backlog."""

    verdict: Verdict
    alone: list[UUID]
    beside: list[UUID]
    noise: list[UUID]
    left: int
    """Number of follow-ups left in the backlog when the other workspaces were done."""


def backlog(rig: Rig, overdue: int, each: int, spread: float, call: float = 0.0) -> Measurements:
    """Make ``each`` follow-ups of five workspaces fall due within ``spread`` seconds, with and without a backlog.

    Every call to the receiver takes at least ``call`` seconds.
    """
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "20", "FOLLOWUPS_LEASE": "60"}
    rig.start()
    if call:
        rig.behave(kind="slow", delay=call)
    worlds = [World(rig.world.engine) for _ in range(5)]
    alone = quiet(rig, worlds, each, spread)
    rig.settle_down(within=60 + spread)
    noise = [id_ for first in range(0, overdue, PORTION) for id_ in rig.held(min(PORTION, overdue - first))]
    rig.release(noise)
    beside = quiet(rig, worlds, each, spread)
    theirs = "SELECT count(*) FROM follow_ups WHERE status = 'pending' AND workspace_id <> :own"
    wait_until(lambda: rows_of(rig, theirs, own=rig.world.workspace_id) == [(0,)], within=60 + spread, every=0.05)
    left = int(rig.world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'pending'"))
    rig.settle_down(within=60 + overdue / 50)
    return Measurements(rig.verdict(), alone, beside, noise, left)


def keep_backlog(rig: Rig, figures: Figures, seen: Measurements) -> None:
    """Record the figures of a backlog, and check that all follow-ups were sent."""
    figures.keep(
        19,
        seen.verdict,
        overdue_at_once=len(seen.noise),
        left_when_the_others_were_sent=seen.left,
        others_p99_alone_ms=lag_p99_ms(rig, seen.alone),
        others_p99_beside_ms=lag_p99_ms(rig, seen.beside),
        backlogs_p99_ms=lag_p99_ms(rig, seen.noise),
    )
    assert seen.verdict.ended == {"sent": len(seen.alone) + len(seen.beside) + len(seen.noise)}


def test_backlog_of_a_neighbour(rig: Rig, figures: Figures) -> None:
    """If one workspace's backlog fills all slots, other workspaces' follow-ups overtake most of it."""
    rig.options |= {"FOLLOWUPS_MAX_IN_FLIGHT": "200", "FOLLOWUPS_CONCURRENCY": "8"}
    seen = backlog(rig, overdue=3000, each=5, spread=1.5, call=0.02)
    keep_backlog(rig, figures, seen)
    assert seen.left > len(seen.noise) / 2


@pytest.mark.faults_long
def test_backlog_of_a_neighbour_for_long(rig: Rig, figures: Figures) -> None:
    """With default settings, one workspace's fifty thousand overdue follow-ups do not delay other workspaces."""
    seen = backlog(rig, overdue=50_000, each=300, spread=60.0)
    keep_backlog(rig, figures, seen)

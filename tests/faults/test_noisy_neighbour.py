"""A workspace with a hundred times the load of the others: all of the others' are sent, and none is mixed up."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from faults.measures import NOTICE, lag_p99_ms, punctual
from faults.rig import rows_of
from world import World

if TYPE_CHECKING:
    from uuid import UUID

    from faults.figures import Figures
    from faults.rig import Rig


def quiet(rig: Rig, worlds: list[World], each: int, spread: float, notice: timedelta = NOTICE) -> list[UUID]:
    """Add ``each`` to every one of the others."""
    return [id_ for world in worlds for id_ in punctual(rig, each, spread, world, notice)]


def neighbour(rig: Rig, figures: Figures, each: int, spread: float, seconds: float) -> None:
    """Measure five workspaces with ``each`` follow-ups, alone and beside one that has a hundred times as many.

    All of these are inserted within ``seconds`` before the first falls due.
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
    """All of the others' are sent beside a neighbour with a hundred times the load."""
    neighbour(rig, figures, each=15, spread=2.0, seconds=1.5)


@pytest.mark.faults_long
def test_noisy_neighbour_for_long(rig: Rig, figures: Figures) -> None:
    """The same for a minute, with a neighbour that adds five hundred a second."""
    neighbour(rig, figures, each=300, spread=60.0, seconds=45.0)

"""Tests that a poison pill is quarantined, and that all other follow-ups are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from faults.rig import rows_of
from followups.delivery.claim import MAX_LOSSES
from followups.delivery.slots import POISON_PILLS
from stack import wait_until

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig


def poisoned(rig: Rig, figures: Figures, neighbours: int, spread: float = 2.0, delay: float = 0.0) -> None:
    """Let one follow-up kill every worker that sends it; start a new worker each time."""
    rig.start(workers=1, beats=1, harmed=True)
    if delay:
        rig.behave(kind="slow", delay=delay)
    ids = rig.bulk(neighbours, spread)
    poison = rig.rng.choice(ids)
    point = f"send.of.{poison}"
    rig.failpoints.arm(point, "kill", times=20)
    for death in range(1, MAX_LOSSES + 1):
        wait_until(lambda death=death: rig.failpoints.taken(point) == death, within=60)
        rig.worker(harmed=True)
    rig.settle_down(within=60)
    verdict = rig.verdict()
    row = rig.world.row(poison)
    assert verdict.ended == {"sent": len(ids) - 1, "failed": 1}
    assert (row.status, row.reason.partition(":")[0]) == ("failed", "worker_lost")
    assert rig.failpoints.taken(point) == MAX_LOSSES
    lost = rows_of(rig, "SELECT losses, count(*) FROM follow_ups WHERE id <> :poison GROUP BY 1", poison=poison)
    figures.keep(
        15,
        verdict,
        deaths_until_quarantined=MAX_LOSSES,
        neighbours_sent=verdict.ended["sent"],
        neighbours_by_losses={str(losses): count for losses, count in lost},
    )
    assert sum(count for losses, count in lost if losses > 1) < POISON_PILLS


def test_poison_with_many_calls_in_flight(rig: Rig, figures: Figures) -> None:
    """If a poison pill kills busy workers, few other calls are lost twice."""
    rig.options |= {"FOLLOWUPS_LEASE": "6", "FOLLOWUPS_TRANSPORT_TIMEOUT": "4"}
    poisoned(rig, figures, neighbours=60, spread=0.0, delay=1.0)


def test_poison(rig: Rig, figures: Figures) -> None:
    """After three worker deaths, a poison pill fails as `worker_lost`; all other follow-ups are sent."""
    poisoned(rig, figures, neighbours=60)


@pytest.mark.faults_long
def test_poison_among_many(rig: Rig, figures: Figures) -> None:
    """Of two thousand follow-ups, only the poison pill fails, with the code worker_lost."""
    poisoned(rig, figures, neighbours=2000)

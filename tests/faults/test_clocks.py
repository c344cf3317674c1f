"""Hosts whose clocks are minutes off: the database's decides, so nothing is early and nothing late."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from faults.rig import Load, rows_of

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig
    from followups.embedded import Child

OFF = "600"


def clocks_off(rig: Rig, figures: Figures, seconds: float) -> None:
    """Let one worker's clock be ten minutes ahead, another's behind, and a beat's of each kind."""
    ahead, behind = {"FOLLOWUPS_TEST_CLOCK_OFFSET": OFF}, {"FOLLOWUPS_TEST_CLOCK_OFFSET": f"-{OFF}"}
    injected = rig.failpoints.environment()
    rig.beat(**injected | ahead)
    rig.beat(**injected | behind)
    rig.sandbox()
    workers = [rig.worker(harmed=True, **ahead), rig.worker(harmed=True, **behind)]
    with Load(rig, 60, seconds, spread=2.0) as load:
        load.wait()
    rig.settle_down()
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(load.ids)}
    assert [is_off(worker) for worker in workers] == [1, -1]
    requests = rig.received()
    early = sum(one["lagMs"] < 0 for one in requests)
    ((p99,),) = rows_of(
        rig,
        "SELECT percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM accepted_at - due_date)) * 1000"
        "  FROM follow_ups WHERE due_date > created_at + interval '0.5 s'",
    )
    figures.keep(12, verdict, early=early, lag_p99_ms=round(float(p99), 1))
    assert early == 0


def is_off(worker: Child) -> int:
    """Say by its log whether a process lives minutes ahead (1) or behind (-1)."""
    lines = [json.loads(line) for line in worker.command.log.read_text().splitlines() if line.startswith("{")]
    off = datetime.fromisoformat(lines[-1]["timestamp"]) - datetime.now(UTC)
    return round(off / timedelta(minutes=10))


def test_clocks_off(rig: Rig, figures: Figures) -> None:
    """With clocks ten minutes ahead and behind, every follow-up goes out at its moment by the database's clock."""
    clocks_off(rig, figures, seconds=2.5)


@pytest.mark.faults_long
def test_clocks_off_for_long(rig: Rig, figures: Figures) -> None:
    """So it is for a minute."""
    clocks_off(rig, figures, seconds=60)

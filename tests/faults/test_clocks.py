"""Tests with hosts whose clocks are minutes off: only the database's clock matters."""

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

SECRET = "whsec_" + "c2VjcmV0" * 4
MINUTES, HOURS = timedelta(minutes=10), timedelta(hours=2)


def clocks_off(rig: Rig, figures: Figures, seconds: float, off: timedelta) -> None:
    """Run two workers and two beats; in each pair, one clock is ahead by ``off`` and one is behind."""
    rig.options["FOLLOWUPS_LEASE"] = "30"  # a dropped hint delays its follow-ups by one lease
    rig.options["FOLLOWUPS_TRANSPORT_SECRET"] = SECRET
    ahead, behind = ({"FOLLOWUPS_TEST_CLOCK_OFFSET": f"{sign * off.total_seconds()}"} for sign in (1, -1))
    injected = rig.failpoints.environment()
    rig.beat(**injected | ahead)
    rig.beat(**injected | behind)
    rig.sandbox("--secret", SECRET)  # the chat rejects signatures whose timestamp differs by minutes from its clock
    workers = [rig.worker(harmed=True, **ahead), rig.worker(harmed=True, **behind)]
    with Load(rig, 60, seconds, spread=2.0) as load:
        load.wait()
    rig.settle_down()
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(load.ids)}
    assert [is_off(worker, off) for worker in workers] == [1, -1]
    assert [rig.log_events("clock_off", worker.command.name)[0]["ahead_s"] > 0 for worker in workers] == [True, False]
    requests = rig.received()
    early = sum(one["lagMs"] < 0 for one in requests)
    ((p99,),) = rows_of(
        rig,
        "SELECT percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM accepted_at - due_date)) * 1000"
        "  FROM follow_ups WHERE due_date > created_at + interval '0.5 s'",
    )
    ((again,),) = rows_of(
        rig,
        "SELECT count(*) FROM (SELECT FROM history WHERE lease_token > 0"
        " GROUP BY id HAVING count(DISTINCT lease_token) > 1) leased_again",
    )
    hours = off / timedelta(hours=1)
    figures.keep(12, verdict, hours_off=hours, early=early, leased_again=again, lag_p99_ms=round(float(p99), 1))
    assert (early, again) == (0, 0)


def is_off(worker: Child, by: timedelta) -> int:
    """Return 1 if the worker's clock is ahead by ``by`` according to the log, or -1 if behind."""
    lines = [json.loads(line) for line in worker.command.log.read_text().splitlines() if line.startswith("{")]
    off = datetime.fromisoformat(lines[-1]["timestamp"]) - datetime.now(UTC)
    return round(off / by)


def test_clocks_off(rig: Rig, figures: Figures) -> None:
    """If hosts' clocks are ten minutes off, every follow-up is still sent on time."""
    clocks_off(rig, figures, seconds=2.5, off=MINUTES)


def test_clocks_hours_off(rig: Rig, figures: Figures) -> None:
    """Even if hosts' clocks differ by hours, no host drops another host's message as too old."""
    clocks_off(rig, figures, seconds=2.5, off=HOURS)


@pytest.mark.faults_long
def test_clocks_off_for_long(rig: Rig, figures: Figures) -> None:
    """During a minute of load, follow-ups are sent on time although the hosts' clocks are wrong."""
    clocks_off(rig, figures, seconds=60, off=rig.rng.choice([MINUTES, HOURS]))

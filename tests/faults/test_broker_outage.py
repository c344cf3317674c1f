"""Tests in which the broker is killed, restarted or wiped.

The broker holds only hints, so its faults only delay follow-ups.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from faults.rig import Load
from stack import wait_until

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig

BACK_WITHIN = 10.0
"""Seconds within which workers must resume consuming; doubled for a busy machine."""


def outages(rig: Rig, figures: Figures, times: int, between: float, rate: float) -> None:
    """Kill and restart the broker repeatedly, sometimes within seconds, and check every worker."""
    assert rig.valkey
    workers = rig.start(workers=2, beats=2)
    with Load(rig, rate, seconds=3600) as load:
        for _ in range(times):
            time.sleep(rig.rng.random() * between)
            rig.valkey.kill()
            time.sleep(rig.rng.random())
            rig.valkey.restart()
        returned = time.monotonic()
        (probe,) = rig.bulk(1)
        wait_until(lambda: rig.accepted(probe), within=60)
        back_after = time.monotonic() - returned
    rig.settle_down(within=60)
    rig.ask_each(workers)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(load.ids) + 3}
    figures.keep(7, verdict, outages=times, consumption_goes_on_after_s=round(back_after, 2))
    assert back_after < 2 * BACK_WITHIN


def test_killed_several_times(breakable: Rig, figures: Figures) -> None:
    """If the broker is killed several times within seconds, every worker later consumes from it again."""
    outages(breakable, figures, times=3, between=1.0, rate=60)


@pytest.mark.faults_long
def test_killed_for_minutes(breakable: Rig, figures: Figures) -> None:
    """However often the broker is killed, every worker goes back to consuming from both queues."""
    outages(breakable, figures, times=20, between=12.0, rate=60)


def test_flushed_in_mid_burst(rig: Rig, figures: Figures) -> None:
    """If the broker loses its data, follow-ups are late by at most a lease and a tick interval."""
    flushes(rig, figures, count=400, spread=1.5, times=5)


@pytest.mark.faults_long
def test_flushed_for_long(rig: Rig, figures: Figures) -> None:
    """If the broker is flushed a hundred times, all follow-ups of a burst of 20,000 are still sent."""
    flushes(rig, figures, count=20_000, spread=20, times=100)


def flushes(rig: Rig, figures: Figures, count: int, spread: float, times: int) -> None:
    """Flush the broker the given number of times during a burst."""
    rig.start(workers=2, beats=2)
    ids = rig.bulk(count, spread)
    held = 0
    for _ in range(times):
        time.sleep(rig.rng.random() * 2 * spread / times)
        with rig.broker() as broker:
            held += broker.dbsize()
            broker.flushdb()
    rig.settle_down(within=120)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(ids)}
    assert held > 0
    latest = rig.world.scalar("SELECT EXTRACT(EPOCH FROM max(accepted_at - due_date)) FROM follow_ups")
    figures.keep(8, verdict, flushes=times, delay_max_s=round(float(latest), 2))

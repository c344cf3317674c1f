"""Tests with several beats: ticks are coalesced, and continue after one beat is killed."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from faults.rig import Load
from stack import wait_until

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig


def beats(rig: Rig, figures: Figures, number: int, seconds: float) -> None:
    """Run several beats under load; kill one of them, and stop and restart another."""
    rig.start(workers=2, beats=number)
    running = [child for child in rig.processes.children if child.command.name.startswith("beat.")]
    with Load(rig, 60, seconds) as load:
        time.sleep(seconds * rig.rng.uniform(0.2, 0.5))
        running[0].signal(signal.SIGKILL)
        wait_until(lambda: not running[0].running)
        running.append(rig.beat())
        running[1].ask()
        load.wait()
    rig.settle_down()
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(load.ids)}
    twice = rig.world.scalar(
        "SELECT count(*) FROM follow_ups f WHERE losses = 0 AND"
        " (SELECT count(DISTINCT lease_token) FROM history h WHERE h.id = f.id AND lease_token > 0) > 1"
    )
    late = rig.world.scalar(
        "SELECT EXTRACT(EPOCH FROM max(accepted_at - GREATEST(due_date, created_at))) FROM follow_ups"
    )
    figures.keep(10, verdict, beats=number, claimed_again=twice, latest_s=round(float(late), 2))


@pytest.mark.parametrize("number", [2, 3])
def test_several_beats(number: int, rig: Rig, figures: Figures) -> None:
    """If two or three beats run and one is killed, ticks continue and nothing is sent twice."""
    beats(rig, figures, number, seconds=2.5)


@pytest.mark.faults_long
def test_several_beats_for_long(rig: Rig, figures: Figures) -> None:
    """If several beats run, no message is sent twice and the ticks continue."""
    beats(rig, figures, 3, seconds=60)

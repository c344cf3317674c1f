"""Tests that replace all processes one by one under load, as in an upgrade."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from faults.rig import Load
from stack import wait_until
from web import in_days

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig
    from followups.embedded import Child


def replace_processes(rig: Rig, figures: Figures, rounds: int, rate: float) -> None:
    """Replace workers, beats and web while follow-ups are added directly and through the API."""
    workers = rig.start(workers=2)
    beats = [rig.beat(), rig.beat()]
    rig.behave(kind="slow", delay=0.1)
    api = rig.web()
    drained = []
    with Load(rig, rate, seconds=3600) as load:
        for _ in range(rounds):
            for _ in range(2):
                workers.append(rig.worker())
                drained.append(ended(workers.pop(0)))
                beats.append(rig.beat())
                ended(beats.pop(0))
                assert api.create(due=in_days(0))
            (old,) = (child for child in rig.processes.children if child.running and "web" in child.command.name)
            api.client.close()
            api = rig.web()
            ended(old)
    api.client.close()
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(load.ids) + 2 * rounds}
    assert rig.world.scalar("SELECT count(*) FROM failed_attempts") == 0
    figures.keep(5, verdict, workers_replaced=len(drained), drain_max_s=round(max(drained), 2))


def ended(child: Child) -> float:
    """Stop a process; return the number of seconds until it exited."""
    asked = time.monotonic()
    child.ask()
    wait_until(lambda: not child.running, within=60)
    # After an orderly shutdown, uvicorn raises the received signal again, so the signal ends the process.
    assert child.exit_code in {0, -signal.SIGTERM}, child.tail()
    return time.monotonic() - asked


def test_rolling_restart(rig: Rig, figures: Figures) -> None:
    """A rolling restart loses no message, repeats none, and drains workers in seconds."""
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "10", "FOLLOWUPS_LEASE": "30"}
    replace_processes(rig, figures, rounds=1, rate=60)


@pytest.mark.faults_long
def test_rolling_restarts(rig: Rig, figures: Figures) -> None:
    """In ten rolling restarts, no message is lost or duplicated, and no attempt is wasted."""
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "10", "FOLLOWUPS_LEASE": "30"}
    replace_processes(rig, figures, rounds=10, rate=60)

"""Tests that a worker frozen for longer than its lease settles nothing and repeats nothing."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faults.figures import Figures
    from faults.rig import Rig
    from followups.embedded import Child

POINTS = ("begin.committed", "send.before", "send.answered", "settle.before")


def frozen_at(
    rig: Rig, figures: Figures, point: str, workers: Sequence[Child], count: int, longer: float = 0.0
) -> None:
    """Freeze one of two workers at this step until its lease has expired."""
    frozen, other = workers
    name = frozen.command.name
    time.sleep(0.5)  # earlier refusals have been counted by now
    before = refused(rig, name)
    other.signal(signal.SIGSTOP)  # so that this worker executes the step first
    rig.failpoints.arm(point, "stop")
    rig.bulk(count, spread=0.5)
    wait_until(lambda: rig.failpoints.taken(point))
    other.signal(signal.SIGCONT)
    took = rig.settle_down(within=60)
    time.sleep(longer)
    frozen.signal(signal.SIGCONT)
    rig.bulk(20, spread=0.5)
    rig.settle_down(within=60)
    wait_until(lambda: refused(rig, name) > before, within=30)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(rig.created)}
    stale = refused(rig, name) - before
    figures.keep(2, verdict, frozen_at=point, stale_writes_refused=stale, all_sent_after_s=round(took, 2))


def refused(rig: Rig, name: str) -> int:
    """Return how many results and calls were refused because they came too late."""
    stale = sum(line["count"] for line in rig.log_events("stale_writes", name))
    return stale + len(rig.log_events("attempt_abandoned", name))


def test_frozen_at_each_step(rig: Rig, figures: Figures) -> None:
    """If a worker freezes at any step for longer than its lease, its later writes are refused."""
    workers = rig.start(workers=2, harmed=True)
    for point in rig.rng.sample(POINTS, len(POINTS)):
        frozen_at(rig, figures, point, rig.rng.sample(workers, 2), count=60)


@pytest.mark.faults_long
@pytest.mark.parametrize("point", POINTS)
def test_frozen_for_long(point: str, rig: Rig, figures: Figures) -> None:
    """If a worker is frozen for ten times its lease, it settles none of its 1,000 follow-ups."""
    frozen_at(rig, figures, point, rig.start(workers=2, harmed=True), count=1000, longer=30.0)


def test_frozen_inside_a_transaction(rig: Rig, figures: Figures) -> None:
    """If a worker freezes in a transaction, only the follow-ups that it locked wait until its session ends."""
    frozen, other = rig.start(workers=2, harmed=True)
    other.signal(signal.SIGSTOP)
    rig.failpoints.arm("settle.before_commit", "stop")
    held = rig.bulk(20)
    wait_until(lambda: rig.failpoints.taken("settle.before_commit"))
    other.signal(signal.SIGCONT)
    others = rig.bulk(50, spread=0.5)
    rig.wait_until_done(*others, within=60)
    took = rig.settle_down(within=90)
    frozen.signal(signal.SIGCONT)
    rig.bulk(5)
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(held) + len(others) + 5}
    figures.keep(2, verdict, frozen_at="inside a transaction", all_sent_after_s=round(took, 2))


def test_frozen_inside_a_claim(rig: Rig, figures: Figures) -> None:
    """If a dispatcher freezes during a claim, other claims wait until PostgreSQL ends the frozen session."""
    frozen, other = rig.start(workers=2, harmed=True)
    other.signal(signal.SIGSTOP)
    rig.failpoints.arm("claim.before_commit", "stop")
    wait_until(lambda: rig.failpoints.taken("claim.before_commit"))
    other.signal(signal.SIGCONT)
    rig.bulk(50)
    took = rig.settle_down(within=60)
    frozen.signal(signal.SIGCONT)
    rig.bulk(5)
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": 55}
    figures.keep(2, verdict, frozen_at="inside a claim", all_sent_after_s=round(took, 2))


def test_suspended(rig: Rig, figures: Figures) -> None:
    """If a worker is suspended for longer than its lease, it makes no call under that lease after waking."""
    asleep, other = rig.start(workers=2, harmed=True)
    other.signal(signal.SIGSTOP)
    rig.failpoints.arm("send.before", "suspend")
    rig.bulk(20)
    wait_until(lambda: rig.failpoints.taken("send.before"))
    other.signal(signal.SIGCONT)
    rig.settle_down(within=60)
    before = len(rig.received())
    asleep.signal(signal.SIGCONT)
    wait_until(lambda: rig.log_events("attempt_abandoned", asleep.command.name), within=30)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": 20}
    figures.keep(2, verdict, frozen_at="suspended", calls_made_after_waking=len(rig.received()) - before)
    assert len(rig.received()) == before

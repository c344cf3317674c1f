"""Tests that kill a worker at each step of a delivery; another takes over within a lease and a tick.

These workers use Celery's solo pool, so they have no child processes.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from stack import wait_until

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig

SLACK = 10.0
"""Extra seconds, besides a lease and a tick, that a busy machine may need."""

POINTS = (
    "claim.before_commit",
    "claim.committed",
    "begin.before_commit",
    "begin.committed",
    "send.before",
    "send.answered",
    "settle.before_commit",
    "settle.committed",
)
BESIDE = {"claim.before_commit", "begin.before_commit", "begin.committed"}
"""Steps that differ little from neighbouring steps, so only the long tests cover them."""


def recovered(rig: Rig, figures: Figures, point: str, killed: float) -> None:
    """Wait until all follow-ups are sent; fail if this takes longer than a lease plus a tick."""
    rig.settle_down(within=60)
    took = time.monotonic() - killed
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(rig.created)}
    figures.keep(1, verdict, killed_at=point, all_sent_after_s=round(took, 2))
    limit = rig.settings.lease + rig.settings.tick_interval
    assert took < limit.total_seconds() + SLACK


def test_killed_at_each_step(rig: Rig, figures: Figures) -> None:
    """If a worker is killed at any step, no message is lost or sent twice."""
    workers = rig.start(workers=2, harmed=True)
    points = [point for point in POINTS if point not in BESIDE]
    for point in rig.rng.sample(points, len(points)):
        rig.bulk(100, spread=0.5)
        time.sleep(rig.rng.random() * 0.3)
        rig.failpoints.arm(point)
        # If all follow-ups were processed before the kill, add more.
        wait_until(lambda point=point: rig.failpoints.taken(point) or not rig.bulk(3, 0.2), within=30, every=0.25)
        wait_until(lambda workers=workers: any(not worker.running for worker in workers))
        recovered(rig, figures, point, time.monotonic())
        workers = [*(worker for worker in workers if worker.running), rig.worker(harmed=True)]


def test_killed_in_mid_batch(rig: Rig, figures: Figures) -> None:
    """If a worker is killed, its calls in flight are repeated with their idempotency keys."""
    doomed, other = rig.start(workers=2)
    other.signal(signal.SIGSTOP)  # stop one worker so that the other worker gets all follow-ups
    rig.behave(kind="slow", delay=0.3)
    rig.bulk(200, spread=0.3)
    wait_until(lambda: len(rig.received()) > rig.rng.randrange(20, 100))
    doomed.signal(signal.SIGKILL)
    wait_until(lambda: not doomed.running)
    killed = time.monotonic()
    in_flight = rig.world.scalar("SELECT count(*) FROM follow_ups WHERE begun_at IS NOT NULL")
    rig.behave(kind="accept")
    other.signal(signal.SIGCONT)
    recovered(rig, figures, "mid-batch", killed)
    assert in_flight > 0
    assert rig.world.scalar("SELECT count(*) FROM failed_attempts WHERE outcome = 'lost'") >= in_flight


@pytest.mark.faults_long
def test_killed_again_and_again(rig: Rig, figures: Figures) -> None:
    """Although workers are repeatedly killed and replaced, no message is lost or duplicated."""
    rig.start(workers=2, beats=2, harmed=True)
    for _ in range(30):
        rig.bulk(200, spread=2.0)
        point = rig.rng.choice(POINTS)
        taken = rig.failpoints.taken(point)
        rig.failpoints.arm(point)
        wait_until(lambda point=point, taken=taken: rig.failpoints.taken(point) > taken or not rig.bulk(3), within=60)
        rig.worker(harmed=True)
    rig.failpoints.disarm()
    recovered(rig, figures, "all, in turn", time.monotonic())

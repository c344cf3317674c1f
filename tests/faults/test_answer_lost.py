"""Tests in which a commit succeeds, but the worker gets an error and looks up the result."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from stack import wait_until

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig

STEPS = ("claim", "begin", "settle")

PROMPT = 30.0
"""Time limit in seconds for sending all follow-ups, far below the lease of 120 s."""


def start(rig: Rig) -> None:
    """Start workers with long leases."""
    rig.options |= {"FOLLOWUPS_LEASE": "120", "FOLLOWUPS_TRANSPORT_TIMEOUT": "60"}
    rig.start(workers=2, harmed=True)


def answers_lost(rig: Rig, figures: Figures, step: str, count: int, times: int) -> None:
    """Drop the responses to a step's commits, and check that nothing waits for a lease to expire."""
    point = f"{step}.answer_lost"
    rig.failpoints.arm(point, "raise", times)
    rig.bulk(count, spread=1.0)
    started = time.monotonic()
    wait_until(lambda: rig.failpoints.taken(point) == times or not rig.bulk(2), within=60, every=0.1)
    rig.settle_down(within=90)
    took = time.monotonic() - started
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(rig.created)}
    assert rig.world.scalar("SELECT count(*) FROM failed_attempts") == 0
    figures.keep(3, verdict, step=step, answers_lost=times, all_sent_after_s=round(took, 2))
    assert took < PROMPT


def test_answer_lost_at_each_step(rig: Rig, figures: Figures) -> None:
    """If a commit's response is lost, each follow-up is still sent once, without long delay."""
    start(rig)
    for step in rig.rng.sample(STEPS, len(STEPS)):
        answers_lost(rig, figures, step, count=60, times=rig.rng.randrange(1, 4))


@pytest.mark.faults_long
@pytest.mark.parametrize("step", STEPS)
def test_answers_lost_often(step: str, rig: Rig, figures: Figures) -> None:
    """If the responses to a hundred commits are lost, no follow-up is delayed."""
    start(rig)
    answers_lost(rig, figures, step, count=3000, times=100)

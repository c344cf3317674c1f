"""A worker killed at each step: what it held is delivered by another within a lease and a tick, once by key."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from stack import wait_until

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig

SLACK = 10.0
"""Seconds beyond a lease and a tick, for a machine busy with other tests."""


@pytest.mark.parametrize(
    "point", ["claim.committed", "send.before", "send.answered", "settle.before_commit", "settle.committed"]
)
def test_killed_at(point: str, rig: Rig, figures: Figures) -> None:
    """SIGKILL at this step loses nothing and doubles nothing; another worker takes over."""
    rig.start(workers=2, harmed=True)
    ids = rig.bulk(200, spread=0.5)
    rig.failpoints.arm(point)
    wait_until(lambda: rig.failpoints.taken(point))
    killed = time.monotonic()
    rig.settle_down()
    took = time.monotonic() - killed
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(ids)}
    figures.keep(1, verdict, point=point, recovery_s=round(took, 2))
    limit = rig.settings.lease + rig.settings.tick_interval
    assert took < limit.total_seconds() + SLACK

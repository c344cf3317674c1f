"""If the broker's silence slightly exceeds the time limit, no connection is lost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from faults.rig import Load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faults.figures import Figures
    from faults.proxy import Proxy
    from faults.rig import Rig

PATIENCE = 1.5
"""Seconds that a worker waits for the broker's answer: half a lease."""


def hesitating(proxied: tuple[Rig, Sequence[Proxy]], figures: Figures, times: int) -> None:
    """Delay the broker's replies under load, so that only some commands time out."""
    rig, (_, broker) = proxied
    (worker,) = rig.start()
    with Load(rig, 50, seconds=times * 3.0, spread=0.5) as load:
        for _ in range(times):
            broker.stall()
            time.sleep(PATIENCE + rig.rng.uniform(0.05, 0.4))
            broker.flow()
            time.sleep(rig.rng.uniform(0.3, 1.0))
        load.wait()
    calm = time.monotonic()
    probes = rig.bulk(20, spread=0.5)
    rig.wait_until_done(*probes, within=60)
    took = time.monotonic() - calm
    rig.settle_down(within=60)
    assert worker.running
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(rig.created)}
    figures.keep(9, verdict, hesitations=times, broker_goes_on_after_hesitating_s=round(took, 1))


def test_hesitating(proxied: tuple[Rig, Sequence[Proxy]], figures: Figures) -> None:
    """Whichever broker command times out, the worker continues to consume messages."""
    hesitating(proxied, figures, times=4)


@pytest.mark.faults_long
def test_hesitating_for_long(proxied: tuple[Rig, Sequence[Proxy]], figures: Figures) -> None:
    """After many delayed answers from the broker, a worker still consumes hints."""
    hesitating(proxied, figures, times=40)

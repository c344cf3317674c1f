"""If the database and the ticks both stop for longer than a lease, no outcome is lost."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faults.figures import Figures
    from faults.proxy import Proxy
    from faults.rig import Rig

    Proxied = tuple[Rig, Sequence[Proxy]]

IN_FLIGHT = "SELECT count(*) FROM follow_ups WHERE status = 'pending' AND begun_at IS NOT NULL"


def both_unavailable(
    proxied: Proxied, figures: Figures, *, deduplicates: bool, count: int, lease: float, rounds: int = 1
) -> None:
    """Cut off the database and stop the ticks while ``count`` calls are in flight."""
    rig, proxies = proxied
    timeout = lease / 2
    rig.options |= {
        "FOLLOWUPS_LEASE": f"{lease}",
        "FOLLOWUPS_TRANSPORT_TIMEOUT": f"{timeout}",
        "FOLLOWUPS_TRANSPORT_DEDUPLICATES": str(deduplicates).lower(),
    }
    rig.start()
    rig.behave(kind="slow", delay=timeout * 0.75)
    took = []
    for _ in range(rounds):
        rig.bulk(count)
        wait_until(lambda: rig.world.scalar(IN_FLIGHT) == count)
        outage(rig, proxies, lease + 1)
        took.append(rig.settle_down(within=60))
    verdict = rig.verdict()
    figures.keep(
        23,
        verdict,
        deduplicates=deduplicates,
        in_flight=count * rounds,
        sent=verdict.ended["sent"],
        made_again=verdict.repeated,
        recorded_max_s=round(max(took), 2),
    )
    assert verdict.ended == {"sent": count * rounds}
    assert verdict.repeated == 0


def outage(rig: Rig, proxies: Sequence[Proxy], seconds: float) -> None:
    """Stop beat or the broker, then cut off the database for ``seconds`` seconds, and end both faults."""
    database, broker = proxies
    beats = [child for child in rig.processes.children if child.command.name.startswith("beat.")]
    without_beat = rig.rng.random() < 0.5
    if without_beat:
        for beat in beats:
            beat.signal(signal.SIGSTOP)
    else:
        broker.stall()
    # by now, every tick that was running has finished its claim
    time.sleep(2 * rig.settings.tick_interval.total_seconds())
    database.refuse()
    time.sleep(seconds)
    database.flow()
    broker.flow()
    for beat in beats:
        beat.signal(signal.SIGCONT)


@pytest.mark.parametrize("deduplicates", [True, False])
def test_both_unavailable(proxied: Proxied, figures: Figures, *, deduplicates: bool) -> None:
    """If the database and the ticks stop for longer than a lease, accepted messages are not sent again.

    The outcomes of the accepted calls are recorded later.
    """
    both_unavailable(proxied, figures, deduplicates=deduplicates, count=60, lease=4)


@pytest.mark.faults_long
@pytest.mark.parametrize("deduplicates", [True, False])
def test_both_unavailable_for_long(proxied: Proxied, figures: Figures, *, deduplicates: bool) -> None:
    """If the database and the ticks stop together five times, no call is repeated."""
    both_unavailable(proxied, figures, deduplicates=deduplicates, count=100, lease=20, rounds=5)

"""Tests in which PostgreSQL is restarted or killed, or its sessions are terminated.

Follow-ups are sent late, but none is lost or sent twice.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from faults.rig import Load
from stack import wait_until

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig

BACK_WITHIN = 10.0
"""Sending must resume within this many seconds, or within twice as many on a busy machine."""


def outages(rig: Rig, figures: Figures, times: int, between: tuple[float, float], rate: float) -> None:
    """Kill or restart PostgreSQL this many times under load; check each time that sending continues."""
    assert rig.postgres
    workers = rig.start(workers=2, beats=2)
    back_after = []
    since = time.monotonic()
    with Load(rig, rate, seconds=3600) as load:
        for _ in range(times):
            time.sleep(rig.rng.uniform(*between))
            if rig.rng.random() < 0.5:
                rig.postgres.kill()
                time.sleep(rig.rng.random())
            rig.postgres.restart()
            back_after.append(seconds_until_accepted(rig))
    took = rig.settle_down(within=60)
    verdict = rig.verdict()
    # A client may have seen an error although its transaction was committed.
    assert verdict.ended.keys() == {"sent"}
    assert verdict.ended["sent"] >= len(load.ids) + times
    assert all(worker.running for worker in workers)
    assert rig.events("database_unreachable")
    figures.keep(
        6,
        verdict,
        outages=times,
        first_sent_after_return_max_s=round(max(back_after), 2),
        all_sent_after_the_last_s=round(took, 2),
        refused_to_clients=load.refused,
        **timeline(rig, since),
    )
    assert max(back_after) < 2 * BACK_WITHIN


def timeline(rig: Rig, since: float) -> dict[str, list[int]]:
    """Return how many follow-ups were accepted in each of at most 30 equal intervals of whole seconds."""
    at = [one["receivedMonotonic"] - since for one in rig.received() if one["accepted"] and not one["duplicate"]]
    stretch = math.ceil((max(at) + 1) / 30)
    counts = Counter(int(each // stretch) for each in at)
    return {f"accepted_each_{stretch}_s": [counts[number] for number in range(max(counts) + 1)]}


def seconds_until_accepted(rig: Rig) -> float:
    """Create a follow-up, and return how many seconds pass until the chat accepts it."""
    returned = time.monotonic()
    (probe,) = rig.bulk(1)
    wait_until(lambda: rig.accepted(probe), within=60)
    return time.monotonic() - returned


def test_restarted_under_load(breakable: Rig, figures: Figures) -> None:
    """If PostgreSQL restarts, sending continues within seconds; no message is lost or sent twice."""
    outages(breakable, figures, times=2, between=(0.5, 1.5), rate=60)


@pytest.mark.faults_long
def test_restarted_for_minutes(breakable: Rig, figures: Figures) -> None:
    """If PostgreSQL is restarted every 5 to 40 seconds, sending continues each time."""
    outages(breakable, figures, times=10, between=(5, 40), rate=60)


def test_restarted_with_a_long_lease(breakable: Rig, figures: Figures) -> None:
    """If a PostgreSQL restart interrupts claim, begin or settle, all follow-ups are sent within a minute."""
    breakable.options["FOLLOWUPS_LEASE"] = "120"
    assert breakable.postgres
    breakable.start(workers=2)
    with Load(breakable, 150, seconds=2.5, spread=0.2) as load:
        time.sleep(1 + breakable.rng.random())
        breakable.postgres.restart()
        load.wait()
    took = breakable.settle_down(within=60)
    verdict = breakable.verdict()
    assert verdict.ended.keys() == {"sent"}
    assert verdict.ended["sent"] >= len(load.ids)
    figures.keep(6, verdict, long_lease_all_sent_after_s=round(took, 2))


def sessions_ended(rig: Rig, figures: Figures, times: int) -> None:
    """Under load, terminate all of the workers' database sessions at random moments, ``times`` times."""
    rig.start(workers=2, beats=2)
    ended = 0
    end = text("""
        SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = 'followups-worker'
    """)
    with Load(rig, 80, seconds=3600) as load:
        for _ in range(times):
            time.sleep(rig.rng.random() / 2)
            with rig.world.engine.connect() as connection:
                ended += connection.scalar(end)
    took = rig.settle_down(within=60)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(load.ids)}
    assert ended > 0
    figures.keep(6, verdict, sessions_ended=ended, all_sent_after_s=round(took, 2))


def test_sessions_ended(rig: Rig, figures: Figures) -> None:
    """If an operator terminates database sessions, the processes simply reconnect."""
    sessions_ended(rig, figures, times=8)


@pytest.mark.faults_long
def test_sessions_ended_for_minutes(rig: Rig, figures: Figures) -> None:
    """If database sessions are ended four times a second for minutes, the processes reconnect."""
    sessions_ended(rig, figures, times=400)


def test_started_before_its_servers(breakable: Rig) -> None:
    """If worker and beat start before their servers, they log what is missing and wait."""
    assert breakable.postgres
    assert breakable.valkey
    servers = (breakable.postgres, breakable.valkey)
    (follow_up,) = breakable.bulk(1)
    for server in servers:
        server.kill()
    breakable.sandbox()
    beat = breakable.beat()
    worker = breakable.worker(ready=False)
    wait_until(lambda: "Cannot connect to redis://" in worker.command.log.read_text(), within=60)
    wait_until(lambda: breakable.events("database_unreachable"), within=60)
    for server in servers:
        server.restart()
    breakable.wait_until_done(follow_up, within=60)
    assert breakable.accepted(follow_up) == [str(follow_up)]
    assert worker.running
    assert beat.running

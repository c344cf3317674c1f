"""Tests with an open snapshot under load. Dead rows cannot be vacuumed, but sending continues."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import psycopg
import pytest

from faults.measures import claim_ms, lag_p99_ms
from faults.rig import Load
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faults.figures import Figures
    from faults.rig import Rig

DEAD = "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'follow_ups'"


@contextmanager
def snapshot(rig: Rig) -> Iterator[Callable[[], int]]:
    """Keep a snapshot open; yield a function that counts the sent follow-ups in the snapshot.

    The snapshot stays open as it would during a dump or a report. The service's own sessions cannot hold a snapshot for
    long, because idle transactions are ended.
    """
    with psycopg.connect(rig.settings.database_url.get_secret_value()) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ

        def sent() -> int:
            (count,) = connection.execute("SELECT count(*) FROM follow_ups WHERE status = 'sent'").fetchone() or (-1,)
            return int(count)

        assert sent() == 0
        yield sent


def under_snapshot(rig: Rig, figures: Figures, rate: float, seconds: float) -> None:
    """With a snapshot open, measure claims and lag at the start and at the end of a load."""
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "20", "FOLLOWUPS_LEASE": "40"}
    rig.start()
    with snapshot(rig) as sent_then:
        began = datetime.now(UTC)
        with Load(rig, rate, seconds, spread=2.0) as load:
            load.wait()
        rig.settle_down(within=60)
        ended = datetime.now(UTC)
        # PostgreSQL's statistics are updated a little later
        dead = wait_until(lambda: rig.world.scalar(DEAD), within=60, every=0.5)
        assert sent_then() == 0  # the snapshot stayed open during the whole load
    part = (ended - began) / 6
    some = len(load.ids) // 6
    verdict = rig.verdict()
    figures.keep(
        18,
        verdict,
        held_s=round((ended - began).total_seconds(), 1),
        claim_at_start_ms=claim_ms(rig, began, began + part),
        claim_at_end_ms=claim_ms(rig, ended - part, ended),
        lag_p99_at_start_ms=lag_p99_ms(rig, load.ids[:some]),
        lag_p99_at_end_ms=lag_p99_ms(rig, load.ids[-some:]),
        dead_tuples=dead,
    )
    assert verdict.ended == {"sent": len(load.ids)}


def test_open_snapshot(rig: Rig, figures: Figures) -> None:
    """An open snapshot does not stop delivery: under load, each follow-up is sent once."""
    under_snapshot(rig, figures, rate=100, seconds=5)


@pytest.mark.faults_long
def test_long_open_snapshot(rig: Rig, figures: Figures) -> None:
    """If a snapshot stays open for a quarter of an hour, each follow-up due in that time is sent once."""
    under_snapshot(rig, figures, rate=40, seconds=900)

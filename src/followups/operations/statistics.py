"""A snapshot of the system: counts by state, lag, throughput, attempts, and the age of the last tick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from followups.settings import get_settings
from followups.store import counts as store
from followups.store import last_tick

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime, timedelta

    from sqlalchemy import Engine

    from followups.store.counts import Counts, Pace

SECONDS = 60
"""Seconds of sending history in the dashboard."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the system. A snapshot of the system. ``pace`` is None if measuring it took too long."""

    at: datetime
    counts: Counts
    pace: Pace | None
    attempts: Mapping[str, int]
    """The number of all attempts so far, by outcome."""
    tick_age: timedelta | None
    per_second: Sequence[int] | None = None
    """Number of follow-ups sent in each of the last seconds, for the dashboard."""


def measure(engine: Engine, window: timedelta) -> Stats:
    """Return a snapshot, with lag and throughput over the last ``window``."""
    with engine.begin() as opened:
        at = opened.execute(select(func.now())).scalar_one()
        counts = store.count(opened, window=get_settings().max_in_flight)
        return Stats(at, counts, store.pace(opened, window), store.attempts(opened), last_tick.last_tick_age(opened))


def measure_by_second(engine: Engine, window: timedelta) -> Stats:
    """Return a snapshot with the number of follow-ups sent in each of the last `SECONDS` seconds."""
    look = measure(engine, window)
    with engine.begin() as opened:
        return replace(look, per_second=store.per_second(opened, SECONDS))

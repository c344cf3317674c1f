"""Measurements that several fault tests share: lag, and the duration of a claim."""

from __future__ import annotations

import statistics
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from faults.rig import rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from faults.rig import Rig
    from world import World

NOTICE = timedelta(seconds=0.5)
"""Minimum time from creation to due date: several ticks, enough to send on time."""


PORTION = 2_000
"""Number of rows in one INSERT statement; a larger statement could exceed the client's timeout."""


def punctual(rig: Rig, count: int, spread: float, world: World | None = None, notice: timedelta = NOTICE) -> list[UUID]:
    """Insert follow-ups due within ``spread`` seconds, early enough for all to be sent on time."""
    due = [notice + timedelta(seconds=rig.rng.random() * spread) for _ in range(count)]
    ids = [
        id_ for first in range(0, count, PORTION) for id_ in (world or rig.world).burst(due[first : first + PORTION])
    ]
    rig.created.update(ids)
    return ids


def lag_p99_ms(rig: Rig, ids: Sequence[UUID]) -> float:
    """Return the 99th percentile of the follow-ups' lag in milliseconds."""
    query = "SELECT extract(epoch FROM accepted_at - due_date) FROM follow_ups WHERE id = ANY(:ids) AND status = 'sent'"
    lags = [float(lag) for (lag,) in rows_of(rig, query, ids=list(ids))]
    return round(statistics.quantiles(lags, n=100, method="inclusive")[98] * 1000, 1)


def claim_ms(rig: Rig, since: datetime, until: datetime) -> float | None:
    """Return the median duration of the claims that succeeded between two times, or None if there were none."""
    took = [tick["duration_ms"] for tick in rig.events("tick") if since <= _moment(tick) <= until]
    return round(statistics.median(took), 2) if took else None


def _moment(line: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(line["timestamp"])

"""A workspace with more failing follow-ups than MAX_IN_FLIGHT does not stop other workspaces."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from faults.measures import PORTION, lag_p99_ms
from faults.rig import rows_of
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from uuid import UUID

    from faults.figures import Figures
    from faults.rig import Rig

PENDING = "SELECT count(*) FROM follow_ups WHERE status = 'pending' AND workspace_id = :own"

SEEN = "SELECT count(*) FROM follow_ups WHERE (lease_until > now() OR limited_until > now()) AND workspace_id = :own"
"""SQL that counts a workspace's follow-ups that are leased or deferred."""


def backlog(rig: Rig, figures: Figures, overdue: int, others: int) -> None:
    """Make one workspace's chats fail; measure another workspace's lag, and how soon the backlog is sent."""
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "20", "FOLLOWUPS_LEASE": "60", "FOLLOWUPS_RETRY_BASE": "1"}
    rig.start()
    theirs = World(rig.world.engine)
    rig.behave(kind="fail", status=503)
    held = [id_ for first in range(0, overdue, PORTION) for id_ in rig.held(min(PORTION, overdue - first))]
    quiet = theirs.burst([timedelta(days=1)] * others)
    rig.created.update(quiet)
    for (chat_id,) in rows_of(rig, "SELECT chat_id FROM follow_ups WHERE id = ANY(:ids)", ids=quiet):
        rig.behave(chat_id, kind="accept")
    rig.release(held)
    wait_until(lambda: rig.events("breaker"), within=60)
    window = int(rig.options.get("FOLLOWUPS_MAX_IN_FLIGHT", 5000))
    wait_until(lambda: rows_of(rig, SEEN, own=rig.world.workspace_id)[0][0] >= window * 0.9, within=60)
    rig.release(quiet)
    wait_until(lambda: rows_of(rig, PENDING, own=theirs.workspace_id) == [(0,)], within=60, every=0.05)
    failed = sum(one["outcome"] == "failed" for one in rig.received())
    left = rows_of(rig, PENDING, own=rig.world.workspace_id)[0][0]
    back = time.monotonic()
    rig.behave(kind="accept")
    rig.settle_down(within=60 + overdue / 50)
    took = time.monotonic() - back
    verdict = rig.verdict()
    figures.keep(
        25,
        verdict,
        backlog=len(held),
        others=len(quiet),
        others_p50_ms=lag_p50_ms(rig, quiet),
        others_p99_ms=lag_p99_ms(rig, quiet),
        attempts_used_up=failed,
        backlog_sent_after_s=round(took, 2),
    )
    assert left == len(held)
    assert verdict.ended == {"sent": len(held) + len(quiet)}


def lag_p50_ms(rig: Rig, ids: list[UUID]) -> float:
    """Return the median lag of the given follow-ups in milliseconds."""
    query = "SELECT extract(epoch FROM accepted_at - due_date) FROM follow_ups WHERE id = ANY(:ids)"
    return round(statistics.median(float(lag) for (lag,) in rows_of(rig, query, ids=ids)) * 1000, 1)


def test_backlog_that_is_left_alone(rig: Rig, figures: Figures) -> None:
    """A failing workspace's backlog is sent later; other workspaces' follow-ups do not wait."""
    rig.options |= {"FOLLOWUPS_MAX_IN_FLIGHT": "200", "FOLLOWUPS_CONCURRENCY": "8", "FOLLOWUPS_BREAKER_FAILURES": "20"}
    backlog(rig, figures, overdue=1500, others=50)


@pytest.mark.faults_long
def test_backlog_that_is_left_alone_for_long(rig: Rig, figures: Figures) -> None:
    """While 20,000 follow-ups of a failing workspace wait, 1,000 of another workspace are sent."""
    backlog(rig, figures, overdue=20_000, others=1_000)

"""Tests with thousands of follow-ups behind two stuck ones: claims and other chats remain fast."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from faults.measures import PORTION, claim_ms, lag_p99_ms, punctual
from faults.rig import rows_of
from stack import wait_until

if TYPE_CHECKING:
    from uuid import UUID

    from faults.figures import Figures
    from faults.rig import Rig

_PILE = """
    INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)
    SELECT :workspace, (CAST(:chats AS uuid[]))[n % 2 + 1], 'Still there?',
           now() - interval '1 minute' + n * interval '1 us', gen_random_uuid()
      FROM generate_series(CAST(:first AS int), :last) n
    RETURNING id
"""


def stuck_chats(rig: Rig) -> list[UUID]:
    """Return two chats that accept nothing for an hour: one responds with 429, the other with a failure."""
    chats = [rig.world.chat(), rig.world.chat()]
    rig.behave(chats[0], kind="rate_limit", retry_after=3600)
    rig.behave(chats[1], kind="fail", retry_after=3600)
    return chats


def pile_up(rig: Rig, chats: list[UUID], count: int) -> None:
    """In one transaction, insert ``count`` due follow-ups into the test's two chats."""
    with rig.world.engine.begin() as connection:
        for first in range(1, count + 1, PORTION):
            numbers = {"first": first, "last": min(first + PORTION - 1, count)}
            parameters = {"workspace": rig.world.workspace_id, "chats": chats} | numbers
            rig.created.update(connection.scalars(text(_PILE), parameters))


def others(rig: Rig, count: int, spread: float) -> dict[str, float | None]:
    """Deliver follow-ups of other chats; return their lag, and how long claims took meanwhile."""
    since = datetime.now(UTC)
    ids = punctual(rig, count, spread)
    rig.wait_until_done(*ids, within=120)
    return {"lag_p99_ms": lag_p99_ms(rig, ids), "claim_ms": claim_ms(rig, since, datetime.now(UTC))}


def behind_stuck(rig: Rig, figures: Figures, count: int, spread: float) -> None:
    """Measure how ``count`` follow-ups in stuck chats affect the other chats."""
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "20", "FOLLOWUPS_LEASE": "40"}
    rig.start()
    api, chats, each = rig.web(), stuck_chats(rig), round(100 * spread)
    found = {"without": others(rig, each, spread)}
    started = time.monotonic()
    pile_up(rig, chats, count)
    found["piling_up"] = others(rig, each, spread)
    waiting = "SELECT count(*) FROM follow_ups WHERE waits_for IS NOT NULL"
    wait_until(lambda: rig.world.scalar(waiting) == count - 2, within=60 + count / 200, every=0.1)
    aside = time.monotonic() - started
    found["with"] = others(rig, each, spread)
    with api.client:
        api.client.timeout = 60
        for chat_id in chats:
            assert api.message(str(chat_id), "user").status_code == 201
    rig.settle_down(within=60)
    verdict = rig.verdict()
    named = {f"{name}_{when}": value for when, values in found.items() for name, value in values.items()}
    figures.keep(17, verdict, behind=count, all_aside_after_s=round(aside, 1), **named)
    assert verdict.ended == {"sent": 3 * each, "cancelled": count}
    refused = rows_of(rig, "SELECT outcome, count(*) FROM failed_attempts GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in refused] == [
        ("retry", 1),
        ("snoozed", 1),
    ]  # only the first follow-up of each chat has ever been attempted


def test_stuck_chats(rig: Rig, figures: Figures) -> None:
    """The follow-ups behind two stuck ones cause no calls; a reply in each chat cancels all 5,000."""
    behind_stuck(rig, figures, count=5_000, spread=1.5)


@pytest.mark.faults_long
def test_stuck_chats_with_many(rig: Rig, figures: Figures) -> None:
    """A reply in each of two stuck chats cancels all 100,000 follow-ups there."""
    behind_stuck(rig, figures, count=100_000, spread=10.0)

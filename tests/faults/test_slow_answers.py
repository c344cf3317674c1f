"""Tests that one slow chat in a hundred does not delay the other chats."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import pytest

from faults.rig import rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from faults.figures import Figures
    from faults.rig import Rig


def received_within(rig: Rig, ids: Sequence[UUID]) -> tuple[float, float]:
    """Release the follow-ups; return the seconds until 99 % are received and until all are recorded."""
    released = time.monotonic()
    rig.release(ids)
    rig.settle_down(within=120 + len(ids) / 50)
    settled = time.monotonic() - released
    names = {str(id_) for id_ in ids}
    times = sorted(one["receivedMonotonic"] for one in rig.received() if one["followUpId"] in names and one["accepted"])
    return times[math.ceil(len(ids) * 0.99) - 1] - released, settled


def slow_answers(rig: Rig, figures: Figures, count: int, delay: float) -> None:
    """Deliver ``count`` follow-ups to fast chats, then as many again, 1 % of them to slow chats."""
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "30", "FOLLOWUPS_LEASE": "60"}
    rig.start()
    quick, _ = received_within(rig, rig.held(count))
    ids = rig.held(count)
    slow = rig.rng.sample(ids, count // 100)
    for (chat_id,) in rows_of(rig, "SELECT chat_id FROM follow_ups WHERE id = ANY(:ids)", ids=slow):
        rig.behave(chat_id, kind="slow", delay=delay)
    with_slow, settled = received_within(rig, ids)
    verdict = rig.verdict()
    figures.keep(
        14,
        verdict,
        quick_99_percent_s=round(quick, 2),
        with_slow_99_percent_s=round(with_slow, 2),
        slow_to_quick_ratio=round(with_slow / quick, 2),
        per_s_quick=round(count * 0.99 / quick),
        per_s_with_slow=round(count * 0.99 / with_slow),
    )
    assert verdict.ended == {"sent": 2 * count}
    assert settled > delay  # the slow chats really answered late


def test_slow_answers(rig: Rig, figures: Figures) -> None:
    """If 1 % of responses take a second, each follow-up is sent once, and 99 % are sent without delay."""
    slow_answers(rig, figures, count=1_000, delay=1.0)


@pytest.mark.faults_long
def test_very_slow_answers(rig: Rig, figures: Figures) -> None:
    """If 1 % of the answers take five seconds, each follow-up is still sent once."""
    slow_answers(rig, figures, count=20_000, delay=5.0)

"""Tests of lost responses: a call is repeated with its key, or its outcome is unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig


def dropped(rig: Rig, figures: Figures, count: int, *, deduplicates: bool) -> None:
    """Drop the chat server's response to the first request of every third follow-up."""
    rig.options["FOLLOWUPS_TRANSPORT_DEDUPLICATES"] = str(deduplicates).lower()
    # a long timeout, so that a call fails only if its response is dropped
    rig.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "20", "FOLLOWUPS_LEASE": "40"}
    rig.beat()
    rig.sandbox(*() if deduplicates else ("--no-dedup",))
    rig.worker()
    ids = rig.held(count)
    unlucky = rig.rng.sample(ids, count // 3)
    for follow_up in unlucky:
        rig.behave(rig.world.row(follow_up).chat_id, kind="drop", times=1)
    rig.release(ids, spread=1.0)
    rig.settle_down(within=60)
    verdict = rig.verdict()
    dropped_answers = sum(one["outcome"] == "dropped" for one in rig.received())
    assert dropped_answers == count // 3
    if deduplicates:
        assert verdict.ended == {"sent": count}
        assert verdict.repeated >= dropped_answers
    else:
        assert verdict.ended == {"sent": count - dropped_answers, "failed": dropped_answers}
        assert verdict.unknown == dropped_answers
    figures.keep(4, verdict, answers_dropped=dropped_answers, unknown=verdict.unknown)


@pytest.mark.parametrize("deduplicates", [True, False], ids=["deduplicating", "not-deduplicating"])
def test_answers_dropped(deduplicates: bool, rig: Rig, figures: Figures) -> None:  # noqa: FBT001 - a parameter
    """If responses are lost, deduplicating chats get each message once; elsewhere, outcomes are unknown."""
    dropped(rig, figures, 90, deduplicates=deduplicates)


@pytest.mark.faults_long
@pytest.mark.parametrize("deduplicates", [True, False], ids=["deduplicating", "not-deduplicating"])
def test_many_answers_dropped(deduplicates: bool, rig: Rig, figures: Figures) -> None:  # noqa: FBT001 - a parameter
    """If a third of 3,000 responses are lost, no message is sent twice."""
    dropped(rig, figures, 3000, deduplicates=deduplicates)

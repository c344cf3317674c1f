"""A reply is never lost through a deadlock with a caller's transaction."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import followups
from followups.database_errors import is_undone
from followups.errors import AlreadyFinishedError, NothingToFollowUpError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from faults.figures import Figures
    from faults.rig import Rig

CLIENTS = 4
"""Number of threads that replace follow-ups; the same number of threads send replies."""
DELAY = 0.01
"""Longest random pause, in seconds, before a replacement or a reply, and between cancel and schedule."""


def replace_one(rig: Rig, follow_up: UUID, chat_id: UUID, delays: Sequence[float]) -> str:
    """Cancel a follow-up and schedule another in the same chat, in one transaction."""
    before, between = delays
    time.sleep(before)
    try:
        with Session(rig.world.engine) as session, session.begin():
            followups.cancel(session, follow_up, reason="another one instead")
            time.sleep(between)
            followups.schedule(
                session,
                workspace_id=rig.world.workspace_id,
                chat_id=chat_id,
                message="Still there?",
                due_date=datetime.now(UTC),
            )
    except (AlreadyFinishedError, NothingToFollowUpError):
        return "refused"
    except OperationalError as error:
        if not is_undone(error):
            raise
        return "deadlocked"
    return "replaced"


def replace_during_replies(rig: Rig, figures: Figures, pairs: int) -> None:
    """Replace each chat's follow-up while a reply arrives and a worker sends due follow-ups."""
    rig.start(workers=1)
    api = rig.web()
    ids = rig.held(pairs)
    chats = [rig.world.row(id_).chat_id for id_ in ids]
    pauses = [([rig.rng.uniform(0, DELAY) for _ in range(2)], rig.rng.uniform(0, DELAY)) for _ in ids]
    with ThreadPoolExecutor(CLIENTS) as pairs_at_once, ThreadPoolExecutor(CLIENTS) as callers:

        def both(number: int) -> tuple[Callable[[], str], int]:
            delays, wait = pauses[number]
            replacing = callers.submit(replace_one, rig, ids[number], chats[number], delays)
            time.sleep(wait)
            return replacing.result, api.message(str(chats[number]), "user").status_code

        outcomes = [(replaced(), code) for replaced, code in pairs_at_once.map(both, range(pairs))]
    replaced, answers = (Counter(side) for side in zip(*outcomes, strict=True))
    rig.settle_down()
    verdict = rig.verdict()
    api.client.close()
    lost = len(rig.events("request_tried_again"))
    assert answers == {201: pairs}
    assert replaced.keys() <= {"replaced", "refused"}
    assert lost == 0
    assert {rig.world.row(id_).status for id_ in ids} == {"cancelled"}
    figures.keep(27, verdict, replaced=dict(replaced), replies=dict(answers), deadlocks=lost)


def test_replace_during_replies(rig: Rig, figures: Figures) -> None:
    """If a user replies while a transaction replaces a follow-up, neither is lost to a deadlock."""
    replace_during_replies(rig, figures, pairs=150)


@pytest.mark.faults_long
def test_replace_during_many_replies(rig: Rig, figures: Figures) -> None:
    """In 5,000 chats, no concurrent reply and no replacement of a follow-up is lost to a deadlock."""
    replace_during_replies(rig, figures, pairs=5_000)

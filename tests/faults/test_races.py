"""Tests of races: a cancel against a delivery, and a reply against a create request."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

import web

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig

CLIENTS = 8
NEAR = 0.03
"""Longest time between a cancel and the due time, in seconds. An attempt begins 15 ms before its due time."""


def cancel_against_deliver(rig: Rig, figures: Figures, pairs: int, spread: float) -> None:
    """Cancel each follow-up at about its due time."""
    rig.start(workers=2)
    api = rig.web()
    ids = rig.bulk(pairs, spread)
    aimed = [(rig.world.row(id_).due_date.timestamp() + rig.rng.uniform(-NEAR, NEAR), id_) for id_ in ids]

    def cancel(one: tuple[float, UUID]) -> tuple[UUID, int]:
        moment, follow_up = one
        time.sleep(max(moment - time.time(), 0))
        return follow_up, rig.cancel(api, follow_up)

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = dict(clients.map(cancel, sorted(aimed)))
    rig.settle_down()
    verdict = rig.verdict()
    api.client.close()
    accepted = Counter(rig.accepted())
    outcomes: Counter[str] = Counter()
    for row in rig.world.rows():
        outcomes[f"{answers[row.id]} {row.status}"] += 1
        assert (answers[row.id] == 200) == (row.status == "cancelled"), (row, answers[row.id])
        assert accepted[str(row.id)] == (row.status == "sent")
    assert outcomes.keys() <= {"200 cancelled", "409 sent"}
    figures.keep(16, verdict, cancel_against_deliver=dict(outcomes))


def reply_against_create(rig: Rig, figures: Figures, pairs: int) -> None:
    """Send a reply and a create request for one chat concurrently, then deliver due follow-ups."""
    api = rig.web()
    chats = [str(uuid4()) for _ in range(pairs)]
    for chat_id in chats:
        api.message(chat_id, "agent")

    def act(one: tuple[str, str]) -> tuple[str, str, int]:
        kind, chat_id = one
        if kind == "reply":
            return kind, chat_id, api.message(chat_id, "user").status_code
        body = {"chatId": chat_id, "dueDate": datetime.now(UTC).isoformat(), "message": "Still there?"}
        return kind, chat_id, api.post(web.FOLLOW_UPS, body).status_code

    order = [(kind, chat_id) for chat_id in chats for kind in rig.rng.sample(["reply", "create"], 2)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(act, order))
    rig.start(workers=1)
    rig.settle_down()
    verdict = rig.verdict()
    api.client.close()
    created = {chat_id: code for kind, chat_id, code in answers if kind == "create"}
    assert {code for kind, _, code in answers if kind == "reply"} == {201}
    outcomes: Counter[str] = Counter(f"{code}" for code in created.values() if code != 201)
    for row in rig.world.rows():
        full = rig.world.row(row.id)
        outcomes[f"201 {full.status} {full.reason}"] += 1
    # No worker ran until both responses had arrived, so no follow-up can have been sent.
    assert outcomes.keys() <= {"409", "201 cancelled user_replied"}
    figures.keep(16, verdict, reply_against_create=dict(outcomes))


def test_cancel_against_deliver(rig: Rig, figures: Figures) -> None:
    """If a cancel returns 200, the message is never sent; if a cancel returns 409, the message is sent."""
    cancel_against_deliver(rig, figures, pairs=200, spread=4.0)


def test_reply_against_create(rig: Rig, figures: Figures) -> None:
    """If a reply arrives before the create request, no follow-up is created."""
    reply_against_create(rig, figures, pairs=100)


@pytest.mark.faults_long
def test_many_cancels_against_deliver(rig: Rig, figures: Figures) -> None:
    """In ten thousand races of a cancel with a send, only follow-ups whose cancel got 409 are sent."""
    cancel_against_deliver(rig, figures, pairs=10_000, spread=150.0)


@pytest.mark.faults_long
def test_many_replies_against_create(rig: Rig, figures: Figures) -> None:
    """In ten thousand races of a reply and a create request, no follow-up is created after the reply."""
    reply_against_create(rig, figures, pairs=10_000)

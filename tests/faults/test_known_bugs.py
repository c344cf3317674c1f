"""Known bugs of similar systems, each with a test that would detect the bug here.

| bug | test |
| --- | --- |
| a campaign sent 2-3 times by overlapping ticks (chatwoot#12821) | `test_beats.py`, `test_guards.py::lock at claim` |
| a full-row save that brought a sent message back to pending (zulip#39521) | `test_stale_row_is_saved` |
| delivered with a null message id (zulip#39103) | `test_sent_and_its_message_id_are_one` |
| a follow-up after a human had taken over (automagik-dev/omni#667) | `test_taken_over_while_leased` |
| a cancel that reached only unclaimed messages (fazer-ai/agents#760) | `test_guards.py::pending and lease at begin` |
| a timeout retried as if nothing had happened (camel-ai/camel#4280) | `test_dropped_answers.py` |
| a deduplication key without a generation (omni) | `test_same_text_again` |
| "not in the past" that refused the worker's own write (mattermost#28656) | `test_overdue_rows_can_be_written` |
| a look-back window that silently dropped older messages (chatwoot) | `test_due_long_ago` |
| answers ping, consumes nothing (kombu#2492, celery#10205) | `test_broker_outage.py`, `test_hesitating_broker.py` |
| shutdown in the middle of a commit (celery#10271) | `test_stopped_in_mid_commit` |
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import followups
from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.delivery.settle import settle
from followups.errors import AlreadyFinishedError
from followups.models import FollowUp
from followups.scheduling import amend
from followups.store import chats
from followups.transports.port import Retry, Sent
from stack import wait_until
from steps import reply

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from faults.figures import Figures
    from faults.rig import Rig
    from followups.settings import Settings
    from followups.transports.port import Outcome
    from world import World


def deliver(engine: Engine, settings: Settings, outcome: Outcome) -> None:
    """Claim, begin and settle the due follow-up."""
    (begun,) = begin(engine, settings, claim(engine, settings).leases).begun
    settle(engine, settings, [Attempt(begun, outcome, 0.0, time.monotonic(), 0.0)])


def test_stale_row_is_saved(world: World, engine: Engine, settings: Settings) -> None:
    """If a follow-up is sent after its row was read, the stale row cannot be saved."""
    follow_up = world.follow_up()
    with Session(engine) as session:
        assert session.get_one(FollowUp, follow_up).status == "pending"
        session.commit()  # after the commit, the object keeps its old value, like a cached object
        deliver(engine, settings, Sent(None))
        with pytest.raises(AlreadyFinishedError):
            amend(session, follow_up, {"message": "Hello?"})
        session.commit()
    assert world.row(follow_up).status == "sent"


def test_sent_and_its_message_id_are_one(world: World, engine: Engine, settings: Settings) -> None:
    """The status `sent` and the transport's message id are always written together, in one statement."""
    follow_up, message_id = world.follow_up(), uuid4()
    deliver(engine, settings, Sent(message_id))
    row = world.row(follow_up)
    assert (row.status, row.chat_message_id) == ("sent", message_id)
    writes = world.scalar(
        "SELECT count(*) FROM follow_ups WHERE chat_message_id IS NOT NULL AND finished_at = updated_at"
    )
    assert writes == 1


def test_taken_over_while_leased(world: World, engine: Engine, settings: Settings) -> None:
    """After an operator's message, neither a hint nor a retry begins an attempt."""
    chat = world.chat()
    leased, tried = world.follow_up(chat), world.follow_up(world.chat())
    hints = claim(engine, settings).leases
    (begun,) = begin(engine, settings, [one for one in hints if one.id == tried]).begun
    settle(engine, settings, [Attempt(begun, Retry("HTTP 500"), 0.0, time.monotonic(), 0.0)])
    for chat_id in (chat, world.row(tried).chat_id):
        reply(world, chat_id, chats.Role.OPERATOR)
    assert not begin(engine, settings, hints).begun
    assert {world.row(one).reason for one in (leased, tried)} == {"human_takeover"}


def test_same_text_again(rig: Rig, figures: Figures) -> None:
    """If two follow-ups have the same text, a chat that deduplicates by key accepts both."""
    rig.start()
    rig.bulk(20, spread=0.5, per_chat=4)
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert rig.world.scalar("SELECT count(DISTINCT message) FROM follow_ups") == 1
    assert verdict.ended == {"sent": 20}
    figures.keep(11, verdict, same_words_sent=20)


def test_overdue_rows_can_be_written(world: World, engine: Engine, settings: Settings) -> None:
    """The row of an overdue follow-up can still be updated, for a new message or a failed attempt."""
    settings = settings.model_copy(update={"max_lateness": timedelta(0)})
    follow_up = world.follow_up(due=-timedelta(hours=2), scheduled_at=text("now() - interval '2 h'"))
    with Session(engine) as session, session.begin():
        amend(session, follow_up, {"message": "Hello?"})
    deliver(engine, settings, Retry("HTTP 500", timedelta(seconds=1)))
    row = world.row(follow_up)
    assert (row.status, row.attempts, row.message) == ("pending", 1, "Hello?")
    assert row.due_date < row.next_attempt_at


def test_due_long_ago(world: World, engine: Engine, settings: Settings) -> None:
    """A follow-up due long ago is still claimed, and then fails as `too_late`."""
    follow_up = world.follow_up(due=-timedelta(days=3000), scheduled_at=text("now() - interval '3000 days'"))
    low_water = claim(engine, settings.model_copy(update={"max_in_flight": 1})).low_water
    world.expire(follow_up)
    beginning = begin(engine, settings, claim(engine, settings, low_water).leases)
    assert [(one, final.reason) for one, final in beginning.ended] == [(follow_up, "too_late")]


def test_a_cancel_ends_a_claimed_follow_up(world: World, engine: Engine, settings: Settings) -> None:
    """If a claimed follow-up is cancelled, its hint has no effect."""
    follow_up = world.follow_up()
    hints = claim(engine, settings).leases
    with Session(engine) as session, session.begin():
        followups.cancel(session, follow_up)
    assert not begin(engine, settings, hints).begun
    assert world.row(follow_up).status == "cancelled"


def test_stopped_in_mid_commit(rig: Rig, figures: Figures) -> None:
    """If SIGTERM arrives during a settle, the settle commits and no message is sent again."""
    rig.options |= {"FOLLOWUPS_LEASE": "60", "FOLLOWUPS_TRANSPORT_TIMEOUT": "20"}
    rig.beat()
    rig.sandbox()
    worker = rig.worker(harmed=True)
    rig.failpoints.arm("settle.before_commit", "sleep 1")
    ids = rig.bulk(20)
    wait_until(lambda: rig.failpoints.taken("settle.before_commit"), within=60)
    worker.ask()
    wait_until(lambda: not worker.running, within=60)
    assert worker.exit_code == 0
    rig.worker()
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(ids)}
    figures.keep(5, verdict, stopped_in_mid_commit_sends_per_key=1 + verdict.repeated)

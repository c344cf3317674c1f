"""Tests of how a follow-up's reason mentions an attempt with an unknown outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy.orm import Session

import followups
from followups.checks import final_of
from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.delivery.settle import settle
from followups.states import Status
from followups.store import bulk_cancel
from followups.transports.port import Rejected, Retry, Sent, Unknown
from followups.uptime import uptime
from steps import reply

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.settings import Settings
    from followups.transports.port import Outcome
    from world import World

SAID = "the outcome of an attempt is unknown"


def attempted(world: World, settings: Settings, outcome: Outcome, follow_up_id: UUID) -> None:
    """Make the follow-up due now, attempt it once and settle the attempt."""
    past = "UPDATE follow_ups SET next_attempt_at = now() WHERE id = :id AND next_attempt_at IS NOT NULL"
    world.sql(past, id=follow_up_id)
    (begun,) = begin(world.engine, settings, claim(world.engine, settings).leases).begun
    settle(world.engine, settings, [Attempt(begun, outcome, 0.0, uptime(), 0.0)])


@pytest.fixture
def unknown_outcome(world: World, settings: Settings) -> tuple[UUID, UUID]:
    """Create a pending follow-up with an unknown outcome; return its id and its chat's id."""
    chat_id = world.chat()
    follow_up = world.follow_up(chat_id)
    attempted(world, settings, Unknown("the connection broke"), follow_up)
    assert world.row(follow_up).status == "pending"
    return follow_up, chat_id


def test_reply(world: World, unknown_outcome: tuple[UUID, UUID]) -> None:
    """If a reply follows an attempt with an unknown outcome, the cancel's reason mentions this outcome."""
    follow_up, chat_id = unknown_outcome
    reply(world, chat_id)
    assert world.row(follow_up).reason == f"user_replied: {SAID}"


def test_cancel(world: World, unknown_outcome: tuple[UUID, UUID]) -> None:
    """A cancelled follow-up's reason mentions the unknown outcome, unless the caller gave a reason.

    A reason given by the caller is stored unchanged.
    """
    follow_up, _ = unknown_outcome
    with Session(world.engine) as session, session.begin():
        assert followups.cancel(session, follow_up).reason == f"cancelled_by_api: {SAID}"
    other = world.follow_up()
    with Session(world.engine) as session, session.begin():
        assert followups.cancel(session, other, reason="the customer called").reason == "the customer called"


@pytest.mark.parametrize("words", ["user_replied by phone", "cancelled_by_api: on behalf of Jo", "too_late"])
def test_a_reason_that_begins_like_a_code(world: World, unknown_outcome: tuple[UUID, UUID], words: str) -> None:
    """A caller's reason is stored unchanged, even if it begins like a reason code."""
    follow_up, _ = unknown_outcome
    with Session(world.engine) as session, session.begin():
        assert followups.cancel(session, follow_up, reason=words).reason == words


def cancel_chat(world: World, chat_id: UUID, words: str | None) -> bulk_cancel.Cancelled:
    """Cancel all pending follow-ups of a chat, as an operator does."""
    with world.engine.begin() as connection:
        chosen = bulk_cancel.CancelScope(world.workspace_id, chat_id, bulk_cancel.now(connection))
        final = final_of(Status.CANCELLED, words)
        return bulk_cancel.cancel_if_not_begun(connection, chosen, final, bulk_cancel.CancelCursor())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (None, f"cancelled_by_api: {SAID}"),
        ("stop", "stop"),
        ("user_replied by phone", "user_replied by phone"),
        ("too_late", "too_late"),
    ],
)
def test_bulk_cancel(world: World, unknown_outcome: tuple[UUID, UUID], words: str | None, reason: str) -> None:
    """A bulk cancel of a chat's follow-ups records the same reasons as single cancels."""
    follow_up, chat_id = unknown_outcome
    cancel_chat(world, chat_id, words)
    assert world.row(follow_up).reason == reason


ASKED = [
    (None, "cancelled_by_api: the outcome of the attempt in flight is unknown"),
    ("stop", "stop"),
    ("user_replied: by phone", "user_replied: by phone"),
]


@pytest.mark.parametrize(("words", "reason"), ASKED)
def test_cancel_while_in_flight(world: World, settings: Settings, words: str | None, reason: str) -> None:
    """If a cancel arrives during an attempt, the follow-up gets the cancel's reason."""
    chat_id = world.chat()
    follow_up = world.follow_up(chat_id)
    (begun,) = begin(world.engine, settings, claim(world.engine, settings).leases).begun
    assert cancel_chat(world, chat_id, words).in_flight == 1
    outcome = Unknown("the connection broke")
    settle(world.engine, settings, [Attempt(begun, outcome, 0.0, uptime(), 0.0)])
    assert (world.row(follow_up).status, world.row(follow_up).reason) == ("cancelled", reason)


@pytest.mark.parametrize(("words", "reason"), ASKED)
def test_cancel_before_the_worker_is_lost(world: World, settings: Settings, words: str | None, reason: str) -> None:
    """If a cancel is requested during an attempt whose worker is then lost, the cancel's reason is kept."""
    chat_id = world.chat()
    follow_up = world.follow_up(chat_id)
    begin(world.engine, settings, claim(world.engine, settings).leases)
    cancel_chat(world, chat_id, words)
    world.expire(follow_up)
    claim(world.engine, settings)
    assert (world.row(follow_up).status, world.row(follow_up).reason) == ("cancelled", reason)


def test_rejected(world: World, settings: Settings, unknown_outcome: tuple[UUID, UUID]) -> None:
    """If a follow-up is rejected after an unknown outcome, its reason mentions both attempts."""
    attempted(world, settings, Rejected("HTTP 403", 403), unknown_outcome[0])
    assert world.row(unknown_outcome[0]).reason == f"rejected: HTTP 403; {SAID}"


def test_too_late(world: World, engine: Engine, settings: Settings, unknown_outcome: tuple[UUID, UUID]) -> None:
    """If a follow-up ends as too late, its reason also mentions an earlier attempt's unknown outcome."""
    follow_up, _ = unknown_outcome
    world.sql(
        "UPDATE follow_ups SET due_date = now() - interval '2 d', scheduled_at = now() - interval '2 d',"
        " next_attempt_at = NULL"
    )
    begin(engine, settings, claim(engine, settings).leases)
    assert world.row(follow_up).reason == f"too_late: {SAID}"


def test_last_attempt(world: World, settings: Settings) -> None:
    """If the last attempt's outcome is unknown, the follow-up's reason says so only once."""
    follow_up = world.follow_up()
    last = settings.model_copy(update={"max_attempts": 1})
    attempted(world, last, Unknown("no answer within 1 s"), follow_up)
    assert world.row(follow_up).reason == (
        "retries_exhausted: no answer within 1 s: the outcome of the attempt in flight is unknown"
    )


def test_eventually_sent(world: World, settings: Settings, unknown_outcome: tuple[UUID, UUID]) -> None:
    """If a follow-up is sent in the end, no reason is recorded."""
    attempted(world, settings, Sent(None), unknown_outcome[0])
    row = world.row(unknown_outcome[0])
    assert (row.status, row.reason) == ("sent", None)


def test_known_failure(world: World, settings: Settings) -> None:
    """If an attempt is known to have failed, the reason does not mention an unknown outcome."""
    follow_up = world.follow_up()
    attempted(world, settings, Retry("HTTP 500", None, 500), follow_up)
    attempted(world, settings, Rejected("HTTP 403", 403), follow_up)
    assert world.row(follow_up).reason == "rejected: HTTP 403"

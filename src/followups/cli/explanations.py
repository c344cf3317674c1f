"""Why a follow-up stands where it stands, in words, and what can be done about it. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from followups.cli.times import readable, span
from followups.states import ReasonCode, Status, code_of

if TYPE_CHECKING:
    from followups.models import FollowUp
    from followups.settings import Settings

ENDINGS = {
    ReasonCode.USER_REPLIED: "The user wrote in the chat before it was sent, so there was nothing left to follow up.",
    ReasonCode.HUMAN_TAKEOVER: "A human operator wrote in the chat before it was sent, and has taken over.",
    ReasonCode.CHAT_REMOVED: "The chat was removed before it was sent.",
    ReasonCode.CANCELLED_BY_API: "Somebody cancelled it, through the API or with followups cancel, and gave no reason.",
    ReasonCode.REJECTED: (
        "The transport refused it for good; correct what it complains about, then followups retry makes a new one."
    ),
    ReasonCode.RETRIES_EXHAUSTED: (
        "Every attempt that FOLLOWUPS_MAX_ATTEMPTS ({max_attempts}) allows has failed; the reason names the last error."
        " When the transport is well again, followups retry makes a new one."
    ),
    ReasonCode.WINDOW_CLOSED: (
        "The channel allows messages only within 24 hours of the user's last one, and that time had ended."
    ),
    ReasonCode.TOO_LATE: (
        "It could not be sent within FOLLOWUPS_MAX_LATENESS ({max_lateness}) of its due date: were beat, workers,"
        " database and transport running all that time? followups retry makes a new one."
    ),
    ReasonCode.OUTCOME_UNKNOWN: (
        "An attempt was made, nobody knows whether the message arrived, and the transport cannot recognise a"
        " repetition. Look into the chat before followups retry."
    ),
    ReasonCode.WORKER_LOST: (
        "The workers that took it died each time; their logs say of what. Look into the chat before followups retry."
    ),
    ReasonCode.FAILED_BY_API: "Somebody failed it through the API and gave no reason.",
}
"""What each code means to an operator."""


def explain(follow_up: FollowUp, settings: Settings, now: datetime) -> str:
    """Return one or two sentences: why it was sent, was not sent, or is not sent yet."""
    if follow_up.status == Status.SENT:
        return _sent(follow_up)
    if follow_up.status == Status.PENDING:
        return _pending(follow_up, now)
    code = code_of(follow_up.reason)
    if code not in ENDINGS:
        return f"Somebody {follow_up.status} it; the reason is in their own words."
    limits = {"max_attempts": settings.max_attempts, "max_lateness": span(settings.max_lateness)}
    return ENDINGS[ReasonCode(code)].format(**limits)


def lag_of(follow_up: FollowUp) -> timedelta | None:
    """Return accepted minus due date, for what the transport accepted."""
    return follow_up.accepted_at - follow_up.due_date if follow_up.accepted_at else None


def _sent(follow_up: FollowUp) -> str:
    lag = lag_of(follow_up)
    if lag is None:
        return "Somebody else sent it, and said so through the API."
    when = f"The transport accepted it {span(lag)} {'after' if lag >= timedelta(0) else 'before'} its due date"
    if follow_up.attempts > 1:
        return f"{when}, with attempt {follow_up.attempts}; the failed ones are below."
    if follow_up.scheduled_at > follow_up.due_date:
        return f"{when}, which had passed when it was scheduled, on {readable(follow_up.scheduled_at)}."
    return f"{when}, at the first attempt."


def _pending(follow_up: FollowUp, now: datetime) -> str:
    if follow_up.begun_at is not None:
        return _in_flight(follow_up, now)
    if follow_up.waits_for is not None:
        return f"It waits for the earlier follow-up of its chat, {follow_up.waits_for}, to end; then it goes out."
    moment = follow_up.next_attempt_at or follow_up.due_date
    if moment > now:
        if follow_up.next_attempt_at is None:
            return f"It is sent in {span(moment - now)}, unless something cancels it first."
        return f"It is tried again in {span(moment - now)}; why it was not accepted yet stands below."
    if follow_up.lease_until is not None and follow_up.lease_until > now:
        return "It is due, and a tick has claimed it; a worker is about to send it."
    overdue = f"It has been due for {span(now - moment)}, and no worker holds it"
    return f"{overdue}: followups doctor says whether beat and workers are running."


def _in_flight(follow_up: FollowUp, now: datetime) -> str:
    wish = ""
    if follow_up.cancel_requested:
        wish = f" A cancel ({follow_up.cancel_requested}) came meanwhile: it will not be tried again."
    if follow_up.lease_until is not None and follow_up.lease_until <= now:
        return f"The worker that was sending it is lost; the next tick takes it over.{wish}"
    return f"An attempt is in flight, and its outcome is not recorded yet.{wish}"

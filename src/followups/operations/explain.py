"""Explanations in words of why a follow-up is in its state, and what can be done about it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import redis
from sqlalchemy import func, select

from followups.errors import FollowUpNotFoundError
from followups.flow_control.breaker import read
from followups.models import Chat, Workspace
from followups.operations.doctor.broker_checks import broker_client
from followups.operations.wording import rate_in_words, readable, span
from followups.sending_hours import opens_at
from followups.states import ReasonCode, Status, code_of
from followups.store import audit, chat_order, follow_ups, last_tick, pauses, rate_limits, retries, sending_hours
from followups.store.leases import key_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.flow_control.breaker import Shown
    from followups.models import AuditEvent, FailedAttempt, FollowUp
    from followups.sending_hours import SendingHours
    from followups.settings import Settings
    from followups.store.pauses import ActivePause
    from followups.store.rate_limits import Limit

ENDINGS = {
    ReasonCode.USER_REPLIED: "The user wrote in the chat before it was sent, so there was nothing left to follow up.",
    ReasonCode.HUMAN_TAKEOVER: "A human operator wrote in the chat before it was sent, and has taken over.",
    ReasonCode.CHAT_REMOVED: "The chat was removed before it was sent.",
    ReasonCode.CANCELLED_BY_API: "It was cancelled through the API or with followups cancel, without a reason.",
    ReasonCode.REJECTED: (
        "The transport refused it for good; correct the cause, then followups retry makes a new one."
    ),
    ReasonCode.RETRIES_EXHAUSTED: (
        "Every attempt that FOLLOWUPS_MAX_ATTEMPTS ({max_attempts}) allows has failed; the reason names the last error."
        " When the transport works again, followups retry makes a new one."
    ),
    ReasonCode.WINDOW_CLOSED: (
        "The channel allows messages only within 24 hours of the user's last one, and that time had ended."
    ),
    ReasonCode.TOO_LATE: (
        "It could not be sent within FOLLOWUPS_MAX_LATENESS ({max_lateness}) of its due date: were beat, workers,"
        " database and transport running all that time? followups retry makes a new one."
    ),
    ReasonCode.OUTCOME_UNKNOWN: (
        "An attempt was made, it is unknown whether the message arrived, and the transport does not deduplicate."
        " Check the chat before followups retry."
    ),
    ReasonCode.WORKER_LOST: (
        "Each worker that tried to send it died; see the workers' logs. Check the chat before followups retry."
    ),
    ReasonCode.FAILED_BY_API: "It was failed through the API, without a reason.",
}
"""The meaning of each reason code, for operators."""


MOST_EVENTS = 100
"""Maximum number of manual changes shown with a follow-up; only the newest are shown."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """The circumstances outside a follow-up's row that affect when it is sent."""

    pause: ActivePause | None = None
    """The pause of the follow-up's workspace or channel."""
    hours: SendingHours | None = None
    limits: Sequence[Limit] = ()
    """The rate limits of the follow-up's workspace, channel or chat."""
    breaker: Shown | None = None
    """The state of the breaker, or None if it is unknown."""
    tick_age: timedelta | None = None
    """The age of the last tick."""
    first: str = ""
    """The explanation of the chat's first pending follow-up, if that is a different one."""
    retried_as: UUID | None = None


@dataclass(frozen=True, slots=True)
class Explained:
    """A follow-up with everything that explains its state."""

    follow_up: FollowUp
    workspace: str
    chat: Chat
    failures: Sequence[FailedAttempt]
    events: Sequence[AuditEvent]
    """The follow-up's manual changes, oldest first."""
    now: datetime
    around: Circumstances
    explanation: str
    """Why the follow-up is in its state."""


ALONE = Circumstances()
PATIENCE = timedelta(seconds=1)
"""How long to wait for the breaker's state from the broker; everything else is read from the database."""

STALE_TICK = timedelta(seconds=30)
"""Age from which the last tick counts as missing.

The limit suits every tick interval in use; the default interval is one second.
"""


def explain(follow_up: FollowUp, settings: Settings, now: datetime, around: Circumstances = ALONE) -> str:
    """Return a few sentences: why the follow-up was sent, was not sent, or is not sent yet."""
    if follow_up.status == Status.SENT:
        return _sent(follow_up)
    if follow_up.status == Status.PENDING:
        return _pending(follow_up, now, around)
    again = f" It was retried as {around.retried_as}." if around.retried_as else ""
    code = code_of(follow_up.reason)
    if code not in ENDINGS:
        return f"It was {follow_up.status} with a reason of the caller's own.{again}"
    limits = {"max_attempts": settings.max_attempts, "max_lateness": span(settings.max_lateness)}
    return ENDINGS[ReasonCode(code)].format(**limits) + again


def lag_of(follow_up: FollowUp) -> timedelta | None:
    """Return the time of acceptance minus the due date, or None if the transport has not accepted it."""
    return follow_up.accepted_at - follow_up.due_date if follow_up.accepted_at else None


def _sent(follow_up: FollowUp) -> str:
    lag = lag_of(follow_up)
    if lag is None:
        return "It was marked as sent through the API; this service did not send it."
    when = f"The transport accepted it {span(lag)} {'after' if lag >= timedelta(0) else 'before'} its due date"
    if follow_up.held_until is not None and follow_up.held_until > follow_up.due_date:
        when += f" (held until the sending hours opened, {readable(follow_up.held_until)})"
    if follow_up.attempts > 1:
        return f"{when}, with attempt {follow_up.attempts}; the failed ones are below."
    if follow_up.scheduled_at > follow_up.due_date:
        return f"{when}, which had passed when it was scheduled, on {readable(follow_up.scheduled_at)}."
    return f"{when}, at the first attempt."


def _pending(follow_up: FollowUp, now: datetime, around: Circumstances) -> str:
    if follow_up.begun_at is not None:
        return _in_flight(follow_up, now)
    if follow_up.pause_id is not None:
        return _paused(follow_up, now, around)
    if follow_up.waits_for is not None:
        said = f"It waits for the earlier follow-up of its chat, {follow_up.waits_for}, to end."
        return f"{said} {around.first}".strip()
    moment = follow_up.next_attempt_at or follow_up.due_date
    if moment > now:
        return _later(follow_up, moment, now, around)
    return _due(follow_up, moment, now, around)


def _due(follow_up: FollowUp, moment: datetime, now: datetime, around: Circumstances) -> str:
    if around.pause is not None:
        return f"It is due, and will be held when a worker begins it: {stopped(around.pause)}."
    if breaker := _holds(around.breaker, follow_up):
        return _left_alone(breaker)
    if follow_up.lease_until is not None and follow_up.lease_until > now:
        return "It is due, and a tick has claimed it; a worker is about to send it."
    return _overdue(follow_up, now - moment, around)


def _holds(breaker: Shown | None, follow_up: FollowUp) -> Shown | None:
    """Return the breaker if it holds the follow-up's workspace, or None otherwise."""
    return breaker if breaker and key_of(follow_up.workspace_id) in breaker.tripped else None


def _left_alone(breaker: Shown) -> str:
    failed = f"for {span(timedelta(seconds=breaker.seconds))} the transport has failed for its workspace"
    if breaker.state == "recovering":
        return f"It is due, and is sent within seconds: {failed}, and is recovering."
    return (
        f"It is due, and waits without using up attempts: {failed} (the breaker is {breaker.state}). The transport is"
        " probed every few seconds, and this is sent when it works again, unless it is too late by then."
        " See followups doctor."
    )


def _paused(follow_up: FollowUp, now: datetime, around: Circumstances) -> str:
    due = f"It fell due {span(now - follow_up.due_date)} ago and is held"
    if around.pause is None:
        return f"{due}: the pause has ended, and it is sent within a minute or so."
    return f"{due}: {stopped(around.pause)}; {going_on(around.pause)} ends the pause."


def stopped(pause: ActivePause) -> str:
    """Return what a pause stops, as a noun phrase."""
    return f"{_scope(pause)} {'has' if pause.workspace else 'have'} been paused since {readable(pause.since)}"


def _scope(pause: ActivePause) -> str:
    if pause.workspace is None:
        return f"all chats on channel {pause.channel}"
    return f"workspace {pause.workspace}" + (f" on channel {pause.channel}" if pause.channel else "")


def going_on(pause: ActivePause) -> str:
    """Return the command that ends the pause."""
    options = {"--workspace": pause.workspace, "--channel": pause.channel}
    return "followups resume " + " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items() if value)


def _later(follow_up: FollowUp, moment: datetime, now: datetime, around: Circumstances) -> str:
    wait = span(moment - now)
    if follow_up.held_until is not None and follow_up.held_until > now:
        said = f"It fell due outside the workspace's sending hours ({around.hours or 'since changed'})"
        return f"{said} and is held until they open, in {wait}."
    if follow_up.limited_until == moment and (breaker := _holds(around.breaker, follow_up)):
        return _left_alone(breaker)
    if follow_up.limited_until == moment:
        said = f"It is due, and waits for {_limits(around.limits)}; it is tried again in {wait}."
    elif follow_up.next_attempt_at is None:
        said = f"It is sent in {wait}, unless something cancels it first."
    else:
        said = f"It is tried again in {wait}; the failed attempts are below."
    return f"{said}{_will_be_held(moment, around)}"


def _limits(limits: Sequence[Limit]) -> str:
    if not limits:
        return "a rate limit that has been removed since"
    named = [f"{rate_in_words(each.rate)} for {limited(each.workspace, each.channel, each.per)}" for each in limits]
    return f"{'the rate limits' if len(named) > 1 else 'the rate limit'} of {' and '.join(named)}"


def limited(workspace: str | None, channel: str | None, per: str) -> str:
    """Return the scope of a rate limit, as a noun phrase.

    >>> limited("acme", "waha", "chat"), limited(None, None, "all")
    ('each chat of channel waha of workspace acme', 'everything')
    """
    parts = (per != "all" and f"each {per}", channel and f"channel {channel}", workspace and f"workspace {workspace}")
    return " of ".join(part for part in parts if part) or "everything"


def _will_be_held(moment: datetime, around: Circumstances) -> str:
    if around.pause is not None:
        return f" But {stopped(around.pause)}: unless that has ended by then, it will be held."
    opening = _opening(around.hours, moment)
    if opening is not None:
        return f" But that is outside the sending hours ({around.hours}): it will be held until {readable(opening)}."
    return ""


def _opening(hours: SendingHours | None, moment: datetime) -> datetime | None:
    try:
        opening = opens_at(hours, moment) if hours else moment
    except LookupError:
        return None
    return opening if opening > moment else None


def _overdue(follow_up: FollowUp, late: timedelta, around: Circumstances) -> str:
    overdue = f"It has been due for {span(late)}, and no worker has claimed it"
    if around.tick_age is None or around.tick_age > STALE_TICK:
        ticked = f"the last tick ran {span(around.tick_age)} ago" if around.tick_age else "no tick has ever run"
        return f"{overdue}: {ticked}, so beat or the workers are not running. See followups doctor."
    behind = f" It was snoozed {follow_up.snoozes} times: the transport limits the rate." if follow_up.snoozes else ""
    return f"{overdue}: earlier follow-ups may be in front of it. See followups doctor.{behind}"


def _in_flight(follow_up: FollowUp, now: datetime) -> str:
    wish = ""
    if follow_up.cancel_requested:
        wish = f" A cancel ({follow_up.cancel_requested}) arrived since: it will not be retried."
    if follow_up.lease_until is not None and follow_up.lease_until <= now:
        return f"Its lease has expired: a tick takes it over, unless its worker records the outcome first.{wish}"
    return f"An attempt is in flight, and its outcome is not recorded yet.{wish}"


def explained(session: Session, follow_up_id: UUID, settings: Settings) -> Explained:
    """Return the follow-up with everything that explains its state. Raises `FollowUpNotFoundError`."""
    follow_up = follow_ups.find(session, follow_up_id, None)
    if follow_up is None:
        raise FollowUpNotFoundError
    now = session.execute(select(func.now())).scalar_one()
    chat = session.get_one(Chat, (follow_up.workspace_id, follow_up.chat_id))
    around = _circumstances(session, follow_up, chat.channel, settings)
    if follow_up.waits_for is not None:
        around = replace(around, first=_first(session, follow_up, around, now, settings))
    return Explained(
        follow_up,
        session.get_one(Workspace, follow_up.workspace_id).name,
        chat,
        follow_ups.failures(session, follow_up_id),
        audit.newest(session, audit.AuditFilter(target_id=follow_up_id), MOST_EVENTS)[::-1],
        now,
        around,
        explain(follow_up, settings, now, around),
    )


def _circumstances(session: Session, follow_up: FollowUp, channel: str, settings: Settings) -> Circumstances:
    connection = session.connection()
    last = retries.last_of(session, follow_up.id)
    return Circumstances(
        pause=pauses.of(connection, follow_up.workspace_id, channel),
        hours=sending_hours.find(session, follow_up.workspace_id),
        limits=rate_limits.of(connection, follow_up.workspace_id, channel),
        breaker=breaker_state(settings) if follow_up.status == Status.PENDING else None,
        tick_age=last_tick.last_tick_age(connection),
        retried_as=last if last != follow_up.id else None,
    )


def breaker_state(settings: Settings) -> Shown | None:
    """Return the breaker's state, or None if the broker is unreachable."""
    try:
        with broker_client(settings, PATIENCE) as client:
            return read(client, settings)
    except (redis.RedisError, OSError):
        return None  # followups doctor reports it


def _first(session: Session, follow_up: FollowUp, around: Circumstances, now: datetime, settings: Settings) -> str:
    """Explain the chat's first pending follow-up, which blocks all later follow-ups of the chat."""
    first = chat_order.first_of(session.connection(), follow_up.workspace_id, follow_up.chat_id)
    if first is None or first == follow_up.id:
        return ""
    found = follow_ups.find(session, first, None)
    which = "Of that one" if first == follow_up.waits_for else f"The first of the chat is {first}"
    return f"{which}: {explain(found, settings, now, around)}" if found else ""

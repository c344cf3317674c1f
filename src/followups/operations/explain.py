"""Explain why a follow-up is in its state, and what can be done about it. Pure functions."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import TYPE_CHECKING

from followups.sending_hours import opens_at
from followups.states import ReasonCode, Status, code_of
from followups.store.chat_order import MOST_PLACES
from followups.store.leases import key_of
from followups.wording import Sentence, rate_in_words

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from followups.flow_control.breaker import BreakerStatus
    from followups.models import FollowUp
    from followups.sending_hours import SendingHours
    from followups.settings import Settings
    from followups.store.pauses import ActivePause
    from followups.store.rate_limits import Limit

ENDINGS = {
    ReasonCode.USER_REPLIED: "The user wrote in the chat before the follow-up was sent, so nothing was"
    " left to follow up.",
    ReasonCode.HUMAN_TAKEOVER: "A human operator wrote in the chat before the follow-up was sent, and has taken over.",
    ReasonCode.CHAT_REMOVED: "The chat was removed before the follow-up was sent.",
    ReasonCode.CANCELLED_BY_API: (
        "The follow-up was cancelled by hand, without a reason: through the API, in the console, or with"
        " followups cancel."
    ),
    ReasonCode.REJECTED: (
        "The transport refused the follow-up for good. Correct the cause, then followups retry creates a new follow-up."
    ),
    ReasonCode.RETRIES_EXHAUSTED: (
        "All attempts that FOLLOWUPS_MAX_ATTEMPTS ({max_attempts}) allows have failed; the reason contains"
        " the last error. When the transport works again, followups retry creates a new follow-up."
    ),
    ReasonCode.WINDOW_CLOSED: (
        "The channel allows messages only within 24 hours of the user's last message, and this time had ended."
    ),
    ReasonCode.TOO_LATE: (
        "The follow-up could not be sent within FOLLOWUPS_MAX_LATENESS ({max_lateness}) of its due date."
        " Check whether beat, workers, database and transport were running all that time, and whether the sending"
        " hours ended in the meantime; followups retry creates a new follow-up."
    ),
    ReasonCode.OUTCOME_UNKNOWN: (
        "An attempt was made, but it is unknown whether the message arrived, and the transport does not"
        " deduplicate. Check the chat before followups retry."
    ),
    ReasonCode.WORKER_LOST: (
        "Each worker that tried to send the follow-up crashed; see the workers' logs. Check the chat"
        " before followups retry."
    ),
    ReasonCode.FAILED_BY_API: "The follow-up was marked as failed through the API, without a reason.",
}
"""The meaning of each reason code, for operators."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Circumstances that affect when a follow-up is sent but are not stored in its row."""

    pause: ActivePause | None = None
    """The pause of the follow-up's workspace or channel."""
    hours: SendingHours | None = None
    limits: Sequence[Limit] = ()
    """The rate limits of the follow-up's workspace, channel or chat."""
    breaker: BreakerStatus | None = None
    """The state of the breaker, or None if the state is unknown."""
    tick_age: timedelta | None = None
    """The age of the last tick."""
    place: int = 1
    """The follow-up's position among its chat's pending follow-ups, at most `MOST_PLACES`."""
    first: Sentence | None = None
    """The explanation of the chat's first pending follow-up, or None if this follow-up is the first."""
    window_closes_at: datetime | None = None
    """The end of the chat's messaging window, or None for a channel without one."""
    retried_as: UUID | None = None


ALONE = Circumstances()

_LATEST = datetime.max.replace(tzinfo=UTC)

STALE_TICK = timedelta(seconds=30)
"""If the last tick is older than this age, ticks count as stopped.

Every tick interval in use is shorter than this age. By default, the tick interval is one second.
"""


def explain(follow_up: FollowUp, settings: Settings, now: datetime, around: Circumstances = ALONE) -> Sentence:
    """Return a few sentences on why the follow-up was sent, was not sent, or is waiting."""
    if follow_up.status == Status.SENT:
        return _sent(follow_up)
    if follow_up.status == Status.PENDING:
        return _pending(follow_up, settings.max_lateness, now, around)
    code = code_of(follow_up.reason)
    if code in ENDINGS:
        limits = {"max_attempts": settings.max_attempts, "max_lateness": settings.max_lateness}
        said = Sentence(ENDINGS[ReasonCode(code)], **limits)
    elif follow_up.status == Status.FAILED:
        said = Sentence("The follow-up was marked as failed, with a reason in the caller's own words.")
    else:
        said = Sentence("The follow-up was cancelled, with a reason in the caller's own words.")
    return said + Sentence("It was retried as {id}.", id=around.retried_as) if around.retried_as else said


def lag_of(follow_up: FollowUp) -> timedelta | None:
    """Return how long after its due date the follow-up was accepted.

    Return None if the transport has not accepted the follow-up.
    """
    return follow_up.accepted_at - follow_up.due_date if follow_up.accepted_at else None


def _sent(follow_up: FollowUp) -> Sentence:
    lag = lag_of(follow_up)
    if lag is None:
        return Sentence("The follow-up was marked as sent through the API; this service did not send it.")
    if lag >= timedelta(0):
        accepted = Sentence("The transport accepted the follow-up {lag} after its due date", lag=lag)
    else:
        accepted = Sentence("The transport accepted the follow-up {lag} before its due date", lag=lag)
    if follow_up.held_until is not None and follow_up.held_until > follow_up.due_date:
        accepted += Sentence("(held until the sending hours opened, {opening})", opening=follow_up.held_until)
    if follow_up.attempts > 1:
        return Sentence(
            "{accepted}, at attempt {number}; the failed attempts are below.",
            accepted=accepted,
            number=follow_up.attempts,
        )
    if follow_up.scheduled_at > follow_up.due_date:
        return Sentence(
            "{accepted}, which had passed when it was scheduled, on {scheduled}.",
            accepted=accepted,
            scheduled=follow_up.scheduled_at,
        )
    return Sentence("{accepted}, at the first attempt.", accepted=accepted)


def _pending(follow_up: FollowUp, max_lateness: timedelta, now: datetime, around: Circumstances) -> Sentence:
    if follow_up.begun_at is not None:
        return _in_flight(follow_up, now)
    moment = follow_up.next_attempt_at or follow_up.due_date
    ends = _too_late_from(follow_up, max_lateness)
    if follow_up.pause_id is not None:
        said = _paused(follow_up, now, around)
    elif follow_up.waits_for is not None:
        said = Sentence(
            "The follow-up waits for the earlier follow-up of its chat, {id}, to end.", id=follow_up.waits_for
        )
    elif ends and moment > now and moment >= ends:
        around = replace(around, window_closes_at=None)  # the window matters no more
        said = Sentence(
            "The follow-up will fail in {wait}: by then, it will be too late to send it (FOLLOWUPS_MAX_LATENESS,"
            " {max_lateness}).",
            wait=moment - now,
            max_lateness=max_lateness,
        )
    elif moment > now:
        said = _later(follow_up, moment, now, around, ends)
    else:
        said = _due(follow_up, moment, now, around)
    if around.place > 1:
        said += Sentence(
            "It is number {place} in its chat; the earlier ones are sent first.",
            place=around.place if around.place < MOST_PLACES else f"{MOST_PLACES}+",
        )
    if around.first is not None:
        said += around.first
    return said + window if (window := _window(follow_up, max(moment, now), now, around)) else said


def _too_late_from(follow_up: FollowUp, max_lateness: timedelta) -> datetime | None:
    """Return when it is too late to send the follow-up, or None if it is never too late.

    Lateness is measured as in `followups.store.fragments.LATENESS_FROM`.
    """
    if not max_lateness:
        return None
    moments = (follow_up.due_date, follow_up.scheduled_at, follow_up.held_until)
    counted_from = follow_up.sendable_from or max(moment for moment in moments if moment)
    # Python has no dates beyond the year 9999
    return counted_from + max_lateness if max_lateness <= _LATEST - counted_from else None


def _window(follow_up: FollowUp, moment: datetime, now: datetime, around: Circumstances) -> Sentence | None:
    """Return a sentence if the messaging window may close before the follow-up is sent.

    Return None if the window stays open long enough.
    """
    closes = around.window_closes_at
    if closes is None:
        return None
    if closes <= now:
        return Sentence("The channel's messaging window has closed, so the follow-up will fail.")
    if follow_up.pause_id or follow_up.waits_for or around.pause:
        return Sentence(
            "It will fail if it is still held when the messaging window closes, at {closes}.", closes=closes
        )
    if (_opening(around.hours, moment) or moment) < closes:
        return None
    return Sentence(
        "The channel's messaging window closes before that, at {closes}, so the follow-up will fail.", closes=closes
    )


def _due(follow_up: FollowUp, moment: datetime, now: datetime, around: Circumstances) -> Sentence:
    if around.pause is not None:
        return Sentence(
            "The follow-up is due, and will be held when a worker begins it: {paused}.", paused=stopped(around.pause)
        )
    if breaker := _holds(around.breaker, follow_up):
        return _left_alone(breaker)
    if follow_up.lease_until is not None and follow_up.lease_until > now:
        return Sentence("The follow-up is due, and a tick has claimed it; a worker is about to send it.")
    return _overdue(follow_up, now - moment, around)


def _holds(breaker: BreakerStatus | None, follow_up: FollowUp) -> BreakerStatus | None:
    """Return the breaker's state if the breaker stops the follow-up's workspace, or None otherwise."""
    return breaker if breaker and key_of(follow_up.workspace_id) in breaker.tripped else None


def _left_alone(breaker: BreakerStatus) -> Sentence:
    failing = timedelta(seconds=breaker.seconds)
    if breaker.state == "recovering":
        return Sentence(
            "The follow-up is due, and will be sent within seconds: the transport failed for its workspace"
            " for {failing}, and is recovering.",
            failing=failing,
        )
    return Sentence(
        "The follow-up is due, and waits without using up attempts: for {failing} the transport has failed"
        " for its workspace (the breaker is {state}). The transport is probed every few seconds. When the"
        " transport works again, the follow-up is sent, unless it is too late by then. See followups"
        " doctor.",
        failing=failing,
        state=breaker.state,
    )


def _paused(follow_up: FollowUp, now: datetime, around: Circumstances) -> Sentence:
    late = now - follow_up.due_date
    if around.pause is None:
        return Sentence(
            "The follow-up fell due {late} ago and is held: the pause has ended, and the follow-up will be"
            " sent in about a minute.",
            late=late,
        )
    return Sentence(
        "The follow-up fell due {late} ago and is held: {paused}; {command} ends the pause.",
        late=late,
        paused=stopped(around.pause),
        command=going_on(around.pause),
    )


def stopped(pause: ActivePause) -> Sentence:
    """Return a clause that says what is paused."""
    values = {"workspace": pause.workspace, "channel": pause.channel, "since": pause.since}
    if pause.workspace is None:
        return Sentence("all chats on channel {channel} have been paused since {since}", **values)
    if pause.channel is None:
        return Sentence("workspace {workspace} has been paused since {since}", **values)
    return Sentence("workspace {workspace} on channel {channel} has been paused since {since}", **values)


def going_on(pause: ActivePause) -> str:
    """Return the command that would end the pause."""
    options = {"--workspace": pause.workspace, "--channel": pause.channel}
    return "followups resume " + " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items() if value)


def _later(
    follow_up: FollowUp, moment: datetime, now: datetime, around: Circumstances, ends: datetime | None
) -> Sentence:
    wait = moment - now
    if follow_up.held_until is not None and follow_up.held_until > now:
        return Sentence(
            "The follow-up fell due outside the workspace's sending hours ({hours}) and is held until they"
            " begin, in {wait}.",
            hours=around.hours.in_words if around.hours else Sentence("since changed"),
            wait=wait,
        )
    if follow_up.limited_until == moment and (breaker := _holds(around.breaker, follow_up)):
        return _left_alone(breaker)
    if follow_up.limited_until == moment:
        limits = _limits(around.limits)
        said = Sentence(
            "The follow-up is due, and waits for {limits}; it is tried again in {wait}.", limits=limits, wait=wait
        )
    elif follow_up.next_attempt_at is None:
        said = Sentence("The follow-up will be sent in {wait}, unless something cancels it first.", wait=wait)
    else:
        said = Sentence("The follow-up is tried again in {wait}; the failed attempts are below.", wait=wait)
    return said + held if (held := _will_be_held(follow_up, moment, around, ends)) else said


def _limits(limits: Sequence[Limit]) -> Sentence:
    if not limits:
        return Sentence("a rate limit that has been removed since")
    named = [
        Sentence(
            "{rate} for {what}", rate=rate_in_words(each.rate), what=limited(each.workspace, each.channel, each.per)
        )
        for each in limits
    ]
    if len(named) == 1:
        return Sentence("the rate limit of {limit}", limit=named[0])
    return Sentence("the rate limits of {limits}", limits=reduce(_and, named))


def _and(first: Sentence, second: Sentence) -> Sentence:
    return Sentence("{first} and {second}", first=first, second=second)


def limited(workspace: str | None, channel: str | None, per: str) -> Sentence:
    """Return what a rate limit applies to, as a noun phrase.

    >>> str(limited("acme", "waha", "chat")), str(limited(None, None, "all"))
    ('each chat of channel waha of workspace acme', 'everything')
    """
    parts = [Sentence("each chat") if per == "chat" else Sentence("each workspace")] if per != "all" else []
    parts += [Sentence("channel {channel}", channel=channel)] if channel else []
    parts += [Sentence("workspace {workspace}", workspace=workspace)] if workspace else []
    return reduce(_of, parts) if parts else Sentence("everything")


def _of(part: Sentence, whole: Sentence) -> Sentence:
    return Sentence("{part} of {whole}", part=part, whole=whole)


def _will_be_held(
    follow_up: FollowUp, moment: datetime, around: Circumstances, ends: datetime | None
) -> Sentence | None:
    if around.pause is not None:
        return Sentence(
            "But {paused}: unless the pause has ended by then, the follow-up will be held.",
            paused=stopped(around.pause),
        )
    opening = _opening(around.hours, moment)
    if opening is not None and around.hours is not None:
        # lateness does not count before the first moment within the sending hours
        counts = follow_up.sendable_from or not _opening(around.hours, follow_up.due_date)
        if ends and opening >= ends and counts:
            return Sentence(
                "But that is outside the sending hours ({hours}), which begin too late for it, so the follow-up will"
                " fail at {ends}.",
                hours=around.hours.in_words,
                ends=ends,
            )
        return Sentence(
            "But that is outside the sending hours ({hours}), so the follow-up will be held until {opening}.",
            hours=around.hours.in_words,
            opening=opening,
        )
    return None


def _opening(hours: SendingHours | None, moment: datetime) -> datetime | None:
    """Return when the sending hours next begin, or None during sending hours."""
    try:
        opening = opens_at(hours, moment) if hours else moment
    except LookupError:
        return None
    return opening if opening > moment else None


def _overdue(follow_up: FollowUp, late: timedelta, around: Circumstances) -> Sentence:
    if around.tick_age is None:
        return Sentence(
            "The follow-up has been due for {late}, and no worker has claimed it: no tick has ever run, so"
            " beat or the workers are not running. See followups doctor.",
            late=late,
        )
    if around.tick_age > STALE_TICK:
        return Sentence(
            "The follow-up has been due for {late}, and no worker has claimed it: the last tick ran {ago}"
            " ago, so beat or the workers are not running. See followups doctor.",
            late=late,
            ago=around.tick_age,
        )
    said = Sentence(
        "The follow-up has been due for {late}, and no worker has claimed it: earlier follow-ups may be"
        " claimed first. See followups doctor.",
        late=late,
    )
    if follow_up.snoozes:
        said += Sentence(
            "It was snoozed {number} times, because the transport limits the rate or refuses access.",
            number=follow_up.snoozes,
        )
    return said


def _in_flight(follow_up: FollowUp, now: datetime) -> Sentence:
    if follow_up.lease_until is not None and follow_up.lease_until <= now:
        said = Sentence(
            "The follow-up's lease has expired: a tick will claim it again, unless its worker"
            " records the outcome first."
        )
    else:
        said = Sentence("An attempt is in flight, and its outcome is not recorded yet.")
    if follow_up.cancel_requested:
        said += Sentence(
            "A cancel ({reason}) has arrived since, so the follow-up will not be retried.",
            reason=follow_up.cancel_requested,
        )
    return said

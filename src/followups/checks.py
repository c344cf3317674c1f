"""Validation of callers' values and enforcement of the rules for chats, for every kind of caller."""

from __future__ import annotations

from datetime import UTC
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from followups.channels import Channel, is_open
from followups.errors import InvalidRequestError, NothingToFollowUpError, OutsideMessagingWindowError
from followups.models import MAX_MESSAGE_LENGTH
from followups.sending_hours import opens_at
from followups.states import DEFAULT_CODES, FINAL, MAX_REASON_LENGTH, Status, finish, storable
from followups.store.chats import Role
from followups.telemetry.logs import get_logger
from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from uuid import UUID

    from followups.models import Chat
    from followups.sending_hours import SendingHours
    from followups.states import Final
    from followups.store.follow_ups import Planned

log = get_logger(__name__)

FIRST_YEAR, LAST_YEAR = 2, 9998
"""The first and the last year in which a time is accepted. Any time within these years can be converted to any time
zone.
"""


def final_of(status: Status, reason: str | None) -> Final:
    """Return the final state that a caller requests, with the given reason or the default code."""
    if status is Status.SENT:
        return finish(status)
    return finish(status, words=reason) if reason else finish(status, DEFAULT_CODES[status])


def trigger_of(chat: Chat) -> UUID:
    """Return the chat's last message.

    Raises `NothingToFollowUpError` if the chat has no message or the last message is the user's.
    """
    if chat.last_message_id is None or chat.last_message_role == Role.USER:
        raise NothingToFollowUpError
    return chat.last_message_id


def check_moment(chat: Chat, moment: datetime, hours: SendingHours | None) -> None:
    """Refuse a time outside the channel's messaging window.

    A follow-up due outside the workspace's sending hours is held until the sending hours begin. The messaging window
    must still be open when the sending hours begin.
    """
    channel = Channel(chat.channel)
    if not is_open(channel, chat.last_user_message_at, moment):
        raise OutsideMessagingWindowError(field="due_date")
    if hours is None:
        return
    opening = _opening(chat.workspace_id, hours, moment)
    if not is_open(channel, chat.last_user_message_at, opening):
        message = Sentence(
            "The due date is outside the workspace's sending hours ({hours}). When they open, at"
            " {opening}, the channel's messaging window has closed.",
            hours=hours.in_words,
            opening=opening,
        )
        raise OutsideMessagingWindowError(message, field="due_date")


def _opening(workspace_id: UUID, hours: SendingHours, moment: datetime) -> datetime:
    """Return ``moment``, or the next opening if ``moment`` is outside the sending hours.

    Return ``moment`` itself if this host does not know the time zone. The follow-up is then accepted anyway. The worker
    checks the sending hours again when it begins the attempt.
    """
    try:
        return opens_at(hours, moment)
    except LookupError:
        _log_unreadable(workspace_id, hours)
        return moment


@lru_cache(maxsize=1024)
def _log_unreadable(workspace_id: UUID, hours: SendingHours) -> None:
    """Log, once per process, that the sending hours cannot be checked."""
    log.error("sending_hours_unreadable", workspace_id=str(workspace_id), hours=str(hours))


def check_planned(planned: Planned) -> None:
    """Refuse an invalid message or due date."""
    check_message(planned.message)
    check_time(planned.due_date, "due_date")


def check_message(message: str) -> None:
    """Refuse a message that is empty, too long, or impossible to store in PostgreSQL."""
    if not 1 <= len(message) <= MAX_MESSAGE_LENGTH:
        text = Sentence(
            "The message must have 1 to {most} characters; this one has {number}.",
            most=f"{MAX_MESSAGE_LENGTH:,}",
            number=f"{len(message):,}",
        )
        raise InvalidRequestError(text, field="message")
    check_text(message, "message")


def check_text(text: str, field: str) -> None:
    """Raise an error if the text contains a NUL character or a lone surrogate."""
    if text != storable(text):
        message = Sentence("The {field} must not contain NUL characters or lone surrogates.", field=_named(field))
        raise InvalidRequestError(message, field=field)


def _named(field: str) -> Sentence:
    return Sentence(field.replace("_", " "))


def check_time(time: datetime, field: str) -> None:
    """Refuse a time that has no offset or is at the edge of the calendar."""
    if time.utcoffset() is None:
        message = Sentence("The {field} must carry an offset, as in 2030-01-31T09:00:00Z.", field=_named(field))
        raise InvalidRequestError(message, field=field)
    if not all(FIRST_YEAR <= year <= LAST_YEAR for year in (time.year, _year_in_utc(time))):
        message = Sentence(
            "The {field} must be in the years {first} to {last}.",
            field=_named(field),
            first=FIRST_YEAR,
            last=LAST_YEAR,
        )
        raise InvalidRequestError(message, field=field)


def _year_in_utc(time: datetime) -> int:
    try:
        return time.astimezone(UTC).year
    except OverflowError:
        return LAST_YEAR + 1


def check_changes(changes: Mapping[str, Any]) -> None:
    """Refuse invalid or contradictory changes to a follow-up."""
    if "message" in changes:
        check_message(changes["message"])
    for field in changes.keys() & {"due_date", "finished_at"}:
        check_time(changes[field], field)
    ends = changes.get("status") in FINAL
    for field in changes.keys() & {"reason", "finished_at"}:
        if not ends:
            message = Sentence(
                "A {field} is allowed only with the status sent, failed or cancelled.", field=_named(field)
            )
            raise InvalidRequestError(message, field=field)
    if "reason" in changes:
        check_reason(changes["reason"], changes["status"])


def check_reason(reason: str, status: Status) -> None:
    """Refuse a reason that is empty, too long, impossible to store, or wrong for the status."""
    if status is Status.SENT:
        message = Sentence("A sent follow-up has no reason.")
        raise InvalidRequestError(message, field="reason")
    if not 1 <= len(reason) <= MAX_REASON_LENGTH:
        message = Sentence("The reason must have 1 to {most} characters.", most=f"{MAX_REASON_LENGTH:,}")
        raise InvalidRequestError(message, field="reason")
    check_text(reason, "reason")

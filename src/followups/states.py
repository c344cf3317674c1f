"""The states of a follow-up, the reasons for its end, and the allowed transitions.

This module uses neither a clock nor a database. Except for a sent message, every final ``status`` comes from a `Final`
created by `finish`, or from a cancel that was requested during the attempt.

======= ========= ===================================================================================
from    to        codes
======= ========= ===================================================================================
pending sent      (none)
pending failed    rejected, retries_exhausted, window_closed, too_late, outcome_unknown, worker_lost, failed_by_api
pending cancelled user_replied, human_takeover, chat_removed, cancelled_by_api
======= ========= ===================================================================================

A stored reason is ``code`` or ``code: detail``. A reason in a caller's own words (PATCH or operator) is stored without
a code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from followups.errors import TransitionError

MAX_REASON_LENGTH = 2_000
"""Maximum stored length of a reason in characters. In practice, reasons are far shorter."""


class Status(StrEnum):
    """The state of a follow-up. The states `sent`, `failed` and `cancelled` are final."""

    PENDING = "pending"
    """The follow-up has been scheduled and has not ended yet. Scheduling or retrying makes a follow-up pending. Begin,
    settle, a lost lease, a cancel or a PATCH request can end this state.

    While a follow-up is leased or in flight, its status is still pending.
    """
    SENT = "sent"
    """The transport accepted the message.

    Settle sets this state. A PATCH sets the state if the message was sent by other means.
    """
    FAILED = "failed"
    """The follow-up will never be sent. The reason says why the follow-up failed. A follow-up can fail in begin, in
    settle, in a claim that finds a lost lease, or by a PATCH request.
    """
    CANCELLED = "cancelled"
    """The follow-up must not be sent.

    A follow-up is cancelled by a reply, a takeover, a chat's removal, an operator or a PATCH request.
    """


class ReasonCode(StrEnum):
    """Why a follow-up failed or was cancelled."""

    USER_REPLIED = "user_replied"
    """A user message was recorded in the chat."""
    HUMAN_TAKEOVER = "human_takeover"
    """A human operator wrote in the chat."""
    CHAT_REMOVED = "chat_removed"
    """The chat was removed."""
    CANCELLED_BY_API = "cancelled_by_api"
    """The follow-up was cancelled through the API, and the caller gave no reason."""
    REJECTED = "rejected"
    """The transport refused the message permanently."""
    RETRIES_EXHAUSTED = "retries_exhausted"
    """The last allowed attempt failed; the detail is the last error."""
    WINDOW_CLOSED = "window_closed"
    """The channel's messaging window closed before the message could be sent."""
    TOO_LATE = "too_late"
    """The follow-up is later than the maximum lateness allows."""
    OUTCOME_UNKNOWN = "outcome_unknown"
    """The outcome of an attempt is unknown, and the transport cannot deduplicate."""
    WORKER_LOST = "worker_lost"
    """Too many workers crashed while the follow-up was in flight: a poison pill."""
    FAILED_BY_API = "failed_by_api"
    """The follow-up was set to failed through the API, and the caller gave no reason."""


TRANSITIONS: dict[Status, dict[Status, frozenset[ReasonCode]]] = {
    Status.PENDING: {
        Status.SENT: frozenset(),
        Status.FAILED: frozenset(
            {
                ReasonCode.REJECTED,
                ReasonCode.RETRIES_EXHAUSTED,
                ReasonCode.WINDOW_CLOSED,
                ReasonCode.TOO_LATE,
                ReasonCode.OUTCOME_UNKNOWN,
                ReasonCode.WORKER_LOST,
                ReasonCode.FAILED_BY_API,
            }
        ),
        Status.CANCELLED: frozenset(
            {
                ReasonCode.USER_REPLIED,
                ReasonCode.HUMAN_TAKEOVER,
                ReasonCode.CHAT_REMOVED,
                ReasonCode.CANCELLED_BY_API,
            }
        ),
    },
    Status.SENT: {},
    Status.FAILED: {},
    Status.CANCELLED: {},
}
"""The allowed transitions, each with its possible reason codes."""

CANCEL_CODES = TRANSITIONS[Status.PENDING][Status.CANCELLED]

_CODES = frozenset(ReasonCode)

FINAL = frozenset(status for status, onward in TRANSITIONS.items() if not onward)
"""The final states, which a follow-up never leaves."""

DEFAULT_CODES = {Status.FAILED: ReasonCode.FAILED_BY_API, Status.CANCELLED: ReasonCode.CANCELLED_BY_API}
"""The reason codes used if a caller of the API gives no reason."""


@dataclass(frozen=True, slots=True)
class Final:
    """The end of a follow-up: the values of ``status`` and ``reason``. Only `finish` creates instances."""

    status: Status
    reason: str | None
    code: ReasonCode | None = field(default=None, compare=False)
    """The reason's code; None for ``sent`` and for a reason in the caller's own words.

    A caller's own reason has no code, even if it looks as if it began with one.
    """


def finish(
    to: Status, code: ReasonCode | None = None, detail: str = "", *, words: str = "", current: Status = Status.PENDING
) -> Final:
    """Return the final state and reason of a follow-up that changes from ``current`` to ``to``.

    ``code`` and ``detail`` form the reason ``code: detail``. ``words`` is the caller's own reason, which is stored
    unchanged. Raises `TransitionError` if a follow-up must not change from ``current`` to ``to``.

    >>> finish(Status.FAILED, ReasonCode.REJECTED, "HTTP 403").reason
    'rejected: HTTP 403'
    >>> finish(Status.CANCELLED, words="the customer called").reason
    'the customer called'
    """
    codes = TRANSITIONS[current].get(to)
    if codes is None:
        message = f"A follow-up that is {current} cannot become {to}."
        raise TransitionError(message)
    if to is Status.SENT:
        if code or words or detail:
            message = "A sent follow-up has no reason."
            raise TransitionError(message)
        return Final(to, None)
    if words:
        return Final(to, words)
    if code not in codes:
        message = f"{code} is not a reason for {to}; use one of {', '.join(sorted(codes))}."
        raise TransitionError(message)
    return Final(to, explain(code, detail), code)


def explain(code: ReasonCode, detail: str = "") -> str:
    """Return ``code`` or ``code: detail``, made storable in PostgreSQL and cut to the maximum length."""
    detail = storable(detail).strip()
    return f"{code.value}: {detail}"[:MAX_REASON_LENGTH] if detail else code.value


def storable(text: str) -> str:
    """Return the text without characters that PostgreSQL cannot store: NUL and lone surrogates."""
    return text.encode(errors="replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")


def code_of(reason: str | None) -> str:
    """Return the code of a stored reason; '' if there is none, 'other' for a caller's own words.

    >>> code_of("rejected: HTTP 403"), code_of("the customer called"), code_of(None)
    ('rejected', 'other', '')
    """
    if reason is None:
        return ""
    code = reason.partition(":")[0]
    return code if code in _CODES else "other"

"""The states of a follow-up, the reasons it ends for, and the only transitions there are.

Pure: no clock, no database. Everything that writes ``status`` writes a `Final` made by `finish`.

======= ========= ===================================================================================
from    to        codes
======= ========= ===================================================================================
pending sent      (none)
pending failed    rejected, retries_exhausted, window_closed, too_late, outcome_unknown, worker_lost, failed_by_api
pending cancelled user_replied, human_takeover, chat_removed, cancelled_by_api
======= ========= ===================================================================================

A stored reason is ``code`` or ``code: detail``; somebody's own words (a PATCH, an operator) are stored
as given and carry no code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from followups.errors import TransitionError

MAX_REASON_LENGTH = 2_000
"""Characters of a reason that are kept; far above any real one, so that no answer fills the table."""


class Status(StrEnum):
    """Where a follow-up stands. The last three are final, for ever."""

    PENDING = "pending"
    """Accepted and not ended. Moved in by schedule or retry; out by settle, cancel or recovery.
    A leased or in-flight follow-up is pending too: the lease is no state of its own."""
    SENT = "sent"
    """The transport accepted it. Moved in by settle (or by PATCH, when somebody else sent it)."""
    FAILED = "failed"
    """It will never be sent; the reason says why. Moved in by begin, settle, recovery, PATCH."""
    CANCELLED = "cancelled"
    """It must not be sent. Moved in by a reply, a takeover, a chat's removal, an operator, PATCH."""


class ReasonCode(StrEnum):
    """Why a follow-up failed or was cancelled (the contract's codes)."""

    USER_REPLIED = "user_replied"
    """A user message arrived in the chat."""
    HUMAN_TAKEOVER = "human_takeover"
    """A human operator wrote in the chat."""
    CHAT_REMOVED = "chat_removed"
    """The chat was removed."""
    CANCELLED_BY_API = "cancelled_by_api"
    """Cancelled through the API without words of the caller's own."""
    REJECTED = "rejected"
    """The transport refused for good."""
    RETRIES_EXHAUSTED = "retries_exhausted"
    """The last allowed attempt failed; the detail is the last error."""
    WINDOW_CLOSED = "window_closed"
    """The channel's messaging window ended before it could be sent."""
    TOO_LATE = "too_late"
    """The due date plus the allowed lateness has passed."""
    OUTCOME_UNKNOWN = "outcome_unknown"
    """An attempt began, its outcome is unknown, and the transport cannot deduplicate."""
    WORKER_LOST = "worker_lost"
    """The workers that took it died too many times: a poison message."""
    FAILED_BY_API = "failed_by_api"
    """Failed through the API without words of the caller's own."""


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
"""Allowed transitions, and with each the codes that may explain it."""

CANCEL_CODES = TRANSITIONS[Status.PENDING][Status.CANCELLED]

FINAL = frozenset(status for status, onward in TRANSITIONS.items() if not onward)
"""The states that nothing leaves."""

DEFAULT_CODES = {Status.FAILED: ReasonCode.FAILED_BY_API, Status.CANCELLED: ReasonCode.CANCELLED_BY_API}
"""The code where the caller of the API gave no reason of its own."""


@dataclass(frozen=True, slots=True)
class Final:
    """How a follow-up ends: what is written to ``status`` and ``reason``. Made by `finish` only."""

    status: Status
    reason: str | None
    code: ReasonCode | None = field(default=None, compare=False)
    """The code of the reason; None for ``sent``, and for a caller's own words, whatever they begin with."""


def finish(
    to: Status, code: ReasonCode | None = None, detail: str = "", *, words: str = "", current: Status = Status.PENDING
) -> Final:
    """Return how a follow-up in state ``current`` ends in ``to``, or refuse.

    ``code`` and ``detail`` make the reason ``code: detail``; ``words``, somebody's own, are stored as
    given instead. Raises `TransitionError` for what the table does not hold.

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
            message = "A sent follow-up carries no reason."
            raise TransitionError(message)
        return Final(to, None)
    if words:
        return Final(to, words)
    if code not in codes:
        message = f"{code} does not explain {to}; use one of {', '.join(sorted(codes))}."
        raise TransitionError(message)
    return Final(to, explain(code, detail), code)


def explain(code: ReasonCode, detail: str = "") -> str:
    """Return ``code`` or ``code: detail``, without what PostgreSQL cannot store, bounded in length."""
    detail = storable(detail).strip()
    return f"{code.value}: {detail}"[:MAX_REASON_LENGTH] if detail else code.value


def storable(text: str) -> str:
    """Return the text without what PostgreSQL cannot store: NUL characters and lone surrogates."""
    return text.encode(errors="replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")


def code_of(reason: str | None) -> str:
    """Return the code of a stored reason: '' where there is no reason, 'other' for somebody's own words.

    >>> code_of("rejected: HTTP 403"), code_of("the customer called"), code_of(None)
    ('rejected', 'other', '')
    """
    if reason is None:
        return ""
    code = reason.partition(":")[0]
    return code if code in set(ReasonCode) else "other"

"""Send: one call to the transport at the due time, with no transaction open.

The outcome is returned, not raised as an exception. All calls share one timer (`CallTimeout`); a separate timer would
cost each call 4 us.
"""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from followups.delivery.attempts import Attempt
from followups.retry_policy import clamp_retry_after
from followups.states import MAX_REASON_LENGTH, storable
from followups.store.leases import key_of
from followups.telemetry import traces
from followups.transports.port import Outcome, Rejected, Retry, Sent, Snoozed, Unknown
from followups.uptime import uptime

if TYPE_CHECKING:
    from followups.delivery.attempts import Begun
    from followups.delivery.clock import DatabaseClock
    from followups.flow_control.breaker import Breaker
    from followups.transports.port import Delivery, Transport

    Task = asyncio.Task[Any]


OUTCOME_NAMES: dict[type, str] = {
    Sent: "sent",
    Retry: "retry",
    Snoozed: "snoozed",
    Rejected: "rejected",
    Unknown: "unknown",
}
"""The names of the outcomes, as used in logs, metrics, traces and the table of failed attempts."""

CALL_GRACE = timedelta(seconds=1)
"""How long after the transport's own timeout `CallTimeout` cancels a call that still hangs.

The lease exceeds the transport's timeout by at least two seconds (`followups.settings`).
"""

TIMER = 0.001
"""Resolution of the event loop's timers, in seconds.

The resolution of the timers makes a follow-up half a millisecond late on average. Busy-waiting until the due time would
block the whole event loop.
"""

STATUS_CODE_LIMIT = 1000
"""Status codes must be below this limit, since they have at most three digits."""


async def send(
    transport: Transport, begun: Begun, clock: DatabaseClock, limit: CallTimeout, latest: float, breaker: Breaker
) -> Attempt | None:
    """Wait until the follow-up is due, call the transport once, and return the attempt.

    The transport is never called before the due time. The call ends within ``limit``; ``breaker`` counts the outcome
    and may change it. If ``latest`` (an `uptime`) has passed, return None without a call, because a later call could
    outlast the lease. This happens only if the process was frozen. No exception is raised unless the task is cancelled.
    """
    # A timer uses another clock and may fire early, so the time is checked again.
    while (wait := clock.until(begun.lease.due)) > 0:  # noqa: ASYNC110 - time is what is waited for
        await asyncio.sleep(math.ceil(wait / TIMER) * TIMER)
    started = uptime()
    if started > latest:
        return None
    # Each delivery object is sent only once, so its call time can be set without a copy. Copying a delivery object
    # would take 2.5 us.
    made_at = clock.now()
    object.__setattr__(begun.delivery, "made_at", made_at)
    with traces.attempt(begun.traceparent, partial(_described, begun, transport.name)) as note:
        outcome = await _call(transport, begun.delivery, limit)
        answered = uptime()
        outcome = breaker.record(begun.lease.id, key_of(begun.delivery.workspace_id), outcome)
        note({"followups.outcome": OUTCOME_NAMES[type(outcome)]}, failed=not isinstance(outcome, Sent))
    seconds = answered - started
    return Attempt(begun, outcome, seconds, answered, (made_at - begun.delivery.due_date).total_seconds() + seconds)


async def _call(transport: Transport, delivery: Delivery, limit: CallTimeout) -> Outcome:
    task = limit.begin()
    try:
        outcome = checked(await transport.send(delivery))
    except BaseException as error:
        expired = limit.end(task)
        if isinstance(error, asyncio.CancelledError):
            if task.cancelling():
                raise
            if expired:
                return Unknown(f"no outcome within {limit.seconds:g} s")
        # A plug-in may raise any exception, even SystemExit. An exception does not show whether the message was sent,
        # so the outcome is unknown. The error's text may contain the message, so only the error's class is kept.
        return Unknown(f"the transport raised {type(error).__name__}")
    limit.end(task)
    return outcome


def checked(outcome: object) -> Outcome:
    """Return the plug-in's outcome, or `Unknown` if that outcome is invalid.

    >>> checked("sent")
    Unknown(detail='the transport returned str instead of an outcome', status_code=None)
    """
    match outcome:
        case Sent():
            return _checked_sent(outcome)
        case Retry(detail, after, status_code):
            return Retry(_text(detail), _delay(after), _status_code(status_code))
        case Snoozed(detail, after, status_code):
            return Snoozed(_text(detail), _delay(after), _status_code(status_code))
        case Rejected(detail, status_code):
            return Rejected(_text(detail), _status_code(status_code))
        case Unknown(detail, status_code):
            return Unknown(_text(detail), _status_code(status_code))
        case _:
            return Unknown(f"the transport returned {type(outcome).__name__} instead of an outcome")


def _checked_sent(sent: Sent) -> Sent:
    named = sent.chat_message_id if isinstance(sent.chat_message_id, UUID) else None
    code = _status_code(sent.status_code)
    if type(sent) is Sent and named is sent.chat_message_id and code is sent.status_code and sent.detail == "":
        return sent  # the usual case: the same object is returned, because a copy would take 2 us
    odd = "the chat message id is not a UUID" if sent.chat_message_id and not named else _text(sent.detail)
    return Sent(named, code, odd)


def _text(detail: object) -> str:
    return storable(detail)[:MAX_REASON_LENGTH] if isinstance(detail, str) else ""


def _delay(after: object) -> timedelta | None:
    return clamp_retry_after(after) if isinstance(after, timedelta) else None


def _status_code(code: object) -> int | None:
    if not isinstance(code, int) or isinstance(code, bool) or not 0 <= code < STATUS_CODE_LIMIT:
        return None
    # an HTTPStatus is also an int, but psycopg cannot pass an array of HTTPStatus values to PostgreSQL
    return int(code)


def _described(begun: Begun, transport: str) -> dict[str, str | int]:
    return {
        "followups.follow_up_id": str(begun.lease.id),
        "followups.chat_id": str(begun.delivery.chat_id),
        "followups.workspace_id": str(begun.delivery.workspace_id),
        "followups.attempt": begun.delivery.attempt,
        "followups.transport": transport,
    }


class CallTimeout:
    """Cancels each task whose call takes too long. An instance belongs to one event loop."""

    def __init__(self, limit: timedelta) -> None:
        """Limit the duration of each call to ``limit``."""
        self.seconds = limit.total_seconds()
        self._ends: dict[Task, float] = {}
        """For each task, the event-loop time at which its call times out. All calls have the same time limit, so the
        call that began first reaches its limit first.
        """
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Task:
        """Start the time limit for the call that the current task makes, and return the task."""
        task = cast("Task", asyncio.current_task())
        loop = asyncio.get_running_loop()
        end = self._ends[task] = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_at(end, self._expire)
        return task

    def end(self, task: Task) -> bool:
        """Stop the time limit of a task's call; return whether the call exceeded the limit."""
        if self._ends.pop(task, None) is not None:
            return False
        task.uncancel()
        return True

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._ends:
            task, end = next(iter(self._ends.items()))
            if end - loop.time() >= TIMER:
                self._timer = loop.call_at(end, self._expire)
                return
            del self._ends[task]
            task.cancel()

"""The port: what the dispatcher requires of a transport, and the five possible outcomes.

A transport delivers one message into one chat. It never raises for what the other side does: every ending is one of the
five outcomes, so that nothing is guessed. Third parties register theirs as an entry point of the group
``followups.transports``; ``tests/unit/transports`` has the suite that it must pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from datetime import datetime, timedelta
    from uuid import UUID

    from followups.settings import Settings


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt: what to deliver, and where. ``attempt`` counts from 1."""

    follow_up_id: UUID
    """Also the idempotency key: the same on every attempt."""
    workspace_id: UUID
    chat_id: UUID
    channel: str
    external_chat_id: str | None
    trigger_chat_message_id: UUID
    message: str
    due_date: datetime
    attempt: int
    made_at: datetime | None = None
    """Time of the call by the database's clock; a host's may be off, and receivers compare it with theirs."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The transport accepted the message; ``chat_message_id`` is its id there, if the transport returned one."""

    chat_message_id: UUID | None = None
    status_code: int | None = None
    detail: str = ""
    """What was odd about the answer, for the log; never the message's text."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The transport did not accept it now but may later. ``after`` is the delay it asked for, if any."""

    detail: str
    after: timedelta | None = None
    status_code: int | None = None


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The transport asks for a later try (rate limiting); this uses up no attempt."""

    detail: str
    after: timedelta | None = None
    status_code: int | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """The transport refused for good."""

    detail: str
    status_code: int | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """The request left and no answer arrived: the message may or may not have been accepted."""

    detail: str
    status_code: int | None = None


Outcome = Sent | Retry | Snoozed | Rejected | Unknown


@runtime_checkable
class Transport(Protocol):
    """Delivers messages into chats. One instance for each worker process, used from one event loop."""

    name: str
    """The name in the settings and in the metrics' labels."""

    def __init__(self, settings: Settings) -> None:
        """Check the settings, without I/O. Raises `TransportConfigurationError` if they are insufficient."""

    async def open(self) -> None:
        """Open what stays open, such as an HTTP session, in the event loop that will use it."""

    async def send(self, delivery: Delivery) -> Outcome:
        """Deliver once, within the transport timeout. Raises nothing for what the other side does."""

    async def check(self) -> str:
        """Return one sentence saying that the other side can be reached. Raises `FollowUpsError` if it cannot."""

    async def close(self) -> None:
        """Close what was opened."""

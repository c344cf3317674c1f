"""The port: the interface that a transport must implement, and the five possible outcomes of a call.

A transport delivers one message into one chat. A transport raises no error, whatever the chat server does. Every call
ends in one of the five outcomes. Third parties register their own transports as entry points in the group
``followups.transports``. Every transport must pass the test suite in ``tests/unit/transports``.
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
    """One attempt to deliver a message into a chat. ``attempt`` counts from 1."""

    follow_up_id: UUID
    """The follow-up's id, which is also the idempotency key of every attempt."""
    workspace_id: UUID
    chat_id: UUID
    channel: str
    external_chat_id: str | None
    trigger_chat_message_id: UUID
    message: str
    due_date: datetime
    attempt: int
    made_at: datetime | None = None
    """Time at which the transport was called, by the database's clock.

    Chat servers compare the time of the call with their own clocks. The worker's clock may be wrong, so the time comes
    from the database.
    """
    external_chat_id_is_shared: bool = False
    """Whether another workspace has a chat with the same external id.

    This is checked only if external ids must be exclusive (`Settings.exclusive_external_ids`).
    """


@dataclass(frozen=True, slots=True)
class Sent:
    """The transport accepted the message.

    ``chat_message_id`` is the id that the transport returned for the message, if any.
    """

    chat_message_id: UUID | None = None
    status_code: int | None = None
    detail: str = ""
    """Anything unusual about the answer, for the log. The text of the message is never included."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The transport did not accept the message now but may accept it later.

    ``after`` is the delay that the transport requested, if any.
    """

    detail: str
    after: timedelta | None = None
    status_code: int | None = None


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The endpoint requested a later retry (rate limiting). An attempt with the outcome `Snoozed` is not counted.

    A transport also returns `Snoozed` if it could not make the call because of the worker's own limits. While the
    transport fails as a whole, the breaker turns a 401 or 403 into `Snoozed`.
    """

    detail: str
    after: timedelta | None = None
    status_code: int | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """The transport permanently rejected the message.

    The breaker ignores a rejection without a status code, because it assumes that the transport made no call.
    """

    detail: str
    status_code: int | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """It is not known whether the message was accepted, for example because no valid answer arrived."""

    detail: str
    status_code: int | None = None


Outcome = Sent | Retry | Snoozed | Rejected | Unknown


@runtime_checkable
class Transport(Protocol):
    """Delivers messages into chats. Each worker process has one transport and uses it from one event loop."""

    name: str
    """The name of the transport in the settings and in the metrics' labels."""

    def __init__(self, settings: Settings) -> None:
        """Check the settings, without I/O. Raises `TransportConfigurationError` if the settings are insufficient."""

    async def open(self) -> None:
        """Open long-lived resources, such as a session, in the event loop that uses them."""

    async def send(self, delivery: Delivery) -> Outcome:
        """Deliver the message once, within the transport timeout. Raises no error, whatever the chat server does."""

    async def check(self) -> str:
        """Return one sentence saying that the chat server can be reached.

        Raises `FollowUpsError` if the chat server cannot be reached.
        """

    async def close(self) -> None:
        """Close the resources that `open` has opened."""
